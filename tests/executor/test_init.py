import sys

import pytest

from sparsetune.errors import ExecutorError
from sparsetune.executor import open_executor
from sparsetune.models.pipelines import demo_config


def test_ray_that_isnt_installed_is_said_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("sparsetune.executor.ray")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutorError, match=r"needs Ray, which isn't installed; pip install 'sparsetune\[ray\]'"):
        open_executor(demo_config({"engine.name": "ray"}))
