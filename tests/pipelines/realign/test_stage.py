"""A whole cycle on a tiny target: what sets it off, what it leaves behind, and what the next run does.

Weights are random and speeds mean nothing, so what the gate says is fixed where a test is about what follows from it.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference.pair import load_pair
from inference.traffic import TrafficConfig, TrafficLog
from pipelines import select
from pipelines.realign import gate as gating
from pipelines.realign import stage
from pipelines.realign.cycle import FOLDER, history
from pipelines.realign.gate import GIVE_UP, KEEP, PROMOTE, Gate, Verdict
from pipelines.registry import alias_target, read_events, versions
from pipelines.select import Decision
from tests.pipelines.tiny import Workplace, read, run, write_model

DRAFT = (
    "draft=[none,eagle3]",
    "draft.eagle3.vocabulary=64",
    "draft.eagle3.block=3",
    "draft.eagle3.anchors=4",
    "draft.eagle3.taps=[0,1,2]",
    "corpus.taps=[0,1,2]",
    "lookahead.tokens=2",
    "decode.max_new_tokens=8",
)
CYCLE = (
    "realign.responses=16",
    "realign.cause_prompts=2",
    "realign.gate.max_prompts=3",
    "realign.cooldown_hours=0",
    "score.decode_best=1",  # a gate measures both of its drafts whatever a score would leave out
)


@pytest.fixture(scope="session")
def published(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace whose champion is a trained draft, with a log of forty requests. Read only."""
    place = tiny_place.again(tmp_path_factory.mktemp("published"))

    def chosen(*_: Any, **__: Any) -> Decision:
        return Decision("eagle3", "for the test", [], [])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        patch.setattr(select, "decide", chosen)
        patch.setattr("pipelines.run._speedup_of", lambda decision: 1.0)
        out, code = run(place.words(*DRAFT, "score.temperatures=[0.0]"))
    assert code == 0, out
    serve(place, place.root / "target", place.root / "traffic")
    return place


@pytest.fixture
def place(published: Workplace, tmp_path: Path) -> Workplace:
    """A copy of that workplace for one test."""
    copy = published.again(tmp_path)
    shutil.copytree(published.registry, copy.registry, symlinks=True)
    shutil.copytree(published.root / "traffic", tmp_path / "traffic")
    return copy


def serve(place: Workplace, target: Path, log: Path, *, count: int = 40) -> None:
    """Answer prompts with the champion, whatever the target."""
    pair = load_pair(place.champion, target=str(target), device="cpu", cache=place.cache, other_target=True)
    traffic = TrafficLog(log, config=TrafficConfig())
    for number in range(count):
        text = f"{number} what is {number * 7919 % 101} and {number * 104729 % 997}"
        domain = ("chat", "maths")[number % 2]
        pair.generate(text, max_new_tokens=6, traffic=traffic, domain=domain, request_id=f"{log.name}-{number}")


def realign(place: Workplace, *more: str, target: Path | None = None, name: str = "realign") -> tuple[str, int]:
    """One `dspark realign`."""
    words = [f"drift.log={place.root / 'traffic'}", *CYCLE, *more]
    if target is not None:
        words.append(f"target.path={target}")
    return run(place.words(*DRAFT, "score.temperatures=[0.0]", *words, stage=name))


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Verdict]]:
    """What the gate says after two prompts; a test puts it in."""
    said: list[Verdict] = []

    def decide(self: Gate) -> Verdict | None:
        return said[0] if len(self.looks) >= 2 else None

    monkeypatch.setattr(gating.Gate, "_decide", decide)
    yield said


def swapped(place: Workplace) -> Path:
    """Another target of the same shape."""
    return write_model(place.root / "retrained", seed=5)


def test_without_drift_there_is_nothing_to_do(place: Workplace) -> None:
    text, code = realign(place, "drift.tolerance=0.5")
    assert code == 0 and "nothing to do: v1 is as it was published" in text
    assert not (place.artifacts / "gate").exists()


