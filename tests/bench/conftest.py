"""The demo model, from the fixtures of the model tests."""

from tests.models.conftest import demo, renderer, shared_demo

__all__ = ["demo", "renderer", "shared_demo"]
