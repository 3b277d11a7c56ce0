"""Numbers as a reader sees them. None, which is "not measured", becomes an en dash."""

from __future__ import annotations

NOT_MEASURED = "–"


def percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.1f}%"


def decimal(value: float | None) -> str:
    """Three significant digits, plain notation: 0.0123, 1.23, 123."""
    if value is None:
        return NOT_MEASURED
    if value == 0:
        return "0"
    digits = max(0, 2 - _magnitude(value))
    return f"{value:.{digits}f}" if digits < 7 else f"{value:.1e}"


def nats(value: float | None) -> str:
    """Three decimals, so that a before and an after line up; more where that would show nothing."""
    return f"{value:.3f}" if value is not None and value >= 0.01 else decimal(value)


def count(value: float | None) -> str:
    """1,234 up to a million, then 1.23 M."""
    if value is None:
        return NOT_MEASURED
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """30 ms, 0.4 s, 42 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _magnitude(value: float) -> int:
    """The power of ten of the first digit: 0 for 1.23, -2 for 0.0123."""
    return int(f"{value:.2e}".split("e")[1])
