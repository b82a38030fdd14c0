"""Who is hired in the place of workers that were lost; no Ray is started for it."""

from types import SimpleNamespace

import pytest

from sparsetune.engine.ray.engine import RayEngine
from sparsetune.errors import EngineError

pytestmark = pytest.mark.slow  # Ray takes seconds to import


class Hiring(RayEngine):
    def __init__(self, *hands: object) -> None:
        self._hands, self._stillborn, self._refused, self.hired = list(hands), 0, 0, 0

    def _hire(self) -> None:
        self.hired += 1


def test_workers_that_never_load_the_model_are_not_hired_without_end() -> None:
    engine = Hiring(SimpleNamespace(loaded=True))
    for _ in range(5):
        engine._replace(SimpleNamespace(loaded=False), "its process ended")
    assert (engine.hired, engine._refused) == (2, 3)
    engine._replace(SimpleNamespace(loaded=True), "its process ended")  # one that worked is replaced again
    assert engine.hired == 3


def test_where_none_loads_the_model_the_work_ends() -> None:
    engine = Hiring()
    for _ in range(2):
        engine._replace(SimpleNamespace(loaded=False), "its process ended")
    with pytest.raises(EngineError, match="must live to load the model, but 3 in a row didn't: its process ended"):
        engine._replace(SimpleNamespace(loaded=False), "its process ended")
