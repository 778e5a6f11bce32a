"""`dspark engines`: load a published pair's exports in real engines and compare acceptance and speed with our own.

    dspark engines registry/smollm2-135m/champion --engine vllm --engine llama.cpp

Engines live in `.engines/`, which `make engines` makes; transformers is here already.
"""

import argparse
import sys
from pathlib import Path

from inference.pair_files import DEFAULT_CACHE
from pipelines.files import write_json

ENGINES = ("llama.cpp", "transformers", "vllm")


def main(argv: list[str]) -> int:
    """Run the command: 0 when every engine that ran accepts what we do, 1 otherwise.

    Raises:
        InputError: no pair, no exports, another target, or an engine that fails.
    """
    words = _parser().parse_args(argv)
    from pipelines.engines.compare import table  # after the words were read: these import torch
    from pipelines.engines.measure import compared

    rows = compared(words)
    sys.stdout.write(table(rows))
    if words.out:
        write_json(words.out, [row.to_json() for row in rows])
    return 0 if all(row.agrees for row in rows if row.ours is not None) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dspark engines", description="Load a pair's exports in serving engines; compare with our own decoder."
    )
    parser.add_argument("pair", help="a version folder of a registry, or its champion")
    parser.add_argument(
        "--engine", action="append", choices=ENGINES, help="may be given again (default: all that are here)"
    )
    parser.add_argument(
        "--draft", type=Path, default=None, help="folder of another draft for the same target (default: the pair's own)"
    )
    parser.add_argument("--layout", default=None, help="one format alone (default: all of the version)")
    parser.add_argument("--prompts", type=int, default=12, help="most scored prompts (default: 12)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest answer in tokens (default: 96)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--threads", type=int, default=0, help="of the processor, for every engine (default: its own)")
    parser.add_argument("--target", default=None, help="the target's folder or id here (default: as in the pair)")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where converted models are kept")
    parser.add_argument(
        "--engines", type=Path, default=None, help="what make engines made (default: .engines, or DSPARK_ENGINES)"
    )
    parser.add_argument("--work", default=None, help="keep conversions and logs here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=None, help="also write everything as JSON")
    return parser
