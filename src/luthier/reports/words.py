"""Numbers, sizes, times and foreign text as a person reads them."""

from __future__ import annotations

import math
import re

_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
# Controls, and what hides or turns text round: marks of direction, widths of zero, halves of surrogate pairs.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
MISSING = "-"


def show_bytes(count: float) -> str:
    """A number of bytes as a person reads it."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def show_seconds(seconds: float) -> str:
    """A time as a person reads it."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"


def show_number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits that count, and without an exponent unless it is very small or large."""
    if value is None or not math.isfinite(value):
        return MISSING if value is None else "not finite"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 15:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    text = f"{value:,.{max(0, digits - 1 - size)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def show_signed(value: float | None, digits: int = 3) -> str:
    """The same with its sign, as differences are written."""
    text = show_number(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def show_share(part: float, whole: float) -> str:
    """A share in per cent; what is more than nothing never shows as 0 %."""
    share = part / whole if whole else 0.0
    if math.isnan(share):
        return MISSING
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{share:.0%}".replace("%", " %") if share in (0, 1) else f"{share:.1%}".replace("%", " %")


def count_of(count: int, noun: str) -> str:
    """A count and its noun: `1 row`, `2,000 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def list_words(items: list[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}" if items else ""


def clip(text: str, most: int) -> str:
    """The text, or its start and how much more there is."""
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most:,} more characters)"


def visible(text: str) -> str:
    """The text with every character that cannot be seen, or that turns what is seen around, spelled out."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text.replace("\r\n", "\n"))
