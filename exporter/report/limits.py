"""The two numbers that every limit derives from."""

FP32_RELATIVE_L2 = 1e-4


FLOOR_FACTOR = 3.0
"""The worst of ten prompt batches was 2.45 times the median of the floor, so three."""
