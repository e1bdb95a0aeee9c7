"""Numbers with their units, without false precision."""

from __future__ import annotations

import re


def size(num_bytes: int) -> str:
    """Bytes in decimal units, three digits."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def count(number: int) -> str:
    """A number of parameters: 12.8 B."""
    value = float(number)
    for unit in ("", " k", " M"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.4g} B"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, without false precision."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.0f} h"


def digits(value: float | None) -> str:
    """Three digits, 1.20e-4 for a small number; nothing for what is not known."""
    if value is None:
        return ""
    shown = f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"
    return re.sub(r"e([+-])0+(?=\d)", r"e\1", shown)
