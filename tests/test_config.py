import contextlib
import re
from pathlib import Path

import pydantic
import pytest

from sparsetune.config import Config, GenerationConfig, resolve
from sparsetune.config.files import configs_folder, named_configs, read_config
from sparsetune.config.models import GATE_PRESETS, GateConfig
from sparsetune.config.resolver import config_fields
from sparsetune.errors import ConfigError, UsageError
from sparsetune.metrics import Gate
from sparsetune.models.prompts import as_prompt, load_prompts

KEY = "generation.num_inference_steps"
DEFAULT = GenerationConfig().num_inference_steps


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration of a model without a packaged configuration."""
    path = tmp_path / "own.yaml"
    path.write_text("model:\n  source: owner/own-model\ngeneration:\n  num_inference_steps: 21\n")
    return path


def steps(**given: object) -> int:
    return resolve(**({"environ": {}} | given)).generation.num_inference_steps  # type: ignore[arg-type]


def test_default_holds_where_the_file_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("model:\n  source: owner/own-model\n")
    assert steps(config=path) == DEFAULT


def test_file_beats_default(file: Path) -> None:
    assert steps(config=file) == 21 != DEFAULT


def test_environment_beats_file(file: Path) -> None:
    assert steps(config=file, environ={"SPARSETUNE_GENERATION__NUM_INFERENCE_STEPS": "22"}) == 22


def test_set_beats_environment(file: Path) -> None:
    environ = {"SPARSETUNE_GENERATION__NUM_INFERENCE_STEPS": "22"}
    assert steps(config=file, environ=environ, sets=[f"{KEY}=23"]) == 23


def test_flag_beats_set(file: Path) -> None:
    assert steps(config=file, sets=[f"{KEY}=23"], flags={KEY: 24}) == 24


def test_last_of_two_sets_wins() -> None:
    assert steps(sets=[f"{KEY}=23", f"{KEY}=25"]) == 25


def test_environment_is_the_process_s_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETUNE_GENERATION__NUM_INFERENCE_STEPS", "26")
    assert resolve().generation.num_inference_steps == 26


def test_falsy_values_count_as_given() -> None:
    config = resolve(environ={}, flags={"eval.save_videos": False, "generation.guidance_scale": 0.0})
    assert (config.eval.save_videos, config.generation.guidance_scale) == (False, 0.0)


@pytest.mark.parametrize("name", sorted(named_configs()))
def test_every_packaged_configuration_bounds_the_worst_prompt(name: str) -> None:
    gate = resolve(name, environ={}).gate
    assert gate.min_psnr_worst is not None and gate.min_psnr_worst < gate.min_psnr


def test_the_gate_of_the_settings_is_that_of_the_library() -> None:
    assert Gate(**GateConfig().bounds) == Gate()


@pytest.mark.parametrize("preset", GATE_PRESETS)
def test_a_preset_s_bounds_are_of_registered_metrics(preset: str) -> None:
    gate = Gate(**resolve(flags={"gate.preset": preset}).gate.bounds)
    assert gate.min_psnr == {"strict": 35.0, "trajectory": 25.0, "quality": 20.0}[preset]
    assert gate.metrics[2:] == {"strict": (), "trajectory": ("ssim", "lpips"), "quality": ("vmaf",)}[preset]


def test_a_preset_replaces_the_bounds_of_files_and_more_explicit_ones_stay(tmp_path: Path) -> None:
    flags = {"model.source": "wan2.1-t2v-1.3b", "gate.preset": "trajectory", "gate.min_psnr_worst": 22.0}
    gate = resolve(flags=flags).gate
    assert (gate.min_psnr, gate.min_psnr_worst, gate.min_metrics) == (25.0, 22.0, ("ssim=0.85",))
    own = tmp_path / "own.yaml"
    own.write_text("model: {source: wan2.1-t2v-1.3b}\ngate: {preset: quality, min_psnr: 24}\n")
    assert (resolve(own).gate.min_psnr, resolve(own).gate.min_metrics) == (24.0, ("vmaf=80",))
    assert resolve(own, flags={"gate.preset": "strict"}).gate.min_psnr == 35.0


def test_without_a_model_it_is_the_demo() -> None:
    config = resolve(environ={})
    demo = read_config(named_configs()["demo"])
    assert config.model.source == "demo"
    assert config.generation.num_frames == demo["generation.num_frames"]


def test_packaged_configuration_lies_below_a_file_that_names_its_model(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("generation:\n  guidance_scale: 4.5\n")
    config = resolve(path, environ={})
    assert config.generation.guidance_scale == 4.5
    assert config.generation.width == resolve("demo", environ={}).generation.width


@pytest.mark.parametrize("source", ["cogvideox-2b", "THUDM/CogVideoX-2b", "zai-org/CogVideoX-2b", "/m/CogVideoX-2b"])
def test_model_s_own_configuration_is_found_by_its_last_name(source: str) -> None:
    config = resolve(environ={}, flags={"model.source": source})
    assert config.model.name == "cogvideox-2b"
    assert config.model.source == ("zai-org/CogVideoX-2b" if source == "cogvideox-2b" else source)
    assert (config.generation.num_frames, config.generation.height, config.generation.width) == (49, 480, 720)
    assert (config.generation.num_inference_steps, config.generation.guidance_scale) == (50, 6.0)
    assert (config.model.dtype, config.model.vae_slicing, config.model.vae_tiling) == ("bfloat16", True, True)


def test_unknown_model_is_named_after_its_source() -> None:
    model = resolve(environ={}, flags={"model.source": "/models/My Model.v2"}).model
    assert (model.name, model.source) == ("My-Model.v2", "/models/My Model.v2")


def test_model_flag_leaves_out_what_the_file_says_of_its_own_model(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("model:\n  name: own\n  source: owner/own\n  revision: v7\n  dtype: float16\n")
    model = resolve(path, environ={}, flags={"model.source": "owner/other"}).model
    assert (model.name, model.source, model.revision, model.dtype) == ("other", "owner/other", None, "float16")


ODD = ("~nosuchuser/x", "1e308", "-1e308", "nan", "inf", "9" * 400, "a\0b", "\udcff", "", "null", "[", "{a: 1}", "-1")


@pytest.mark.parametrize("key", config_fields())
def test_odd_values_are_accepted_or_refused_in_a_sentence(key: str, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    for value in ODD:
        with contextlib.suppress(UsageError):
            assert resolve(tmp_path / "empty.yaml", environ={}, flags={key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cache.dir", "~nosuchuser/x", "no user has the home folder that '~nosuchuser/x' begins with; write the whole"),
        ("cache.dir", "a\0b", r"a path can't hold a NUL character, got 'a\\x00b'"),
        ("eval.prompt_file", "\ud800", "a path can't hold half a surrogate pair"),
        ("cache.max_gb", "1e308", r"cache.max_gb must be at most 2147483648, got '1e308'"),
        ("generation.negative_prompt", "\udcff", "generation.negative_prompt must be UTF-8"),
    ],
)
def test_a_value_that_nothing_can_use_is_refused(key: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(environ={}, flags={key: value})


def test_prompt_file_of_a_file_is_found_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("eval:\n  prompt_file: words.txt\n")
    assert resolve(path, environ={}).eval.prompt_file == tmp_path / "words.txt"


def test_prompt_file_of_a_flag_is_found_from_the_current_folder() -> None:
    assert resolve(environ={}, flags={"eval.prompt_file": "words.txt"}).eval.prompt_file == Path("words.txt")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("tune.max_minutes=null", None),
        ("tune.max_minutes=1.5", 1.5),
        ("model.revision=1234567", "1234567"),
        ("eval.metrics=psnr, ssim", ("psnr", "ssim")),
        ("tracking.enabled=false", False),
        ("cache.dir=/data/x", Path("/data/x")),
        ("model.offload=none", "none"),
        ("generation.negative_prompt=a=b", "a=b"),
    ],
)
def test_text_becomes_the_field_s_type(text: str, value: object) -> None:
    key = text.partition("=")[0]
    section, name = key.split(".")
    assert getattr(getattr(resolve(environ={}, sets=[text]), section), name) == value


def test_environment_names_a_setting_outside_of_sections() -> None:
    assert resolve(environ={"SPARSETUNE_BACKEND": "reference"}).backend == "reference"


def test_other_environment_variables_are_left_alone() -> None:
    assert resolve(environ={"PATH": "/bin", "SPARSE": "1"}) == resolve(environ={})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sets": ["tune.n_trial=3"]}, "unknown setting tune.n_trial (given with --set); did you mean tune.n_trials?"),
        (
            {"environ": {"SPARSETUNE_TUNE__NTRIALS": "3"}},
            "(in the environment as SPARSETUNE_TUNE__NTRIALS); did you mean tune.n_trials?",
        ),
        (
            {"flags": {"modle.source": "x"}},
            "unknown setting modle.source (given as an option); did you mean model.source?",
        ),
        ({"sets": ["zzz=1"]}, "zzz (given with --set); sections are model, generation,"),
        ({"sets": ["generation=3"]}, "unknown setting generation (given with --set)"),
        ({"sets": ["seed"]}, "--set must be KEY=VALUE, e.g. generation.num_frames=17, got 'seed'"),
        ({"sets": ["generation.fps=0"]}, "generation.fps must be greater than 0, got '0' (given with --set)"),
        ({"sets": ["tune.seed=one"]}, "tune.seed must be a valid integer"),
        ({"sets": ["model.device=gpu"]}, "model.device must match pattern"),
        ({"flags": {"backend": "fast"}}, "backend must be 'auto', 'reference', 'sparge', "),
        ({"sets": ["gate.min_psnr=nan"]}, "gate.min_psnr must be a finite number"),
        ({"config": "demoo"}, "no configuration 'demoo'; did you mean demo?"),
        ({"config": "/no/such/file.yaml"}, "no configuration '/no/such/file.yaml'"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key_and_a_remedy(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        resolve(**({"environ": {}} | given))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "is not valid YAML in line 1"),
        (b"- a\n- b\n", "must hold sections such as `model:`, got a list"),
        (b"model:\n  sorce: demo\n", "did you mean model.source?"),
        (b"\xff\xfe\x00", "cannot read "),
        (b"tune:\n  n_trials: 0\n", "tune.n_trials must be greater than 0, got 0 (in "),
    ],
)
def test_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        resolve(path, environ={})
    assert str(path) in str(caught.value)


def test_configuration_can_not_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        resolve(environ={}).generation.fps = 9  # type: ignore[misc]


@pytest.mark.parametrize("name", sorted(named_configs()))
def test_packaged_configuration_resolves_and_its_prompt_files_exist(name: str) -> None:
    config = resolve(name, environ={})
    assert config.model.name == name
    assert config.eval.prompt_file.is_file()
    assert config.tune.prompt_file.is_file()


def test_prompt_sets_are_large_and_share_no_prompt() -> None:
    sets = {}
    for name in ("tune", "eval"):
        lines = (configs_folder() / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        sets[name] = [line for line in lines if line and not line.startswith("#")]
        assert len(sets[name]) == len(set(sets[name])) >= 12
    assert not set(sets["tune"]) & set(sets["eval"])


def test_image_prompt_sets_have_their_images_and_share_no_prompt() -> None:
    """Every image is opened as the file is read."""
    sets = [load_prompts(configs_folder() / "prompts" / f"{name}-images.yaml") for name in ("tune", "eval")]
    assert all(as_prompt(prompt).image is not None for prompts in sets for prompt in prompts)
    assert not {as_prompt(prompt).text for prompt in sets[0]} & {as_prompt(prompt).text for prompt in sets[1]}


def test_a_packaged_commit_is_that_of_its_own_repository_alone() -> None:
    """A copy under another id, a fork or a folder has other commits, or none."""
    commit = "1137dacfc2c9c012bed6a0793f4ecf2ca8e7ba01"
    for source in ("cogvideox-2b", "zai-org/CogVideoX-2b"):
        assert resolve(None, (), {}, {"model.source": source}).model.revision == commit
    for source in ("THUDM/CogVideoX-2b", "/models/CogVideoX-2b", "someone/cogvideox-2b"):
        model = resolve(None, (), {}, {"model.source": source}).model
        assert (model.revision, model.name) == (None, "cogvideox-2b")
    assert resolve(None, ["model.revision=main"], {}, {"model.source": "cogvideox-2b"}).model.revision == "main"


def test_a_home_folder_is_expanded_wherever_a_path_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "own.yaml"
    path.write_text(
        "model:\n  source: ~/models/own\ntune:\n  prompt_file: ~/tune.txt\neval:\n  prompt_file: ~/eval.txt\n"
        "  output_dir: ~/out\ntracking:\n  root: ~/runs\ncache:\n  dir: ~/cache\nbreak_even: ~/table.json\n"
    )
    config = resolve("~/own.yaml", environ={})
    assert config.model.source == str(tmp_path / "models" / "own")
    assert (config.tune.prompt_file, config.eval.prompt_file) == (tmp_path / "tune.txt", tmp_path / "eval.txt")
    assert (config.eval.output_dir, config.tracking.root) == (tmp_path / "out", tmp_path / "runs")
    assert (config.cache.dir, config.break_even) == (tmp_path / "cache", tmp_path / "table.json")


def test_every_setting_is_described() -> None:
    assert all(field.description for field in config_fields().values())
    assert "gate.min_psnr" in config_fields()
    assert set(Config.model_fields) - {key.partition(".")[0] for key in config_fields()} == set()


def test_a_rule_over_several_settings_is_told_in_its_own_words() -> None:
    with pytest.raises(ConfigError, match=r"^tune.pv_l1 must exceed tune.l1, .* got 0.065 and 0.2; raise --pv-l1$"):
        resolve(None, ["tune.l1=0.2"], {}, {})


def test_what_serving_engines_take_has_other_defaults_which_settings_beat() -> None:
    tune = resolve(sets=["tune.granularity=served", "tune.rules=cdf"], environ={}).tune
    assert (tune.orders, tune.rules, tune.keep_text, tune.caches) == (("raster",), ("cdf",), "never", ("none",))
    assert not tune.select_partial
    with pytest.raises(ConfigError, match="granularity uniform needs --tuner optuna and --space budget, got calibrate"):
        resolve(sets=["tune.granularity=uniform", "tune.tuner=calibrate"], environ={})
