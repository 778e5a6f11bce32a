"""`dspark pairs`: the words of the command line for published pairs.

    dspark pairs list
    dspark pairs export smollm2-135m/v3 s3://bucket/smollm2-135m/v3

What each of them does is in a module of its own.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from inference.errors import InputError
from inference.pair_files import DEFAULT_CACHE
from pipelines.locks import registry_lock
from pipelines.pairs.naming import Version, all_versions, check_known, find
from pipelines.pairs.tables import say
from pipelines.registry import names, roll_back

_WHERE = "a folder, an address such as s3://bucket/prefix, or hf://user/repo[@revision]"
_VERSION = "NAME, NAME/VERSION, NAME/ALIAS or a folder; NAME alone is its champion"


def main(argv: list[str]) -> int:
    """Run `dspark pairs`.

    Raises:
        InputError: no such pair, a damaged one, or a store that fails; the command line prints it.
    """
    words = _parser().parse_args(argv)
    words.registry = words.registry.expanduser()
    try:
        _DO[words.verb](words)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dspark pairs", description="Published pairs of a registry.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, what: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        made.add_argument("--registry", type=Path, default=Path("registry"), help="folder (default: registry)")
        return made

    listed = verb("list", "versions with draft, speedup, tau, target, date and size")
    listed.add_argument("name", nargs="?", help="of one pair (default: all)")
    shown = verb("show", "everything about one version")
    shown.add_argument("pair", help=_VERSION)
    diff = verb("diff", "what tells two versions apart, and whether their figures may be compared")
    diff.add_argument("left", help=_VERSION)
    diff.add_argument("right", help=_VERSION)
    for reader in (listed, shown, diff):
        reader.add_argument("--json", action="store_true", help="for programs")
    _transfers_and_care(verb)
    return parser


def _transfers_and_care(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Words of the verbs that check or change something."""
    check = verb("verify", "check every byte against what was published, the aliases and the log")
    check.add_argument("pair", nargs="?", help=_VERSION)
    check.add_argument("--all", action="store_true", help="every version, of one pair or of all")
    check.add_argument("--decode", action="store_true", help="repeat the stored requests too")
    check.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where converted models are kept")
    check.add_argument("--device", default="auto", help="to decode on: auto, cpu or cuda (default: auto)")
    clear = verb("gc", "remove old versions, but none that is in use or that a rollback needs")
    clear.add_argument("name", help="of the pair")
    clear.add_argument("--keep", type=int, default=5, help="newest versions that stay (default: 5)")
    clear.add_argument("--dry-run", action="store_true", help="only say what would go")
    back = verb("rollback", "make the champion before this one champion again")
    back.add_argument("name", help="of the pair")
    export = verb("export", "copy a version to a folder, a bucket or the Hub")
    export.add_argument("pair", help=_VERSION)
    export.add_argument("where", help=f"{_WHERE}: of this version and nothing else")
    export.add_argument("--public", action="store_true", help="make a Hub repository public (default: private)")
    bring = verb("import", "take a version in from a folder, a bucket or the Hub")
    bring.add_argument("where", help=_WHERE)
    bring.add_argument("--as", dest="name", help="name of the pair here (default: as there)")
    bring.add_argument("--champion", action="store_true", help="make it champion (default: champion stays)")


def _list(words: argparse.Namespace) -> None:
    from pipelines.pairs.listing import list_pairs

    list_pairs(words.registry, name=words.name, as_json=words.json)


def _show(words: argparse.Namespace) -> None:
    from pipelines.pairs.listing import show_pair

    show_pair(find(words.registry, words.pair), as_json=words.json)


def _diff(words: argparse.Namespace) -> None:
    from pipelines.pairs.difference import show_difference

    left, right = (find(words.registry, word) for word in (words.left, words.right))
    show_difference(left, right, as_json=words.json)


def _verify(words: argparse.Namespace) -> None:
    from pipelines.pairs.checking import verify_pairs

    verify_pairs(_chosen(words), decode=words.decode, cache=words.cache.expanduser(), device=words.device)


def _chosen(words: argparse.Namespace) -> list[Version]:
    """Versions to verify.

    Raises:
        InputError: none was named, or --all goes with one version.
    """
    if not words.all:
        if words.pair is None:
            raise InputError("which pair?", where="dspark pairs verify", mend="name one, or give --all")
        return [find(words.registry, words.pair)]
    chosen = names(words.registry) if words.pair is None else [words.pair]
    return [version for name in chosen for version in all_versions(words.registry, name)]


def _gc(words: argparse.Namespace) -> None:
    from pipelines.pairs.collection import collect

    collect(words.registry, words.name, keep=words.keep, dry_run=words.dry_run)


def _rollback(words: argparse.Namespace) -> None:
    check_known(words.registry, words.name)
    with registry_lock(words.registry):
        say(f"champion is {words.name}/{roll_back(words.registry, words.name)} again")


def _export(words: argparse.Namespace) -> None:
    from pipelines.pairs.exporting import export

    export(find(words.registry, words.pair), words.where, private=not words.public)


def _import(words: argparse.Namespace) -> None:
    from pipelines.pairs.importing import bring

    bring(words.where, words.registry, name=words.name, champion=words.champion)


_DO: dict[str, Callable[[argparse.Namespace], None]] = {
    "list": _list,
    "show": _show,
    "diff": _diff,
    "verify": _verify,
    "gc": _gc,
    "rollback": _rollback,
    "export": _export,
    "import": _import,
}
