"""`dspark bench`: ratios against what anyone could run instead, from paired and interleaved runs on this machine.

    dspark bench --rows target_only,speculative --out build/bench

Every row runs by itself; what is measured is saved after each, as `bench.json` and `bench.md`.
"""

import argparse
from pathlib import Path

from inference.errors import InputError
from inference.pair_files import DEFAULT_CACHE, read_draft_spec, read_pair
from inference.target import EMBEDDED
from pipelines.bench.options import Options
from pipelines.bench.rows import row_names, summary
from pipelines.composition import nearest


def main(argv: list[str]) -> int:
    """Run the command: 0 when every row that was asked for has run, whether its goals are met or not.

    Raises:
        InputError: an unknown row or setting, a pair or a draft that is not there, or whatever a row cannot read.
    """
    words = _parser().parse_args(argv)
    names, options = _names(words.rows), _options(words)
    changes = _changes(words.set, names)
    from pipelines.bench.running import run_rows  # after the words were read: it imports torch

    run_rows(options, names, changes, argv)
    return 0


def _parser() -> argparse.ArgumentParser:
    rows = "\n".join(f"  {name:<12} {summary(name)}" for name in row_names())
    parser = argparse.ArgumentParser(
        prog="dspark bench",
        description="Ratios from paired, interleaved runs, with bootstrap intervals and goals.",
        epilog=f"rows\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", default="", help="which, with commas (default: all)")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="of results (default: build/bench)")
    parser.add_argument("--prompts", type=int, default=12, help="most prompts of a row (default: 12)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest answer in tokens (default: 96)")
    parser.add_argument("--pair", type=Path, default=None, help="a published version, for rows that decode with one")
    parser.add_argument("--draft", type=Path, default=None, help="folder of a language model that drafts")
    parser.add_argument("--target", default="", help="folder or id (default: the pair's, or the embedded one)")
    parser.add_argument("--precision", default="auto", help="of our arms (default: what the device profile chooses)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=int, default=0, help="of the processor, for all arms (default: torch's own)")
    parser.add_argument("--prompt-file", type=Path, default=None, help="JSONL of prompts (default: held-out questions)")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where converted models are kept")
    parser.add_argument("--seed", type=int, default=0, help="of orders, draws and intervals (default: 0)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="ROW.NAME=VALUE",
        help="a setting of one row, lists with commas; may be given again",
    )
    return parser


def _names(text: str) -> list[str]:
    """The rows that are asked for.

    Raises:
        InputError: one there is not.
    """
    known = row_names()
    names = [name.strip() for name in text.split(",") if name.strip()] or known
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f"rows are {', '.join(known)}"
            raise InputError(f"unknown row {name!r}", where="--rows", mend=hint)
    return list(dict.fromkeys(names))


def _options(words: argparse.Namespace) -> Options:
    """Options, what they name looked at before anything runs.

    Raises:
        InputError: a number out of range, or no pair or no draft there.
    """
    target, revision = words.target or EMBEDDED, ""
    if words.pair is not None:
        reference = read_pair(words.pair)["target"]
        target, revision = words.target or reference["path"], reference["revision"]
    if words.draft is not None:
        read_draft_spec(words.draft)
    try:
        return Options(
            folder=words.out,
            pair=words.pair,
            draft=words.draft,
            target=target,
            revision=revision,
            precision=words.precision,
            device=words.device,
            cache=words.cache,
            prompts=words.prompts,
            prompt_file=words.prompt_file,
            max_new_tokens=words.max_new_tokens,
            threads=words.threads,
            seed=words.seed,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def _changes(words: list[str], names: list[str]) -> dict[str, dict[str, str]]:
    """Settings of rows as they are written, by row.

    Raises:
        InputError: a word that is none, or is for a row that does not run.
    """
    changes: dict[str, dict[str, str]] = {name: {} for name in names}
    for word in words:
        place, equals, value = word.partition("=")
        row, dot, key = place.partition(".")
        if not (equals and dot and key):
            raise InputError(f"cannot read {word!r}", where="--set", mend="write ROW.NAME=VALUE")
        if row not in changes:
            raise InputError(f"{row!r} is not among the rows that run", where="--set", mend=f"rows: {', '.join(names)}")
        changes[row][key] = value
    return changes
