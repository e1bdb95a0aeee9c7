"""Quantize a model to FP8: which modules, on which text, and with which scales."""
