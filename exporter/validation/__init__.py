"""Validation: a graph or engine against a reference, on the same steps, with gates on every difference."""