def test_a_changed_target_is_noticed_retrained_for_and_promoted_and_then_there_is_nothing_to_do(
    place: Workplace, verdicts: list[Verdict]
) -> None:
    verdicts.append(Verdict(PROMOTE, "faster, says the test"))
    target = swapped(place)
    text, code = realign(place, target=target)
    assert code == 0, text
    assert "the target has changed" in text and "cause: " in text
    assert alias_target(place.registry, "tiny", "champion") == "v2"
    pair = load_pair(place.champion, device="cpu", cache=place.cache)
    assert pair.generate("why", max_new_tokens=4).decoded.tokens
    info = read(place.champion / "pair.json")
    assert info["draft"]["kind"] == "eagle3" and info["training"]["went_on_from"] == "v1"
    (ended,) = history(place.versions)
    assert (ended.outcome, ended.champion, ended.version) == ("promoted", "v1", "v2")
    assert ended.figures["cause"] and ended.figures["token_share"] > 0
    text, code = realign(place, target=target)
    assert code == 0 and "nothing to do: v2 is as it was published" in text
    assert len(history(place.versions)) == 1


@pytest.mark.parametrize("outcome", [KEEP, GIVE_UP])
def test_a_challenger_that_is_not_better_leaves_the_champion_and_ends_with_three(
    place: Workplace, verdicts: list[Verdict], outcome: str
) -> None:
    verdicts.append(Verdict(outcome, "not better, says the test"))
    text, code = realign(place, "realign.force=true")
    assert code == 3 and "re-alignment kept v1 [tiny]: not better, says the test" in text
    assert [v.name for v in versions(place.registry, "tiny")] == ["v1"]
    assert len(read_events(place.registry)) == 1
    text, code = realign(place, "realign.force=true", "realign.cooldown_hours=1")
    assert code == 0 and "nothing done: the last cycle ended" in text
    assert len(history(place.versions)) == 1


def test_after_two_failures_the_challenger_starts_from_new_weights(place: Workplace, verdicts: list[Verdict]) -> None:
    verdicts.append(Verdict(KEEP, "no"))
    for _ in range(2):
        assert realign(place, "realign.force=true")[1] == 3
        # A cycle's identity is its prompts and its second: the next one is another.
        lines = (place.versions / FOLDER / "history.jsonl").read_text().splitlines()
        moved = [json.loads(line) | {"id": f"past-{i}"} for i, line in enumerate(lines)]
        (place.versions / FOLDER / "history.jsonl").write_text("".join(json.dumps(m) + "\n" for m in moved))
    text, code = realign(place, "realign.force=true")
    assert code == 3 and "starts from new weights: 2 cycles in a row ended without promotion" in text


def test_the_challenger_goes_on_from_the_champion_within_its_share_of_tokens(
    place: Workplace, verdicts: list[Verdict]
) -> None:
    verdicts.append(Verdict(KEEP, "no"))
    text, _ = realign(place, "realign.force=true", "trainer.steps=50", "realign.token_share=2")
    first = read(place.champion / "pair.json")["training"]
    (ended,) = history(place.versions)
    assert "no more than 200 % of the first training's tokens" in text
    assert ended.figures["tokens"] <= 3 * first["tokens"]
    trained = [read(path)["settings"] for path in (place.artifacts / "draft").glob("*/draft/config.json")]
    assert "champion" in {settings["start_from"] for settings in trained}


def test_another_run_holds_the_registry(place: Workplace) -> None:
    from pipelines.locks import registry_lock

    with registry_lock(place.registry):
        text, code = realign(place, "realign.force=true")
    assert code == 4 and "another run holds the registry: process" in text and "min)" in text


def test_without_a_champion_it_says_so(place: Workplace) -> None:
    (place.versions / "champion").unlink()
    text, code = realign(place)
    assert code == 2 and "no champion to re-align" in text


def test_too_little_traffic_is_said_and_nothing_begins(place: Workplace) -> None:
    segment = next((place.root / "traffic").glob("traffic-*.jsonl"))
    segment.write_text("\n".join(segment.read_text().splitlines()[:3]) + "\n")
    text, code = realign(place, "realign.force=true")
    assert code == 2 and "too few to learn from and to judge by" in text
    assert not (place.versions / FOLDER / "cycle.json").exists()


