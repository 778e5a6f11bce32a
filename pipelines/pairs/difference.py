"""`dspark pairs diff`: what tells two versions apart, and whether their figures may be compared at all."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from inference.pair_files import read_pair
from pipelines.pairs import digests
from pipelines.pairs.listing import card_of, interval
from pipelines.pairs.naming import Version
from pipelines.pairs.tables import say, show, show_json, size
from pipelines.score_files import RECORDS_FILE, read_records

_FIGURES = ("speedup", "tau", "alpha")
_PARTS = ("target", "draft", "decoding", "training", "cost_profile", "lineage")
_LEFT_OUT = ("draft.files", "decoding.measured", "cost_profile.passes", "cost_profile.spread")
"""Long tables of numbers: files are compared by themselves, measurements are never the same twice."""


def compare(left: Version, right: Version) -> dict[str, Any]:
    """What differs, as plain data.

    Returns:
        `settings` (key, left, right), `scorecards` (domain, temperature, figures of both), `not_comparable` (reasons;
        empty where the figures may be compared), `files` (path, left and right size, what happened).

    Raises:
        InputError: a `pair.json` or `files.json` cannot be read.
    """
    infos = read_pair(left.folder), read_pair(right.folder)
    return {
        "left": left.label,
        "right": right.label,
        "settings": list(_settings(*infos)),
        "not_comparable": list(_not_comparable(left, right, *infos)),
        "scorecards": list(_scorecards(*infos)),
        "files": list(_files(left, right)),
    }


def _settings(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings that differ, by dotted key."""
    flat = [{k: v for part in _PARTS for k, v in _dotted(info.get(part), part)} for info in (left, right)]
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        if flat[0].get(key) != flat[1].get(key):
            yield {"key": key, "left": flat[0].get(key), "right": flat[1].get(key)}


def _dotted(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if prefix in _LEFT_OUT:
        return
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _dotted(value, f"{prefix}.{key}")
    else:
        yield prefix, node


def _not_comparable(
    left: Version, right: Version, left_info: Mapping[str, Any], right_info: Mapping[str, Any]
) -> Iterator[str]:
    """Why the figures of one say nothing about the other."""
    infos = left_info, right_info
    if len({info["target"]["digest"] for info in infos}) > 1:
        yield "other targets"
    profiles = [info.get("cost_profile", {}) for info in infos]
    if profiles[0].get("device") != profiles[1].get("device"):
        yield f"other devices ({profiles[0].get('device')}; {profiles[1].get('device')})"
    if profiles[0].get("versions") != profiles[1].get("versions"):
        yield "other library versions"
    asked = _asked(left), _asked(right)
    if None in asked:
        yield "prompts unknown: a version has no records"
    elif asked[0] != asked[1]:
        yield "other prompts or temperatures"


def _asked(version: Version) -> set[tuple[str, str, float]] | None:
    """Requests that a version was scored on; None without records."""
    records = read_records(version.folder / RECORDS_FILE)
    return {(record.domain, record.prompt_id, record.temperature) for record in records} or None


def _scorecards(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Figures of both, by domain and temperature, in the order of the first."""
    cards = [*(left.get("scorecard") or []), *(right.get("scorecard") or [])]
    for domain, temperature in dict.fromkeys((card["domain"], card["temperature"]) for card in cards):
        pair = [card_of(info, domain=domain, temperature=temperature) for info in (left, right)]
        figures = {name: [card.get(name) for card in pair] for name in _FIGURES}
        yield {"domain": domain, "temperature": temperature, **figures, "apart": _apart(*figures["speedup"])}


def _apart(left: Mapping[str, Any] | None, right: Mapping[str, Any] | None) -> bool | None:
    """Whether the intervals of two estimates share nothing; None without two intervals."""
    if left is None or right is None or None in (left["low"], left["high"], right["low"], right["high"]):
        return None
    return bool(left["high"] < right["low"] or right["high"] < left["low"])


def _files(left: Version, right: Version) -> Iterator[dict[str, Any]]:
    """Files that were added, removed or changed from the left to the right."""
    found = [_entries(version) for version in (left, right)]
    for name in sorted({*found[0], *found[1]}):
        before, after = found[0].get(name), found[1].get(name)
        if before != after:
            what = "added" if before is None else "removed" if after is None else "changed"
            sizes = [None if entry is None else entry.bytes for entry in (before, after)]
            yield {"file": name, "what": what, "left": sizes[0], "right": sizes[1]}


def _entries(version: Version) -> dict[str, digests.Entry]:
    return digests.read(version.folder) if digests.is_sealed(version.folder) else digests.take(version.folder)


def show_difference(left: Version, right: Version, *, as_json: bool) -> None:
    """Print what differs.

    Raises:
        InputError: a version cannot be read.
    """
    found = compare(left, right)
    if as_json:
        show_json(found)
        return
    header = (left.label, right.label)
    rows = [[row["key"], _word(row["left"]), _word(row["right"])] for row in found["settings"]]
    show(("setting", *header), rows, title="settings that differ")
    reasons = "; ".join(found["not_comparable"])
    say(f"\nfigures are {f'NOT comparable: {reasons}' if reasons else 'comparable: same target, device and prompts'}")
    names = [f"{figure} {side}" for figure in _FIGURES for side in ("left", "right")]
    show(("domain", "T", *names, "speedups"), [_card_row(row) for row in found["scorecards"]])
    files = [[row["what"], row["file"], _size(row["left"]), _size(row["right"])] for row in found["files"]]
    show(("", "file", *header), files, title="files that differ")


def _word(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _card_row(row: Mapping[str, Any]) -> list[str]:
    temperature = "all" if row["temperature"] is None else f"{row['temperature']:g}"
    apart = {True: "apart", False: "overlap", None: "-"}[row["apart"]]
    return [row["domain"], temperature, *(interval(one) for name in _FIGURES for one in row[name]), apart]


def _size(count: int | None) -> str:
    return "-" if count is None else size(count)
