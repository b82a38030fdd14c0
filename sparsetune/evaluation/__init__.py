"""Evaluation of a sparse policy against the dense model: baseline cache, run, result, comparison and report."""
