"""Texts that this package brings."""
