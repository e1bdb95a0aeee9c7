"""FP8 made here: which modules, measured on which text, with which ranges."""
