"""The JSON files of a published pair and of a draft, read and checked. Loading what they name is `inference.pair`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inference.errors import InputError

PAIR_FILE = "pair.json"
SCHEMA_VERSION = 1
DEFAULT_CACHE = Path("~/.cache/dspark")
DRAFT_FILE = "draft.json"
TREE_KEY = "tree"
"""Of a policy: the tree that greedy captured rounds propose, as `Tree.to_json` writes it."""
TREE_WHEN_SAMPLED_KEY = "tree_when_sampled"
"""Of a policy with a tree: whether sampled captured rounds propose it too; not there for no."""
_KEYS = {"target": {"path", "revision", "digest", "attention"}, "draft": set(), "decoding": {"precision", "lookahead"}}


def read_pair(folder: Path) -> dict[str, Any]:
    """Read and check `pair.json`.

    Raises:
        InputError: it is missing, malformed, or of a newer schema.
    """
    path = folder / PAIR_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            "no pair here", where=str(path), mend="point at a registry version, such as .../champion"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"pair.json is not JSON: {error}", where=str(path), mend="publish the pair again") from None
    if not isinstance(info, dict) or "schema_version" not in info:
        raise InputError("pair.json lacks keys of a pair", where=str(path), mend="publish the pair again")
    if info["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"pair.json has schema {info['schema_version']}, this code reads {SCHEMA_VERSION}",
            where=str(path),
            mend="use a matching version of dspark",
        )
    for part, keys in _KEYS.items():
        if not isinstance(info.get(part), dict) or not keys <= info[part].keys():
            raise InputError(f"pair.json lacks keys under {part!r}", where=str(path), mend="publish the pair again")
    return info


def read_draft_spec(folder: Path) -> dict[str, object]:
    """Read `draft.json`.

    Raises:
        InputError: it is missing or not a JSON object with a `kind`.
    """
    path = folder / DRAFT_FILE
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no draft here", where=str(path), mend="point at a folder that holds draft.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"draft.json is not JSON: {error}", where=str(path), mend="publish the draft again") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("kind"), str):
        raise InputError("draft.json names no kind", where=str(path), mend="publish the draft again")
    return spec


def lookahead_words(settings: Mapping[str, Any]) -> str:
    """How much a pair proposes, for people: the policy, its longest block, and the size of its tree."""
    words = f"{settings.get('kind', '-')} lookahead of {settings.get('tokens')}"
    size, when = tree_size(settings), "captured" if settings.get(TREE_WHEN_SAMPLED_KEY) else "greedy and captured"
    return f"{words}, trees of {size} when {when}" if size else words


def tree_size(settings: Mapping[str, Any]) -> int:
    """Tokens of the tree of a policy, drafted and copied; 0 without one in the form that is written now."""
    tree = settings.get(TREE_KEY)
    return len(tree["paths"]) + tree["lookup"] if isinstance(tree, dict) else 0
