"""Generators of the reference pages in the documentation; mkdocs calls `hooks.py`."""
