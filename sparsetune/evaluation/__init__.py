"""Sparse video judged against dense video: the baseline cache, the run, its result, comparison and report."""
