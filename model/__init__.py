"""The model in PyTorch: one implementation of the family, readable alone."""
