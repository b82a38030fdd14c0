"""The start of a search: all that can be checked is checked before the model is loaded."""

import time
from collections.abc import Sequence
from pathlib import Path

from sparsetune.config import Config
from sparsetune.errors import ExecutorError, TuningError
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.executor import Executor, open_executor, run_one
from sparsetune.executor.session import DescribeSession
from sparsetune.metrics import Gate, import_metrics
from sparsetune.models.prompts import load_prompts
from sparsetune.tuning.bench import Bench
from sparsetune.tuning.events import TuningListener


def open_bench(
    config: Config, output_dir: Path, listeners: Sequence[TuningListener] = (), engine: Executor | None = None
) -> Bench:
    """Check a configuration, load the model and give what a search works with; its engine is the caller's to close.

    Args:
        config: the configuration.
        output_dir: where the winner goes.
        listeners: told what happens.
        engine: does the work; None opens the configuration's.

    Raises:
        PromptError, MetricError, ModelError, BackendError, ExecutorError, TuningError, GenerationError: what was asked
            for can't be done.
    """
    if config.backend == "dense":
        raise TuningError("tuning must have a backend that can run sparse, but backend is dense; use --backend auto")
    if config.tune.tuner == "builtin" and config.engine.name != "local":
        raise ExecutorError(
            "--tuner builtin must have the model in this process, but --engine is ray; use --engine local, and "
            "--parallel-tune for the GPUs of this host"
        )
    import_metrics(config.eval.metric_modules)
    prompts = load_prompts(config.tune.prompt_file, config.tune.num_prompts)
    eval_prompts = load_prompts(config.eval.prompt_file, config.eval.num_prompts)
    engine = engine or open_executor(config, measures_speed=config.tune.objective == "speed")
    try:
        rig = run_one(engine, DescribeSession(config.backend)).rig
    except BaseException:
        engine.close()
        raise
    return Bench(
        config=config,
        engine=engine,
        rig=rig,
        prompts=prompts,
        eval_prompts=eval_prompts,
        cache=BaselineCache(config.cache.folder.absolute(), config.cache.max_gb),
        gate=Gate(**config.gate.model_dump()),
        listeners=tuple(listeners),
        output_dir=output_dir,
        started=time.perf_counter(),
    )
