"""What a process of its own does to a version before it gets its name: exports for engines, and the proof that nothing
but the files is needed to decode as the score did.

    python -m pipelines.finish registry/smollm2-135m/.partial-v1

Run by the publish stage; no model stays in memory there.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from inference.errors import InputError
from inference.graphed.asked import CAPTURED_OFF
from inference.pair import load_pair
from inference.pair_files import DEFAULT_CACHE
from pipelines.exports.write import SERVE_FOLDER, write_exports
from pipelines.score_files import RECORDS_FILE, read_records
from pipelines.stage_config import ALL
from pipelines.verify import read_checks, verify_loaded
from pipelines.version_report.examples import EXAMPLES_FILE, write_examples
from train.memory import Watch


def finish(folder: Path, *, exports: list[str], cache: Path, device: str = "auto") -> int:
    """Write a version's exports and verify it from its files; returns how many scored requests were repeated.

    Args:
        folder: of the version.
        exports: formats to write; `all` for those that fit, none for no `serve/`.
        cache: where converted models are kept.
        device: see `inference.target.TargetConfig`.

    Raises:
        InputError: an unknown format, or something does not decode as it was scored.
    """
    if exports:
        only = [name for name in exports if name != ALL]
        write_exports(folder, folder / SERVE_FOLDER, cache=cache, device=device, only=only)
    pair = load_pair(folder, device=device, cache=cache, captured=CAPTURED_OFF)
    count = verify_loaded(folder, pair)
    domains = {record.prompt_id: record.domain for record in read_records(folder / RECORDS_FILE)}
    write_examples(pair, read_checks(folder), folder / EXAMPLES_FILE, domains=domains)
    return count


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 when the version is whole, with what it took as JSON; 2 with one line otherwise."""
    watch = Watch()
    parser = argparse.ArgumentParser(prog="python -m pipelines.finish", description="finish a version to be published")
    parser.add_argument("folder", type=Path, help="of the version")
    parser.add_argument("--export", action="append", default=[], help="a format to write; may be given again; or all")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where converted models are kept")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    words = parser.parse_args(argv)
    try:
        count = finish(words.folder, exports=words.export, cache=words.cache.expanduser(), device=words.device)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps({"requests": count, "took": asdict(watch.took())}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
