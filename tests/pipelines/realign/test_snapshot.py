"""Recent prompts are split by their text, once and for good."""

import json
from pathlib import Path

import pytest

from inference.errors import InputError
from inference.traffic import TrafficRecord, text_digest
from pipelines.artifacts import Artifact, Store
from pipelines.realign.snapshot import HELDOUT_FILE, TRAIN_FILE, is_heldout, take_snapshot, usable


def served(number: int, *, text: str | None = None, keep: bool = True, requests: int = 1) -> TrafficRecord:
    prompt = [{"role": "user", "content": text or f"question {number}"}]
    return TrafficRecord(
        id=str(number),
        time=float(number),
        pair="tiny/v1",
        target="t",
        arm="a",
        domain="maths",
        temperature=0.0,
        prompt=prompt if keep else None,
        prompt_digest=text_digest(prompt),
        response=None,
        response_digest="",
        emitted=10,
        passes=5,
        proposed=[5],
        accepted=[4],
        seconds=1.0,
        requests=requests,
    )


def texts(snapshot: Artifact, side: str) -> set[str]:
    rows = [json.loads(line) for line in (snapshot.path / side).read_text().splitlines()]
    return {row["messages"][0]["content"] for row in rows}


def take(root: Path, records: list[TrafficRecord], recent: int = 1000) -> Artifact:
    return take_snapshot(Store(root), records, recent=recent, heldout_share=0.3, where="log")


def test_no_prompt_is_on_both_sides_and_the_share_holds(tmp_path: Path) -> None:
    snapshot = take(tmp_path, [served(i) for i in range(400)])
    train, heldout = texts(snapshot, TRAIN_FILE), texts(snapshot, HELDOUT_FILE)
    assert not train & heldout and len(train | heldout) == 400
    assert 80 < len(heldout) < 160


def test_a_prompt_stays_on_its_side_when_others_come(tmp_path: Path) -> None:
    first = texts(take(tmp_path, [served(i) for i in range(50)]), HELDOUT_FILE)
    later = texts(take(tmp_path, [served(i) for i in range(100)]), HELDOUT_FILE)
    assert first <= later


def test_the_same_log_gives_the_same_artifact(tmp_path: Path) -> None:
    records = [served(i) for i in range(50)]
    assert take(tmp_path, records).digest == take(tmp_path, records[::-1]).digest


def test_a_prompt_that_is_asked_again_and_again_counts_once() -> None:
    records = [served(i, text="the same") for i in range(5)]
    assert [record.id for record in usable(records)] == ["4"]


def test_only_the_latest_are_taken(tmp_path: Path) -> None:
    snapshot = take(tmp_path, [served(i) for i in range(100)], recent=30)
    found = texts(snapshot, TRAIN_FILE) | texts(snapshot, HELDOUT_FILE)
    assert found == {f"question {i}" for i in range(70, 100)}


def test_prompts_that_were_not_kept_and_intervals_of_counters_are_no_prompts() -> None:
    assert usable([served(1, keep=False), served(2, requests=30)]) == []


def test_too_little_traffic_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few to learn from"):
        take(tmp_path, [served(i) for i in range(3)])


def test_the_side_is_a_function_of_text_and_share() -> None:
    digests = [text_digest([{"role": "user", "content": str(i)}]) for i in range(500)]
    assert all(is_heldout(d, 0.5) for d in digests if is_heldout(d, 0.2))
    assert not any(is_heldout(d, 0.0) for d in digests)
