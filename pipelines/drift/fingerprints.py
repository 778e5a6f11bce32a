"""Digests of the parts of a target that may change on their own: tokens, and the chat template."""

import hashlib
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def fingerprints(folder: Path) -> dict[str, str]:
    """Hex SHA-256 of a model folder's `tokenizer` files and of its `chat_template`; empty where it has none.

    A template inside `tokenizer_config.json` counts with that file.
    """
    template = [name for name in TEMPLATE_FILES if (folder / name).is_file()] or ["tokenizer_config.json"]
    return {"tokenizer": _digest(folder, TOKENIZER_FILES), "chat_template": _digest(folder, template)}


def _digest(folder: Path, names: tuple[str, ...] | list[str]) -> str:
    """Of the files that are there, names included; empty where none is."""
    total = hashlib.sha256()
    there = [name for name in names if (folder / name).is_file()]
    for name in there:
        total.update(f"{name}:{hashlib.sha256((folder / name).read_bytes()).hexdigest()};".encode())
    return total.hexdigest() if there else ""
