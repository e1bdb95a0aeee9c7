"""What a candidate is compared with: PyTorch, or a reference file."""
