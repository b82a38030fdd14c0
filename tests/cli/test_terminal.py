import logging
import os
import subprocess
import sys
import warnings

import pytest

from sparsetune.cli.terminal import QUIET_ENVIRONMENT, quiet_libraries, results_alone


class LibraryWarning(UserWarning):
    """A library's own kind of warning."""


def warn_as(module: str, text: str, category: type[Warning] = UserWarning) -> None:
    warnings.warn_explicit(text, category, "file.py", 1, module=module)


def test_our_warnings_are_one_line_each_and_others_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_libraries():
        warn_as("sparsetune.attention.backends", "the kernel\nis missing")
        warn_as("torch.nn", "chatter")
        warn_as("sparsetune.tuning.search.study", "this call is on its way out", FutureWarning)
        warn_as("sparsetune.tuning.search.study", "this feature is experimental", LibraryWarning)
    assert capsys.readouterr().err == "warning: the kernel is missing\n"


def test_our_log_records_are_shown_and_others_only_as_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_libraries():
        logging.getLogger("sparsetune.evaluation").info("waiting")
        logging.getLogger("sparsetune.evaluation").warning("damaged")
        logging.getLogger("elsewhere").warning("chatter")
        logging.getLogger("elsewhere").error("lost")
    logging.getLogger("sparsetune.evaluation").info("after the command")
    assert capsys.readouterr().err == "waiting\nwarning: damaged\nerror: lost\n"


def test_what_libraries_print_does_not_reach_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with results_alone():
        print("chatter")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "chatter\n")


def test_user_s_own_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    with quiet_libraries():
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


@pytest.mark.slow
def test_libraries_take_the_environment_as_their_verbosity() -> None:
    code = (
        "from diffusers.utils import logging as a; from transformers.utils import logging as b; import tqdm\n"
        "list(tqdm.tqdm(range(3)))\n"
        "print(a.get_verbosity(), b.get_verbosity())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | QUIET_ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert (done.stdout.split(), done.stderr) == ([str(logging.ERROR)] * 2, "")
