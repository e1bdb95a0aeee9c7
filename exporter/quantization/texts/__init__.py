"""The built-in texts for calibration and evaluation."""
