"""What goes wrong while Hydra composes a configuration, said in one line with the nearest valid names.

It reads Hydra's own exceptions; it neither runs nor changes anything.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF, PRIMARY, VERSION_BASE = "conf", "config", "1.3"
"""Where the configuration is: the package, the primary file, and the Hydra behaviour it is written for."""

_BAD_KEY = re.compile(r"Could not override '([^']+)'")


def choices() -> dict[str, list[str]]:
    """Groups of our configuration and the choices in each, read from the files: fast, and needs no Hydra."""
    found: dict[str, list[str]] = {}

    def walk(folder: Traversable, group: str) -> None:
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith("_"):
                walk(entry, f"{group}/{entry.name}" if group else entry.name)
            elif group and entry.name.endswith(".yaml"):
                found.setdefault(group, []).append(entry.name.removesuffix(".yaml"))

    walk(files(CONF), "")
    return found


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?` for the valid names nearest to a wrong one, or nothing."""
    close = difflib.get_close_matches(name, sorted(set(valid)), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def explain(error: HydraException | OmegaConfBaseException, *, words: Sequence[str]) -> str:
    """Say in one line what Hydra found wrong.

    Args:
        error: what was raised during composition.
        words: the Hydra words of the command line, used to find the valid keys.
    """
    if isinstance(error, OverrideParseException):
        reason = _first_line(error.message)
        return f"cannot read {error.override!r} ({reason}): write key=value, and key=[a,b] for a list"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_choice(str(error.missing_cfg_file), error.options or ())
    text = str(error)
    if bad := _BAD_KEY.match(text):
        return _unknown_key(bad[1], words)
    if text.startswith("Ambiguous value"):
        word = next((w for w in words if w in text), "the value")
        return f"{word} names several values: write key=[a,b] for a list, or add -m to run once with each"
    cause = error.__cause__
    reasons = [_first_line(text), *([_first_line(str(cause))] if isinstance(cause, OmegaConfBaseException) else [])]
    return ": ".join(dict.fromkeys(filter(None, reasons))) or type(error).__name__


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _unknown_choice(missing: str, options: Sequence[str]) -> str:
    group, _, name = missing.rpartition("/")
    valid = [option for option in options if not option.startswith("base_")]
    known = choices()
    if not valid and group not in known:
        hint = nearest(group or name, known) or f"groups are {', '.join(known)}"
        return f"unknown group or file {missing!r}: {hint}"
    valid = valid or known[group]
    hint = nearest(name, valid)
    return f"{group} has no choice {name!r}: {hint + ' ' if hint else ''}there are {', '.join(valid)}"


def _unknown_key(key: str, words: Sequence[str]) -> str:
    parent, _, last = key.partition("@")[0].rpartition(".")
    keys = list(_valid_keys(words))
    ends = {valid: valid.rpartition(".") for valid in keys}
    same_end = [repr(valid) for valid, (place, _, end) in ends.items() if end == last and place != parent]
    siblings = [end for place, _, end in ends.values() if place == parent]
    if close := difflib.get_close_matches(last, siblings, n=2, cutoff=0.7):
        hint = f"did you mean {' or '.join(repr(f'{parent}.{end}' if parent else end) for end in close)}?"
    elif same_end:
        hint = f"did you mean {' or '.join(same_end[:3])}?"
    else:
        hint = nearest(key, [*keys, *choices()]) or "dspark --cfg job shows every key"
    return f"unknown key {key!r}: {hint}"


def _valid_keys(words: Sequence[str]) -> Iterator[str]:
    """Dotted keys of the configuration composed from the group choices among the words, or from none of them."""
    groups = {*choices(), "experiment"}
    picked = [word for word in words if word.partition("=")[0].lstrip("+~") in groups]
    for overrides in (picked, []):
        try:
            GlobalHydra.instance().clear()
            with initialize_config_module(CONF, version_base=VERSION_BASE):
                composed = OmegaConf.to_container(compose(PRIMARY, overrides=list(overrides)))
        except (HydraException, OmegaConfBaseException):
            continue
        yield from _dotted(composed, "")
        return


def _dotted(node: Any, prefix: str) -> Iterator[str]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield f"{prefix}{name}"
            yield from _dotted(value, f"{prefix}{name}.")
