"""The demo model, as the tests of models have it."""

from tests.models.conftest import demo, renderer, shared_demo

__all__ = ["demo", "renderer", "shared_demo"]
