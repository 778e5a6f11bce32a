"""A run may be killed at any moment: the same command again ends with the same pair as a run that was never disturbed.

Speeds differ from run to run, so whatever is decided by speed is fixed here, and honestly so: precision and block
length are given, no arm is screened out, and no draft of any speed may win (`select.max_draft_mib`), which makes `none`
the winner every time. All the rest (prompts, responses, weights, every arm's tokens) must be equal to the byte.
"""

import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipelines.locks import registry_lock
from tests.pipelines.forked import Runner, kill_group, wait_until_there
from tests.pipelines.tiny import Workplace, contents, read, run, token_digests
from train.memory import Took

SETTLED = (
    "draft=[none,pruned]",
    "lookahead.tokens=3",
    "select.max_draft_mib=0.001",
    "decode.max_new_tokens=10",
    "corpus.max_new_tokens=24",
    "trainer.steps=12",
)

BEGINS = {
    "plan": "",
    "corpus": "training    steps: ",
    "draft": "corpus    done",
    "score": "build     done",
    "publish": "select    done",
}
"""What a run says last before it works on a stage."""

KILLS = ("plan", "corpus", "corpus", "draft", "draft", "draft", "score", "score", "publish", "publish")
"""The stages in which the ten kills fall; the moment within the stage is drawn."""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Runs killable processes."""
    with Runner(tmp_path_factory.mktemp("runner")) as started:
        yield started


@pytest.fixture(scope="module")
def unbroken(runner: Runner, tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace after one run that nobody disturbed."""
    place = tiny_place.again(tmp_path_factory.mktemp("unbroken"))
    assert runner.run(place.words(*SETTLED)) == 0, runner.said()
    return place


def durations(place: Workplace) -> dict[str, float]:
    """Seconds of each stage of an undisturbed run, from the moments at which folders were completed."""
    names = ["plan", "corpus", "draft", "score"]
    ends = {name: max(p.stat().st_mtime for p in place.complete(name)) for name in [*names, "select"]}
    ends["publish"] = (place.registry / "events.jsonl").stat().st_mtime
    starts = {"plan": ends["plan"] - 0.05, "corpus": ends["plan"], "draft": ends["corpus"], "score": ends["draft"]}
    starts["publish"] = ends["select"]
    return {name: max(0.02, ends[name] - start) for name, start in starts.items()}


def assert_same_results(place: Workplace, expected: Workplace) -> None:
    """Everything but time and place is equal to the byte."""
    assert contents(place.only("corpus")).keys() == contents(expected.only("corpus")).keys()
    for name, content in contents(expected.only("corpus")).items():
        if name != "manifest.json":
            assert (place.only("corpus") / name).read_bytes() == content, name
    pruned = "draft/model.safetensors"
    assert (place.draft("pruned") / pruned).read_bytes() == (expected.draft("pruned") / pruned).read_bytes()
    assert token_digests(place.only("score")) == token_digests(expected.only("score"))
    assert list(token_digests(place.only("score"))) == list(token_digests(expected.only("score"))), "in the same order"


def assert_published_once(place: Workplace) -> None:
    """One version, whole, and the champion points at it; the move is in the log once."""
    shown = sorted(p.name for p in place.versions.iterdir())
    assert shown == ["champion", "v1"]
    assert place.champion.resolve() == (place.versions / "v1").resolve()
    assert read(place.champion / "pair.json")["draft"]["name"] == "none"
    assert len((place.registry / "events.jsonl").read_text().splitlines()) == 1


def test_ten_kills_at_random_moments_end_with_the_same_pair(
    runner: Runner, unbroken: Workplace, tiny_place: Workplace, tmp_path: Path
) -> None:
    """One workplace is killed again and again; where a run ends before its kill, the rest go on in a fresh one."""
    draw = random.Random(20261123)
    lasting = durations(unbroken)
    places = [tiny_place.again(tmp_path / "0")]
    kills = 0
    for stage in KILLS:
        while True:
            place = places[-1]
            process = runner.start(place.words(*SETTLED))
            if runner.wait_until_said(BEGINS[stage], process=process):
                time.sleep(draw.random() * lasting[stage])
                kill_group(process)
            if runner.end() == -9:
                kills += 1
                break
            places.append(tiny_place.again(tmp_path / str(len(places))))  # it was faster than the kill
    assert kills == len(KILLS) == 10
    for place in places:
        assert runner.run(place.words(*SETTLED)) == 0, runner.said()
        assert_same_results(place, unbroken)
        assert_published_once(place)
        assert not list(place.artifacts.glob("*/.partial-*"))


