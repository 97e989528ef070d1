"""How progress reads: one line per step with fixed columns; warnings, durations, names in texts."""

import functools
import re
import sys
from collections.abc import Sequence
from typing import Any

COLUMNS = {
    "loss": "loss {:.4f}",
    "reward": "reward {:.3f}",
    "gap": "gap {:.1e}",
    "lr": "lr {:.1e}",
    "grad_norm": "norm {:.2f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "mfu": "mfu {:.0%}",
}


def titled(name: str, arm: str) -> str:
    """What a step makes, and for which of several models."""
    return f"{name} ({arm})" if arm else name


def step_line(record: dict[str, Any]) -> str:
    """`math     | rlvr     |  12/60  | loss 0.4127 | reward 0.612 | ... | eta 1m52s`."""
    title = titled(record["name"], record.get("arm", ""))
    parts = [f"{title:<10}", f"{record['verb']:<8}"]
    width = len(str(record["steps"]))
    parts.append(f"{record['step']:>{width}}/{record['steps']}")
    parts += [form.format(record[name]) for name, form in COLUMNS.items() if name in record]
    if "eta_s" in record:
        parts.append(f"eta {duration(record['eta_s'])}")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """`45s`, `3m05s`, `2h07m`, `3d02h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


@functools.cache
def warn(text: str) -> None:
    """Told once, however often it is found."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of many names: `a, b, c and 12 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def without_keys(text: str) -> str:
    """A text without what stands before the @ of a URI: object stores take keys there."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)
