import subprocess
import sys

import pytest

import sparsetune

HEAVY = ("torch", "mlflow", "diffusers", "transformers", "optuna", "numpy", "pandas")

PROBE = """
import sys
{code}
print(",".join(name for name in {heavy} if name in sys.modules))
"""


def loaded_after(code: str) -> str:
    """Run code in a new interpreter; return only the heavy packages that it imported."""
    probe = PROBE.format(code=code, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "code",
    [
        "import sparsetune",
        "import sparsetune; dir(sparsetune); sparsetune.SparsetuneError",
        "import sparsetune.config; sparsetune.config.resolve(environ={})",
        "import sparsetune.cli.main",
    ],
)
def test_import_loads_nothing_heavy(code: str) -> None:
    assert loaded_after(code) == ""


@pytest.mark.parametrize("name", sorted(set(sparsetune.__all__)))
def test_public_name_is_there(name: str) -> None:
    assert getattr(sparsetune, name) is not None
    assert name in dir(sparsetune)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sparsetune' has no attribute 'tunes'"):
        sparsetune.tunes  # noqa: B018
