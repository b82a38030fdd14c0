"""Generators of the documentation's reference pages; mkdocs calls `hooks.py`."""
