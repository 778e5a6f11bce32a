"""`dspark report`: the report of a published version as one HTML file, and its figures as pictures."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from inference.errors import InputError
from pipelines.files import write_text
from pipelines.registry import EVENTS_FILE

if TYPE_CHECKING:
    from pipelines.version_report.contents import Contents


def main(argv: list[str]) -> int:
    """Run the command; names the files it wrote.

    Raises:
        InputError: no version there, a price that is none, or a file that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="dspark report", description="The report of a published version as one HTML file that needs no network."
    )
    parser.add_argument("folder", type=Path, help="a version folder of a registry, or its champion")
    parser.add_argument(
        "--out", type=Path, default=None, help="file to write (default: NAME-VERSION.html in the present folder)"
    )
    parser.add_argument("--png", type=Path, default=None, help="also write every figure as PNG into this folder")
    parser.add_argument(
        "--price-per-hour", type=float, default=None, help="of the machine, in any currency (default: as it was scored)"
    )
    parser.add_argument(
        "--load", type=Path, default=None, help="folder with the load.json of a `dspark load` of this pair"
    )
    words = parser.parse_args(argv)
    from pipelines.version_report.contents import read_contents  # after the words were read: it imports much
    from pipelines.version_report.page import render

    contents = read_contents(
        words.folder.expanduser(),
        registry=_registry(words.folder.expanduser()),
        price_per_hour=_price(words.price_per_hour),
        load=words.load,
    )
    out: Path = words.out or Path(f"{contents.info.get('name', 'pair')}-{contents.info.get('version', 'report')}.html")
    write_text(out, render(contents))
    sys.stdout.write(f"{out}\n")
    if words.png is not None:
        for path in _pictures(contents, words.png):
            sys.stdout.write(f"{path}\n")
    return 0


def _price(price: float | None) -> float | None:
    if price is not None and not (math.isfinite(price) and price >= 0.0):
        raise InputError(f"a price of {price:g} an hour", where="--price-per-hour", mend="give 0 or more")
    return price


def _registry(folder: Path) -> Path | None:
    """The registry a version lies in, known by its log of moves; None for a copy elsewhere."""
    root = folder.resolve().parent.parent
    if not (root / EVENTS_FILE).is_file():
        return None
    here = Path.cwd()
    return root.relative_to(here) if root.is_relative_to(here) else root


def _pictures(contents: "Contents", folder: Path) -> list[Path]:
    """Write every figure; returns the files."""
    from pipelines.version_report.charts import charts
    from pipelines.version_report.drawing import png

    found = []
    for chart in (chart for section in charts(contents).values() for chart in section):
        path = folder / f"{chart.key}.png"
        png(chart, path)
        found.append(path)
    return found
