import json

import pytest
from click.testing import CliRunner

from sparsetune.cli.main import main
from sparsetune.models.random_weights import blueprint, blueprints


def test_models_are_listed() -> None:
    printed = CliRunner().invoke(main, ["models", "--json"])
    assert printed.exit_code == 0
    rows = {row["name"]: row for row in json.loads(printed.stdout)}
    assert rows["cogvideox-2b"]["tokens"] == 17776
    # each can be built with --random-weights, or is included; those with a LoRA are of the same structure as others
    demos = {"demo", "demo-long", "demo-xl"}
    assert demos < set(rows)
    assert {blueprint(row["source"]).name for row in rows.values() if row["name"] not in demos} == set(blueprints())
    assert "hunyuanvideo" in CliRunner().invoke(main, ["models"]).stdout


def test_one_model_is_shown() -> None:
    shown = json.loads(CliRunner().invoke(main, ["models", "show", "cogvideox-2b", "--json"]).stdout)
    assert (shown["layers"], shown["token_grid"], shown["text_tokens"]) == (30, "13 x 30 x 45", 226)
    assert shown["transformer_gb"] == pytest.approx(3.39, abs=0.01)
    assert "attention share: 0.5" in CliRunner().invoke(main, ["models", "show", "cogvideox-2b"]).stdout


def test_an_unknown_model_is_one_line() -> None:
    printed = CliRunner().invoke(main, ["models", "show", "cogvideo-2b"])
    assert printed.exit_code == 2
    assert "did you mean cogvideox-2b?" in printed.stderr
