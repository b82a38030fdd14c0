import sys

import pytest

from sparsetune.engine import open_engine
from sparsetune.errors import EngineError
from sparsetune.models.pipelines import demo_config


def test_ray_that_isnt_installed_is_said_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("sparsetune.engine.ray")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"must have Ray, but it isn't installed; pip install 'sparsetune\[ray\]'"):
        open_engine(demo_config({"engine.name": "ray"}))
