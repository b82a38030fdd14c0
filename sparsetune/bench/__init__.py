"""Timing of attention calls and denoising steps, dense and sparse."""
