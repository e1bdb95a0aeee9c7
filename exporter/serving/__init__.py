"""Serve a bundle: one engine loop behind an HTTP API, Triton Inference Server or Ray Serve. No PyTorch here."""
