"""Rows run one after the other, their figures told as they come, and everything saved after each."""

import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from inference.device_profile import device_name
from inference.errors import InputError
from inference.loading import quiet_transformers
from pipelines import provenance
from pipelines.bench.bench import Bench
from pipelines.bench.options import Options
from pipelines.bench.outcome import Outcome
from pipelines.bench.report import draw, markdown
from pipelines.bench.rows import Row, load_row
from pipelines.files import plain, write_json, write_text

JSON_FILE, TABLE_FILE = "bench.json", "bench.md"
SCHEMA_VERSION = 1
_BUSY = 0.5
"""Load average above which something else runs."""


def run_rows(
    options: Options, names: Sequence[str], changes: Mapping[str, Mapping[str, str]], argv: Sequence[str]
) -> None:
    """Run rows and write `bench.json`, `bench.md` and pictures.

    Args:
        options: of the command line.
        names: of the rows, in order.
        changes: settings of rows, as written.
        argv: the command line, for the record.

    Raises:
        InputError: whatever a row cannot read.
    """
    rows = {name: load_row(name, changes[name]) for name in names}
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        bench = Bench(options)
    except ValueError as error:
        raise InputError(str(error)) from None
    head = {
        "schema_version": SCHEMA_VERSION,
        "command": shlex.join(["dspark", "bench", *provenance.redacted_argv(argv)]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(bench.device),
        "load_average": round(os.getloadavg()[0], 2),
        "provenance": provenance.collect(),
        "options": plain(options),
    }
    if os.getloadavg()[0] > _BUSY:
        sys.stderr.write(f"something else runs here (load {os.getloadavg()[0]:.1f}): figures will tremble\n")
    done: dict[str, Outcome] = {}
    seconds: dict[str, float] = {}
    for name, row in rows.items():
        began = time.monotonic()
        with _progress(), quiet_transformers():
            done[name] = row.run(bench)
        seconds[name] = round(time.monotonic() - began, 1)
        for figure in done[name].figures:
            sys.stdout.write(f"{name}: {figure.line()}\n")
        sys.stdout.flush()
        _save(options, head, rows, done, seconds)
    sys.stdout.write(f"{options.folder / JSON_FILE}, {options.folder / TABLE_FILE}\n")


def _save(
    options: Options, head: dict[str, Any], rows: dict[str, Row], done: dict[str, Outcome], seconds: dict[str, float]
) -> None:
    """Write all that is there, pictures first."""
    folder = options.folder
    for picture in [picture for outcome in done.values() for picture in outcome.pictures]:
        draw(picture, folder / f"{picture.key}.png")
    found = {
        name: {
            "settings": rows[name],
            "seconds": seconds[name],
            "figures": [figure.to_json() for figure in outcome.figures],
            "notes": outcome.notes,
            "pictures": outcome.pictures,
            "samples": outcome.samples,
        }
        for name, outcome in done.items()
    }
    write_json(folder / JSON_FILE, {**head, "rows": found})
    write_text(folder / TABLE_FILE, markdown(head, done))


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Show what our modules log, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    loggers = [logging.getLogger(room) for room in ("pipelines", "inference")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