def test_a_corpus_killed_between_shards_goes_on_with_the_same_bytes(
    runner: Runner, unbroken: Workplace, tiny_place: Workplace, tmp_path: Path
) -> None:
    """Killed after each shard in turn: what a shard holds depends on its number and not on who wrote the others."""
    place = tiny_place.again(tmp_path)
    shards = sorted(p.name for p in unbroken.only("corpus").glob("shard-?????.safetensors"))
    assert len(shards) == 5  # 18 conversations, 4 a shard
    partial = place.artifacts / "corpus" / f".partial-{unbroken.only('corpus').name}"
    for shard in shards[:3]:
        process = runner.start(place.words(*SETTLED, stage="corpus"))
        assert wait_until_there(partial / shard, process=process)
        kill_group(process)
        assert runner.end() == -9
        assert not place.complete("corpus")
    written = {name: (partial / name).stat().st_mtime_ns for name in shards[:3]}
    assert runner.run(place.words(*SETTLED, stage="corpus")) == 0
    for name, when in written.items():
        assert (place.only("corpus") / name).stat().st_mtime_ns == when, "a whole shard is not written again"
    for name, content in contents(unbroken.only("corpus")).items():
        if name != "manifest.json":
            assert (place.only("corpus") / name).read_bytes() == content, name
    assert "states" in load_file(place.only("corpus") / shards[0])


def test_training_goes_on_from_its_checkpoint(
    runner: Runner, unbroken: Workplace, tiny_place: Workplace, tmp_path: Path
) -> None:
    place = tiny_place.again(tmp_path)
    shutil.copytree(unbroken.artifacts / "plan", place.artifacts / "plan")
    shutil.copytree(unbroken.artifacts / "corpus", place.artifacts / "corpus")
    checkpoints = place.artifacts / "draft" / f".partial-{unbroken.draft('pruned').name}" / "checkpoints"
    process = runner.start(place.words(*SETTLED, stage="build"))
    assert wait_until_there(checkpoints / "step-00000004", process=process)
    kill_group(process)
    assert runner.end() == -9
    assert runner.run(place.words(*SETTLED, stage="build")) == 0
    assert "resumed from step " in runner.said()
    weights = "draft/model.safetensors"
    assert (place.draft("pruned") / weights).read_bytes() == (unbroken.draft("pruned") / weights).read_bytes()
    assert not (place.draft("pruned") / "checkpoints").exists(), "they are dropped once the draft is complete"


@pytest.mark.parametrize("cut", ["in a line", "between the arms of a request"])
def test_a_request_whose_records_are_torn_is_measured_again(
    unbroken: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Workplace(tmp_path / "place", unbroken.cache)
    shutil.copytree(unbroken.root, place.root, symlinks=True)
    whole = place.only("score")
    partial = whole.with_name(f".partial-{whole.name}")
    partial.mkdir()
    lines = (whole / "records.jsonl").read_bytes().splitlines(keepends=True)
    # Two arms a request, so 8 lines are four requests; the fifth is cut.
    kept, torn = lines[:8], lines[8][:40] if cut == "in a line" else lines[8]
    (partial / "records.jsonl").write_bytes(b"".join(kept) + torn)
    shutil.copyfile(whole / "score_plan.json", partial / "score_plan.json")
    shutil.rmtree(whole)
    text, code = run(place.words(*SETTLED, stage="score"))
    assert code == 0, text
    assert_same_results(place, unbroken)
    again = (place.only("score") / "records.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:8] == kept, "whole requests keep their measured seconds"
    assert again[8:] != lines[8:], "the others were measured anew"


def test_a_run_killed_between_the_version_and_the_alias_publishes_it_once(
    unbroken: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for index, lost in enumerate((("champion", "events"), ("events",))):
        place = Workplace(tmp_path / str(index), unbroken.cache)
        shutil.copytree(unbroken.root, place.root, symlinks=True)
        (place.registry / "events.jsonl").unlink()
        if "champion" in lost:
            place.champion.unlink()
        (place.versions / ".champion.aside").symlink_to("v1")
        text, code = run(place.words(*SETTLED, stage="publish"))
        assert code == 0, text
        (place.versions / ".champion.aside").unlink(missing_ok=True)
        assert_published_once(place)
        [event] = [json.loads(line) for line in (place.registry / "events.jsonl").read_text().splitlines()]
        assert event["to"] == "v1"


def test_what_a_killed_publication_left_aside_is_cleared_away(
    unbroken: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import publish

    monkeypatch.chdir(tmp_path)
    took = asdict(Took(0.0, 0, 0, False))
    monkeypatch.setattr(publish, "_finish_in_fresh_process", lambda *_: took)  # shown elsewhere; seconds
    place = Workplace(tmp_path / "place", unbroken.cache)
    shutil.copytree(unbroken.root, place.root, symlinks=True)
    shutil.rmtree(place.registry)
    (place.versions / ".partial-v1" / "draft").mkdir(parents=True)
    (place.versions / ".partial-v1" / "draft" / "half.safetensors").write_text("half")
    text, code = run(place.words(*SETTLED, stage="publish"))
    assert code == 0, text
    assert_published_once(place)
    assert not list(place.versions.rglob("half.safetensors"))


def test_a_second_run_on_the_same_registry_ends_with_4_and_touches_nothing(
    unbroken: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(unbroken.registry / "tiny")
    with registry_lock(unbroken.registry):
        for stage in (None, "publish"):
            text, code = run(unbroken.words(*SETTLED, stage=stage))
            assert code == 4
            assert "dspark: another run holds the registry: process " in text and "paths.registry=..." in text
        text, code = run(unbroken.words(*SETTLED, stage="score"))
        assert code == 0, "stages that do not publish need no lock"
    assert contents(unbroken.registry / "tiny") == before