def test_a_log_that_is_not_there_is_named(place: Workplace) -> None:
    shutil.rmtree(place.root / "traffic")
    text, code = realign(place)
    assert code == 2 and "no traffic log here" in text


def test_a_log_of_another_target_raises_no_alarm_of_acceptance(place: Workplace) -> None:
    shutil.rmtree(place.root / "traffic")
    serve(place, swapped(place), place.root / "traffic")
    text, code = realign(place, "drift.threshold=1.5", "drift.tolerance=0")
    assert code == 0 and "nothing to do" in text and "not counted: 40 requests" in text


def test_a_torn_log_is_read_as_far_as_it_goes(place: Workplace) -> None:
    segment = next((place.root / "traffic").glob("traffic-*.jsonl"))
    segment.write_bytes(segment.read_bytes()[:-9])
    text, code = realign(place, "drift.tolerance=0.5", name="drift")
    assert code == 0 and "could not be read" in text


def test_rolling_back_is_one_command(place: Workplace, verdicts: list[Verdict]) -> None:
    verdicts.append(Verdict(PROMOTE, "yes"))
    assert realign(place, "realign.force=true")[1] == 0
    text, code = realign(place, name="rollback")
    assert code == 0 and alias_target(place.registry, "tiny", "champion") == "v1", text
    text, code = realign(place, name="rollback")
    assert code == 2 and "no champion before this one" in text


def test_a_killed_end_is_ended_once(place: Workplace, verdicts: list[Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the history was written and before the cycle was forgotten."""
    verdicts.append(Verdict(PROMOTE, "yes"))
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.realign.cycle.abandon", lambda pair: (_ for _ in ()).throw(KeyboardInterrupt))
        assert realign(place, "realign.force=true")[1] == 130
    assert (place.versions / FOLDER / "cycle.json").exists()
    assert realign(place, "drift.tolerance=0.5")[1] == 0
    assert len(history(place.versions)) == 1 and [v.name for v in versions(place.registry, "tiny")] == ["v1", "v2"]
    assert not (place.versions / FOLDER / "cycle.json").exists()


@pytest.mark.parametrize("place_of_write", ["measure.write_results", "cycle.write_text", "snapshot.write_text"])
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    place: Workplace, verdicts: list[Verdict], monkeypatch: pytest.MonkeyPatch, place_of_write: str
) -> None:
    verdicts.append(Verdict(PROMOTE, "yes"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(f"pipelines.realign.{place_of_write}", full)
        text, code = realign(place, "realign.force=true")
    assert code == 2 and "no space left on the disk" in text
    text, code = realign(place, "realign.force=true")
    assert code == 0, text
    assert [v.name for v in versions(place.registry, "tiny")] == ["v1", "v2"] and len(history(place.versions)) == 1


def test_it_pays_only_where_it_saves_more_than_it_costs() -> None:
    from dataclasses import replace

    from pipelines.config import BudgetConfig
    from pipelines.realign.config import RealignConfig
    from tests.pipelines.realign.test_snapshot import served

    class Config:
        budget = BudgetConfig(corpus_minutes=1, training_minutes=1, score_minutes=1)
        realign = RealignConfig(horizon_days=1)

    info = {
        "name": "tiny",
        "version": "v1",
        "scorecard": [{"domain": "overall", "temperature": None, "tau": {"value": 4.0}}],
    }
    # A second a request for a hundred seconds, tau 2 where 4 was published: half of a busy day would be saved.
    records = [replace(served(i), time=float(i), seconds=1.0) for i in range(101)]
    saved, cost = stage.expected_saving(info, records, Config)  # type: ignore[arg-type]
    assert cost == 180.0
    assert saved == pytest.approx(101 / 100 * 86_400 * 0.5)
    better = [replace(record, emitted=25) for record in records]
    assert stage.expected_saving(info, better, Config)[0] == 0.0  # type: ignore[arg-type]
