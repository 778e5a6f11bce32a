"""`dspark load` on the tiny workplace: every load gets its blocks, a killed one goes on, and bad input is one line."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from inference.batch.load import BATCH, CLOSED, POISSON, LoadRun, Point, Trace
from inference.statistics import BASELINE
from pipelines import cli, load_bench
from pipelines.load import arrival_rate, num_blocks, read_runs, whole_blocks
from pipelines.select import Decision
from pipelines.stage_config import LoadConfig
from tests.inference.test_batch_load import made_run
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import Workplace, read, run

WORDS = (
    "load.draft=pruned",
    "load.concurrencies=[1,2]",
    "load.lengths=[1,2]",
    "load.generate=[2]",
    "load.poisson_shares=[0.5]",
    "load.poisson_requests=3",
    "load.requests=3",
    "load.max_new_tokens=6",
    "load.blocks=2",
)
ARMS = ["none", "fixed-1", "fixed-2", "scheduled"]


def _own(place: Workplace, root: Path) -> Workplace:
    """A copy of a workplace and its outputs that may be written to."""
    shutil.copytree(place.root, root, symlinks=True)
    return Workplace(root, place.cache)


@pytest.fixture(scope="module")
def loaded(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, str]:
    """A workplace after a load, and what the run said. Read only."""
    place = _own(finished.place, tmp_path_factory.mktemp("loaded") / "place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        out, code = run(place.words(*WORDS, stage="load"))
    assert code == 0, out
    return place, out


def _said(runs: list[LoadRun]) -> list[tuple[object, ...]]:
    """What does not depend on time."""
    return [
        (r.arm, r.point, r.block, r.order, [(s.prompt_id, s.temperature, s.digest) for s in r.trace.served])
        for r in runs
    ]


def test_every_arm_of_every_load_has_its_blocks(loaded: tuple[Workplace, str]) -> None:
    runs = read_runs(loaded[0].only("load") / "records.jsonl")
    points = [Point(CLOSED, 1), Point(CLOSED, 2), Point(BATCH, 2), Point(POISSON, 2, 0.5)]
    expected = [
        (point, block, arm)
        for block in (0, 1)
        for point in points
        for arm in (["none", "generate"] if point.kind == BATCH else ARMS)
    ]
    assert [(r.point, r.block, r.arm) for r in runs] == expected
    sizes = {(r.point.kind, r.point.concurrency): len(r.trace.served) for r in runs}
    assert sizes == {(CLOSED, 1): 3, (CLOSED, 2): 4, (BATCH, 2): 2, (POISSON, 2): 3}


def test_arms_of_a_block_had_the_same_requests_and_the_same_answers(loaded: tuple[Workplace, str]) -> None:
    runs = read_runs(loaded[0].only("load") / "records.jsonl")
    blocks = {(r.point, r.block): [] for r in runs}
    for r in runs:
        blocks[r.point, r.block].append([(s.prompt_id, s.digest) for s in r.trace.served])
        assert len({s.domain for s in r.trace.served}) > 1, "domains are mixed"
        assert all(s.mismatch is None for s in r.trace.served), "in fp32 greedy answers are the same"
    for served in blocks.values():
        assert all(one == served[0] for one in served)
    orders = {tuple(r.order for r in runs if (r.point, r.block) == key) for key in blocks}
    assert len(orders) > 2, "their order is shuffled"


def test_the_page_the_data_and_the_picture_are_there(loaded: tuple[Workplace, str]) -> None:
    folder = loaded[0].only("load")
    page, data = (folder / "load.md").read_text(), read(folder / "load.json")
    for expected in (
        "# pruned under load",
        "| 2 | scheduled | fp32 | 2 |",
        "(best) | fp32 | 2 |",
        "| 2 | transformers' generate | fp32 | 2 |",
        "| 0.5 | none | 2 |",
        "| one batch of 2 | none |",
        "Is it surely slower than target-only decoding anywhere?",
    ):
        assert expected in page, expected
    assert len(data["figures"]) == 4 + 4 + 2 + 4
    assert (data["draft"], data["claims"]["loads"]) == ("pruned", [1, 2])
    assert set(data["foretold"]) == {"1", "2"}
    assert (folder / "load.png").read_bytes().startswith(b"\x89PNG")
    metrics = read(folder / "manifest.json")["metrics"]
    assert metrics["over_none"] > 0 and set(metrics["over_fixed"]) == {"1", "2"}
    assert "closed loop of 2, block 1, tokens/s: none " in loaded[1]


def test_a_load_that_is_there_is_skipped(loaded: tuple[Workplace, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(loaded[0].root)
    out, code = run(loaded[0].words(*WORDS, stage="load"))
    assert code == 0 and "unchanged, skipped" in out


@pytest.mark.parametrize("cut", ["in a line", "between the arms of a block"])
def test_a_killed_load_goes_on_with_the_same_requests(
    loaded: tuple[Workplace, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    place = _own(loaded[0], tmp_path / "place")
    monkeypatch.chdir(place.root)
    whole = place.only("load")
    partial = whole.with_name(f".partial-{whole.name}")
    partial.mkdir()
    lines = (whole / "records.jsonl").read_bytes().splitlines(keepends=True)
    # Four arms on the first load, so that four lines are its first block; the second load's is cut.
    kept, torn = lines[:4], b"".join(lines[4:6]) + (lines[6][:80] if cut == "in a line" else lines[6])
    (partial / "records.jsonl").write_bytes(b"".join(kept) + torn)
    shutil.copyfile(whole / "load_plan.json", partial / "load_plan.json")
    before = read_runs(whole / "records.jsonl")
    shutil.rmtree(whole)
    out, code = run(place.words(*WORDS, stage="load"))
    assert code == 0, out
    again = (place.only("load") / "records.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:4] == kept, "whole blocks keep their measured seconds"
    assert again[4:7] != lines[4:7], "the others were measured anew"
    assert _said(read_runs(place.only("load") / "records.jsonl")) == _said(before)


# What follows from the first blocks


def _timed(arm: str, point: Point, block: int, *, elapsed: float) -> LoadRun:
    made = made_run(arm, block, 11, point=point)
    return dataclasses.replace(made, trace=dataclasses.replace(made.trace, elapsed=elapsed))


def test_the_number_of_blocks_follows_from_what_the_first_ones_took() -> None:
    runs = [_timed(arm, Point(CLOSED, 1), 0, elapsed=10.0) for arm in ARMS]
    later = [_timed(arm, Point(CLOSED, 1), 1, elapsed=500.0) for arm in ARMS]
    # 40 s a block of everything, 4 minutes: six blocks; the second block's seconds change nothing.
    assert num_blocks(runs, LoadConfig(minutes=4.0)) == num_blocks([*runs, *later], LoadConfig(minutes=4.0)) == 6
    assert num_blocks(runs, LoadConfig(minutes=0.1)) == 2
    assert num_blocks(runs, LoadConfig(minutes=4.0, blocks=3)) == 3


def test_arrivals_come_at_a_share_of_what_target_only_decoding_serves() -> None:
    runs = [
        _timed(BASELINE, Point(CLOSED, 1), 0, elapsed=10.0),
        made_run(BASELINE, 0, 33, point=Point(CLOSED, 2)),
        made_run(BASELINE, 1, 99, point=Point(CLOSED, 2)),
        made_run("scheduled", 0, 99, point=Point(CLOSED, 2)),
    ]
    # The best first closed loop of the baseline gives 3.3 tokens a second; a request has 22 tokens in the mean.
    assert arrival_rate(runs, Point(POISSON, 2, 0.5)) == pytest.approx(0.5 * 3.3 / 22)
    assert arrival_rate(runs, Point(CLOSED, 2)) == 0.0


def test_a_block_that_lacks_an_arm_is_left_out() -> None:
    settings = LoadConfig(lengths=[1, 2])
    runs = [_timed(arm, Point(CLOSED, 1), block, elapsed=1.0) for block in (0, 1) for arm in ARMS]
    assert whole_blocks(runs, settings) == runs
    assert whole_blocks(runs[:-1], settings) == runs[:4]


def test_unexplained_greedy_output_is_refused(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _own(finished.place, tmp_path / "place")
    monkeypatch.chdir(place.root)
    closed = load_bench.closed_loop

    def wrong(engine: object, asked: object, *, concurrency: int) -> tuple[Trace, list[list[int]]]:
        trace, answers = closed(engine, asked, concurrency=concurrency)  # type: ignore[arg-type]
        if engine.lookahead.longest == 2:  # type: ignore[attr-defined]
            answers[0] = [(answers[0][0] + 1) % 250, *answers[0][1:]]
        return trace, answers

    monkeypatch.setattr(load_bench, "closed_loop", wrong)
    out, code = run(place.words(*WORDS, "load.poisson_shares=[]", "load.generate=[]", stage="load"))
    assert code == 1 and "greedy outputs under load differ where the target has no near-tie: not lossless" in out
    assert place.complete("load") == []


# Which draft


def test_by_default_it_is_the_draft_that_was_chosen(
    loaded: tuple[Workplace, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _own(loaded[0], tmp_path / "place")
    monkeypatch.chdir(place.root)
    monkeypatch.setattr("pipelines.run.read_decision", lambda _: Decision("pruned", "because", [], []))
    out, code = run(place.words(*WORDS[1:], stage="load"))
    assert code == 0 and "unchanged, skipped" in out, "it is the same load as with load.draft=pruned"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["load.draft=prund"], "no draft 'prund' in the list [load.draft]: did you mean 'pruned'?"),
        (["load.draft=xyz"], "no draft 'xyz' in the list [load.draft]: drafts of this run are lookup, pruned"),
        (["load.draft=none"], "target-only decoding is part of every load [load.draft]: name a draft"),
        (["load.concurrencies=[]"], "give at least one, and none below 1"),
        (["load.lengths=[0]"], "load.lengths is [0]; give at least one, none below 1"),
        (["load.temperatures=[-1.0]"], "load.temperatures is [-1.0]"),
        (["load.poisson_shares=[0.0]"], "load.poisson_shares is [0.0]; use shares above 0"),
        (["load.requests=0"], "load.requests is 0; use at least 1"),
        (["load.minutes=0"], "load needs minutes above 0"),
        (["load.length=3"], "unknown key 'load.length': did you mean 'load.lengths'?"),
        (["load.max_prompt_tokens=1", "load.draft=pruned"], "no validation prompt within 1 tokens [score]"),
        (["load.draft=pruned", "seed=9"], "no output of the corpus stage for this configuration"),
    ],
)
def test_bad_input_is_one_line(
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    place = _own(finished.place, tmp_path / "place")
    monkeypatch.chdir(place.root)
    assert cli.main(place.words(*words, stage="load")) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert place.complete("load") == []


def test_where_the_selection_chose_none_a_draft_must_be_named(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _own(finished.place, tmp_path / "place")
    monkeypatch.chdir(place.root)
    monkeypatch.setattr("pipelines.run.read_decision", lambda _: Decision(BASELINE, "nothing pays", [], []))
    out, code = run(place.words(stage="load"))
    assert code == 2 and "the selection chose no draft [load.draft]: name one, as in load.draft=lookup" in out


def test_several_temperatures_are_mixed_in_one_load(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _own(finished.place, tmp_path / "place")
    monkeypatch.chdir(place.root)
    words = [*WORDS, "load.temperatures=[0.0,1.0]", "load.concurrencies=[3]", "load.requests=9", "load.blocks=1"]
    out, code = run(place.words(*words, stage="load"))
    assert code == 0, out
    runs = read_runs(place.only("load") / "records.jsonl")
    seen = {(r.point.kind, s.temperature) for r in runs for s in r.trace.served}
    assert {(CLOSED, 0.0), (CLOSED, 1.0), (BATCH, 0.0)} <= seen and (BATCH, 1.0) not in seen
    assert json.loads((place.only("load") / "load.json").read_text())["figures"][0]["over_none"]["low"] is None
