"""`dspark pairs verify`: are the files those that were published, do the aliases lead anywhere, is the log whole.

It reads every byte of the versions it is asked for and mends nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inference.errors import InputError
from inference.pair_files import PAIR_FILE, read_pair
from pipelines.pairs import digests
from pipelines.pairs.naming import Version
from pipelines.pairs.tables import say
from pipelines.registry import FILES_FILE, aliases, read_log, recorded_digest, versions

FROM_A_COPY = "put that file back from a copy, or import the version again"


def verify_pairs(chosen: list[Version], *, decode: bool, cache: Path, device: str) -> None:
    """Check versions and the registries they are in, a line each; the first fault ends it after all were looked at.

    Args:
        chosen: versions to check.
        decode: repeat the stored requests too.
        cache: where converted models are kept.
        device: to decode on: auto, cpu or cuda.

    Raises:
        InputError: anything is wrong.
    """
    faults: list[InputError] = []
    for version in chosen:
        found = version_faults(version)
        faults += found
        if found:
            say(f"{version.label}: {len(found)} fault{'s' if len(found) > 1 else ''}")
        elif decode:
            from pipelines.verify import verify  # it imports torch

            say(f"{version.label}: {verify(version.folder, cache=cache, device=device)} requests gave the same tokens")
        else:
            say(f"{version.label}: {_as_it_was(version)}")
    for root, name in dict.fromkeys((version.root, version.name) for version in chosen if version.root):
        faults += registry_faults(root, name)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(f"{faults[0].what}{more}", where=faults[0].where, mend=faults[0].mend)


def _as_it_was(version: Version) -> str:
    """What can be said of a version without faults."""
    if not digests.is_sealed(version.folder):
        return f"the draft is as it was published; the version is older than {FILES_FILE}, the rest cannot be checked"
    count = len(digests.read(version.folder))
    seal = recorded_digest(version.log(), version.name, version.version)
    return f"{count} files as they were published{'' if seal else ' (their seal is not in a log)'}"


def version_faults(version: Version) -> list[InputError]:
    """What is wrong with the files of a version."""
    try:
        recorded = recorded_digest(version.log(), version.name, version.version)
        found = digests.check(version.folder, recorded=recorded)
    except InputError as error:
        return [error]
    faults = []
    for line in found:
        name, _, what = line.partition(": ")
        mend = "move it away" if what == "was added" else FROM_A_COPY
        faults.append(
            InputError(f"a file of {version.label} {_in_words(what)}", where=str(version.folder / name), mend=mend)
        )
    return faults or list(_pair_faults(version))


def _in_words(what: str) -> str:
    return what if what.startswith(("is ", "was ", "has ")) else f"is off: {what}"


def _pair_faults(version: Version) -> Iterator[InputError]:
    """Whether `pair.json` is one, and says what folder it is in."""
    try:
        info = read_pair(version.folder)
    except InputError as error:
        yield error
        return
    said = f"{info.get('name')}/{info.get('version')}"
    if version.root and said != version.label:
        where = str(version.folder / PAIR_FILE)
        yield InputError(
            f"{PAIR_FILE} says it is {said}, not {version.label}", where=where, mend="move the folder back"
        )


def registry_faults(root: Path, name: str) -> list[InputError]:
    """What is wrong with a pair's aliases and its part of the log."""
    there = {folder.name for folder in versions(root, name)}
    pointing = aliases(root, name)
    faults = [
        InputError(f"{alias} leads to {version}, which is not there", where=str(root / name / alias), mend=_MOVE)
        for alias, version in pointing.items()
        if version not in there
    ]
    try:
        log = [entry for entry in read_log(root) if entry["pair"] == name]
    except InputError as error:
        return [*faults, error]
    return [*faults, *_log_faults(root, name, log, there=there, pointing=pointing)]


_MOVE = "dspark pairs rollback, or publish again, moves it"


def _log_faults(
    root: Path, name: str, log: list[dict[str, Any]], *, there: set[str], pointing: dict[str, str]
) -> Iterator[InputError]:
    """Entries that contradict each other or the folders."""
    where = str(root / name)
    last: dict[str, str | None] = {}
    digest: dict[str, str] = {}
    gone = {entry["version"] for entry in log if entry.get("event") == "removed"}
    for entry in log:
        version = str(entry.get("to") or entry.get("version"))
        if "alias" in entry:
            if entry.get("from") != last.get(entry["alias"]):
                what = f"the log misses a move of {entry['alias']} before {entry['time']}"
                yield InputError(what, where=where, mend="put a copy of the log back")
            last[entry["alias"]] = entry["to"]
        if entry.get("digest") and digest.setdefault(version, entry["digest"]) != entry["digest"]:
            yield InputError(f"the log has two digests of {version}", where=where, mend="put a copy of the log back")
        if version not in there | gone:
            gone.add(version)
            yield InputError(f"{version} is in the log but not there", where=where, mend="put it back, or import it")
    for alias, version in pointing.items():
        if version != last.get(alias):
            was = last.get(alias) or "never"
            yield InputError(f"{alias} leads to {version}, the log says {was}", where=where, mend=_MOVE)
