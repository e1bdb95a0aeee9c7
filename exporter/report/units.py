"""Numbers as text: bytes, counts and durations with their units, and errors in three digits."""

import re


def size(num_bytes: int) -> str:
    """Bytes in decimal units: 12.8 GB."""
    return _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB"))


def count(number: int) -> str:
    """A large number in decimal units: 12.8 B for 12.8 billion."""
    return _scaled(number, ("", " k", " M", " B"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.4g}{units[-1]}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours as an integer."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.0f} h"


def digits(value: float | None) -> str:
    """Three significant digits, `1.20e-4` for a small number; empty for None."""
    if value is None:
        return ""
    text = f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"
    return re.sub(r"e([+-])0+(?=\d)", r"e\1", text)
