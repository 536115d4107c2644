"""Sizes and ages as people write them: ``2 GiB``, ``7d``."""

from __future__ import annotations

import math
import re

from kvstore.errors import InputError

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kKmMgGtT]?i?[bB]?)")
_AGE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[smhdw])")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_nbytes(size: int | str) -> int:
    """``size`` in bytes: an integer, or text such as ``"500MB"`` or ``"2 GiB"``.

    ``KB`` is 1000 bytes and ``KiB`` is 1024; a letter alone (``2G``) is binary.

    Raises:
        InputError: negative, or not a size.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise InputError(f"expected a size of 0 bytes or more, found {size}")
        return size
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None:
        raise InputError(f"expected a size like 500MB or '2 GiB', found {size!r}")
    unit = match["unit"].lower()
    prefix = unit.removesuffix("b").removesuffix("i")
    base = 1000 if unit.endswith("b") and not unit.endswith("ib") else 1024
    nbytes = float(match["number"]) * base ** _POWERS[prefix]
    if not math.isfinite(nbytes):
        raise InputError(f"expected a size that a file can have, found {size!r:.80}")
    return int(nbytes)


def parse_age_seconds(age: str) -> float:
    """``age`` in seconds, from text such as ``30m``, ``12h``, ``7d`` or ``2w``.

    Raises:
        InputError: not an age.
    """
    match = _AGE.fullmatch(age.strip())
    if match is None:
        raise InputError(f"expected an age like 30m, 12h, 7d or 2w, found {age!r}")
    seconds = float(match["number"]) * _UNIT_SECONDS[match["unit"]]
    if not math.isfinite(seconds):
        raise InputError(f"expected an age like 30m, 12h, 7d or 2w, found {age!r:.80}")
    return seconds


def format_count(number: int, noun: str) -> str:
    """``number`` and its noun, in the plural where there is not exactly one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_nbytes(nbytes: int) -> str:
    """``nbytes`` for people, in binary units with three digits: ``8.85 MiB``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
