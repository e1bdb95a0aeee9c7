"""The ops: one folder each, the same files in each, declared once in a SPEC."""
