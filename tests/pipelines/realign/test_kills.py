"""kill -9 at fifty random moments of re-alignments: the registry is one valid state every time, nothing is done twice.

Speeds of a tiny target are noise, so how a cycle ends is drawn; the gate is set so that both ends come up. Whichever it
is, a run after a kill keeps to what was decided before it.
"""

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.pair_files import read_pair
from pipelines.files import sha256_file
from pipelines.realign.cycle import FOLDER, PROMOTED, history, open_cycle
from pipelines.registry import alias_target, read_events, versions
from tests.pipelines.forked import Runner, alive, kill_group
from tests.pipelines.realign.test_stage import CYCLE, DRAFT, published
from tests.pipelines.tiny import Workplace, write_model

__all__ = ["published"]

KILLS = 50
LENIENT = ("realign.gate.alpha=0.98", "realign.gate.margin=0.2", "realign.gate.useful=0.0")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Runs killable processes."""
    with Runner(tmp_path_factory.mktemp("runner")) as started:
        yield started


def fresh(published: Workplace, root: Path) -> Workplace:
    """A workplace whose target was swapped after its pair was published."""
    place = published.again(root)
    shutil.copytree(published.registry, place.registry, symlinks=True)
    write_model(root / "retrained", seed=5)
    return place


def words(place: Workplace, published: Workplace) -> list[str]:
    log = f"drift.log={published.root / 'traffic'}"
    target = f"target.path={place.root / 'retrained'}"
    return place.words(*DRAFT, "score.temperatures=[0.0]", *CYCLE, *LENIENT, log, target, stage="realign")


def assert_valid(place: Workplace) -> None:
    """What a reader may meet at this moment: whole versions, an alias to one of them, a log that can be read."""
    champion = alias_target(place.registry, "tiny", "champion")
    assert champion in {version.name for version in versions(place.registry, "tiny")}
    selected = []
    for version in versions(place.registry, "tiny"):
        info = read_pair(version)
        for name, digest in info["draft"]["files"].items():
            assert sha256_file(version / "draft" / name) == digest
        selected.append(info["lineage"]["select"])
    assert len(set(selected)) == len(selected), "nothing is published twice"
    moves = [event["to"] for event in read_events(place.registry)]
    assert len(set(moves)) == len(moves)
    assert len({one.id for one in history(place.versions)}) == len(history(place.versions)) <= 1


def assert_ended(place: Workplace) -> None:
    """One cycle, and what it says is what is there."""
    assert_valid(place)
    (ended,) = history(place.versions)
    assert open_cycle(place.versions) is None
    names = [version.name for version in versions(place.registry, "tiny")]
    if ended.outcome == PROMOTED:
        assert names == ["v1", "v2"] and ended.version == "v2"
        assert alias_target(place.registry, "tiny", "champion") == "v2"
    else:
        assert names == ["v1"]
    assert not list(place.artifacts.glob("*/.partial-*")) and not list(place.versions.glob(".partial-*"))


@pytest.mark.slow
def test_fifty_kills_leave_one_valid_state_and_one_end(runner: Runner, published: Workplace, tmp_path: Path) -> None:
    draw = random.Random(20261127)
    undisturbed = fresh(published, tmp_path / "undisturbed")
    start = time.monotonic()
    assert runner.run(words(undisturbed, published)) in (0, 3), runner.said()
    lasting = time.monotonic() - start
    assert_ended(undisturbed)
    places = [fresh(published, tmp_path / "0")]
    kills, ends = 0, set()
    while kills < KILLS:
        place = places[-1]
        process = runner.start(words(place, published))
        moment = time.monotonic() + draw.uniform(0.0, 0.6 * lasting)
        while time.monotonic() < moment and alive(process):
            time.sleep(0.002)
        if alive(process):
            kill_group(process)
        code = runner.end()
        if code == -9:
            kills += 1
            assert_valid(place)
            continue
        assert code in (0, 3), runner.said()
        assert_ended(place)
        ends.add(history(place.versions)[-1].outcome)
        places.append(fresh(published, tmp_path / str(len(places))))
    assert runner.run(words(places[-1], published)) in (0, 3), runner.said()
    assert_ended(places[-1])
    kept = json.loads((undisturbed.versions / FOLDER / "drift" / "monitor.json").read_text())
    again = json.loads((places[-1].versions / FOLDER / "drift" / "monitor.json").read_text())
    assert kept["strata"] == again["strata"]
