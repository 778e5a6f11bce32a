"""Tables and sizes for people: drawn on a terminal, plain columns in a pipe."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipelines.files import plain

_PIPE_WIDTH = 10_000
"""Columns of a pipe: no line of a table is folded or cut there."""


_WHOLE = 2
"""Columns on the left that a narrow terminal does not fold: they name what the row is about."""


def size(count: int) -> str:
    """Bytes as people read them."""
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def show(header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "") -> None:
    """Print a table on standard output, its title alone where it has no rows."""
    rows = list(rows)
    if not rows:
        say(f"\n{title}: none" if title else "")
        return
    on_terminal = sys.stdout.isatty()
    table = Table(box=SIMPLE_HEAD if on_terminal else None, pad_edge=False, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, overflow="fold", no_wrap=not on_terminal or index < _WHOLE)
    for row in rows:
        table.add_row(*row)
    console = Console(file=sys.stdout, width=None if on_terminal else _PIPE_WIDTH, markup=False, highlight=False)
    if title:
        say(f"\n{title}")
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    sys.stdout.write("".join(f"{line if on_terminal else line.rstrip()}\n" for line in lines))


def say(line: str) -> None:
    """Print a line on standard output."""
    sys.stdout.write(f"{line}\n")


def show_json(value: Any) -> None:
    """Print JSON on standard output."""
    sys.stdout.write(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")
