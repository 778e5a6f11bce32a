"""`dspark pairs list` and `show`: what is in a registry, and everything about one version. It checks no digests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inference.errors import InputError
from inference.pair_files import PAIR_FILE, lookahead_words, read_pair
from inference.statistics import OVERALL
from pipelines.pairs import digests
from pipelines.pairs.naming import Version, all_versions
from pipelines.pairs.tables import say, show, show_json, size
from pipelines.registry import names, recorded_digest

LIST_HEADER = ("pair", "aliases", "draft", "speedup", "tau", "target", "made", "size")
_DIGITS = 12
"""Of a digest, for people."""


def interval(figure: Mapping[str, Any] | None) -> str:
    """An estimate of a scorecard as `1.50 [1.36, 1.64]`."""
    if figure is None:
        return "-"
    ends = [figure["low"], figure["high"]]
    spread = "no interval" if None in ends else ", ".join(f"{end:.2f}" for end in ends)
    return f"{figure['value']:.2f} [{spread}]"


def card_of(info: Mapping[str, Any], *, domain: str = OVERALL, temperature: float | None = None) -> dict[str, Any]:
    """The scorecard of a domain at a temperature, None for all together; empty where it was not scored."""
    cards = info.get("scorecard") or []
    return next((c for c in cards if (c["domain"], c["temperature"]) == (domain, temperature)), {})


def facts(version: Version) -> dict[str, Any]:
    """One version as the list has it.

    Raises:
        InputError: its `pair.json` cannot be read.
    """
    info = read_pair(version.folder)
    try:
        card = card_of(info)
    except (TypeError, KeyError):
        raise InputError("its scorecard is none", where=str(version.folder / PAIR_FILE), mend="publish again") from None
    return {
        "pair": version.name,
        "version": version.version,
        "aliases": version.aliases,
        "draft": info["draft"].get("name"),
        "kind": info["draft"].get("kind"),
        "speedup": card.get("speedup"),
        "tau": card.get("tau"),
        "target": info["target"]["path"],
        "target_digest": info["target"]["digest"],
        "created": info.get("created"),
        "bytes": bytes_of(version.folder),
        "sealed": digests.is_sealed(version.folder),
    }


def bytes_of(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def list_pairs(root: Path, *, name: str | None, as_json: bool) -> None:
    """Print every version of a registry, or of one pair.

    Raises:
        InputError: no such pair.
    """
    chosen = [name] if name else names(root)
    found = [_facts_or_fault(version) for pair in chosen for version in all_versions(root, pair)]
    if as_json:
        show_json(found)
    elif found:
        show(LIST_HEADER, [_row(one) for one in found])
    else:
        say(f"no pairs in {root}: dspark publishes one")


def _facts_or_fault(version: Version) -> dict[str, Any]:
    try:
        return facts(version)
    except InputError as error:
        return {"pair": version.name, "version": version.version, "aliases": version.aliases, "fault": str(error)}


def _row(one: Mapping[str, Any]) -> list[str]:
    start = [f"{one['pair']}/{one['version']}", ", ".join(one["aliases"]) or "-"]
    if "fault" in one:
        return [*start, f"unreadable: {one['fault']}", *["-"] * 5]
    return [
        *start,
        _draft(one),
        interval(one["speedup"]),
        interval(one["tau"]),
        f"{one['target']} {one['target_digest'][:8]}",
        str(one["created"] or "-")[:10],
        size(one["bytes"]),
    ]


def _draft(one: Mapping[str, Any]) -> str:
    name, kind = str(one["draft"] or one["kind"]), str(one["kind"])
    return name if name == kind else f"{name} ({kind})"


def show_pair(version: Version, *, as_json: bool) -> None:
    """Print everything about one version.

    Raises:
        InputError: its `pair.json` or `files.json` cannot be read.
    """
    info = read_pair(version.folder)
    sealed = digests.is_sealed(version.folder)
    files = digests.read(version.folder) if sealed else digests.take(version.folder)
    log = [e for e in version.log() if e["pair"] == version.name and version.version in _versions_in(e)]
    recorded = recorded_digest(log, version.name, version.version)
    if as_json:
        known = {"folder": version.folder, "sealed": sealed, "recorded": recorded, "files": files, "log": log}
        show_json({**facts(version), **known, "info": info})
        return
    say(f"{version.label}  {', '.join(version.aliases)}".rstrip())
    show(("", ""), _lines(version, info, recorded=recorded, sealed=sealed))
    show(_CARD_HEADER, [_card_row(card) for card in info.get("scorecard") or []], title="measured")
    candidates = info.get("decision", {}).get("candidates", [])
    rows = [[str(c["arm"]), interval(c["speedup"]), f"{c['tau']:.2f}", c["refused"] or "yes"] for c in candidates]
    show(("draft", "speedup", "tau", "may win"), rows, title="candidates")
    show(("file", "size", "sha256"), [[n, size(e.bytes), e.sha256[:_DIGITS]] for n, e in files.items()], title="files")
    show(("time", "what", "why"), [_event_row(entry) for entry in log], title="log")


def _versions_in(entry: Mapping[str, Any]) -> list[Any]:
    return [entry.get("from"), entry.get("to"), entry.get("version")]


def _lines(version: Version, info: Mapping[str, Any], *, recorded: str | None, sealed: bool) -> list[tuple[str, str]]:
    """Single facts with their names."""
    one, decoding, lineage = facts(version), info["decoding"], info.get("lineage", {})
    code, training = lineage.get("code", {}), info.get("training", {})
    came = info.get("imported")
    seal = "none: published before there were seals" if not sealed else (recorded or "not in the log")[:_DIGITS]
    lines = [
        ("folder", str(version.folder)),
        ("made", str(one["created"])),
        ("target", f"{one['target']} {info['target']['revision']} {one['target_digest'][:_DIGITS]}"),
        ("draft", _draft(one)),
        ("chosen because", str(info.get("decision", {}).get("reason", "-"))),
        ("decoding", f"{decoding['precision']}, {lookahead_words(decoding['lookahead'])}"),
        ("measured on", str(info.get("cost_profile", {}).get("device", "-"))),
        ("training", ", ".join(f"{key} {value:,.0f}" for key, value in _numbers(training)) or "-"),
        ("made from", ", ".join(f"{k} {str(v)[:8]}" for k, v in lineage.items() if isinstance(v, str)) or "-"),
        ("code", str(code.get("commit", "-"))[:_DIGITS]),
        ("size", size(one["bytes"])),
        ("seal", seal),
    ]
    if came:
        lines.append(("imported", f"as {came['name']}/{came['version']} from {came['from']}"))
    return lines


def _numbers(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in found.items() if isinstance(value, (int, float))]


_CARD_HEADER = ("domain", "T", "requests", "tau", "alpha", "speedup", "tokens/s")


def _card_row(card: Mapping[str, Any]) -> list[str]:
    temperature = "all" if card["temperature"] is None else f"{card['temperature']:g}"
    figures = [interval(card.get(name)) for name in ("tau", "alpha", "speedup", "tokens_per_s")]
    return [str(card["domain"]), temperature, str(card["requests"]), *figures]


def _event_row(entry: Mapping[str, Any]) -> list[str]:
    what = f"{entry['alias']} -> {entry['to']}" if "alias" in entry else f"{entry['event']} {entry['version']}"
    return [str(entry["time"]), what, str(entry.get("reason") or "")]
