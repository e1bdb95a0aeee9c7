"""Executes the kernels' PTX on a CPU with NumPy and checks every access; docs/emulator.md describes it."""
