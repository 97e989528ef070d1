"""The settings as a page for the documentation: `python -m bar_ray.reference docs/reference.md`."""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from bar_ray.cli import optional_dataclass
from bar_ray.recipe import Recipe

HEAD = """# Settings

Every setting of a recipe: in YAML, or as `key=value` on the command line. `*` marks those that say
how a step is run, not what it computes: they change no fingerprint, so nothing is run again because
of them.
"""


def page() -> str:
    """Markdown: a table per section."""
    return "\n".join([HEAD, *_section("", Recipe(), {})]) + "\n"


def _section(prefix: str, section: Any, shown_at: dict[type, str]) -> Iterator[str]:
    """The plain settings of a section as a table, then the sections below it."""
    plain, below = [], []
    for setting in fields(section):
        default = getattr(section, setting.name)
        inner = default if is_dataclass(default) else optional_dataclass(setting.type)
        (plain if inner is None else below).append((setting, default, inner))
    if plain:
        yield from ("", "| setting | default | |", "|---|---|---|")
    for setting, default, _ in plain:
        mark = "*" if setting.metadata["how"] else ""
        shown = "" if default in ("", [], {}, None) else f"`{default}`"
        doc = setting.metadata["doc"].replace("|", "\\|")
        yield f"| `{prefix}{setting.name}`{mark} | {shown} | {doc} |"
    for setting, default, inner in below:
        key = f"{prefix}{setting.name}" + (".NAME" if default == {} else "")
        level = "#" * min(2 + key.count("."), 4)
        yield from ("", f"{level} {key}", "", setting.metadata["doc"].capitalize() + ".")
        if (first := shown_at.setdefault(type(inner), key)) != key:
            yield from ("", f"As `{first}`, with defaults of its own.")
        else:
            yield from ("", type(inner).__doc__.splitlines()[0])
            yield from _section(f"{key}.", inner, shown_at)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
