"""`dspark load` by captured rounds: the same requests and answers, what the scheduler goes by, and who is refused.

On the CPU the same rounds run uncaptured.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from inference.batch.load import BATCH, CLOSED, POISSON, LoadRun, Point
from inference.errors import InputError
from pipelines import cli, load_captured
from pipelines.load import read_runs
from pipelines.stage_config import LoadConfig
from tests.pipelines.tiny import Workplace, read, run

BLOCK = 2
WORDS = (
    "draft=[none,lookup,eagle3]",
    "draft.eagle3.vocabulary=64",
    f"draft.eagle3.block={BLOCK}",
    "draft.eagle3.anchors=4",
    "draft.eagle3.taps=[0,1,2]",
    "corpus.taps=[0,1,2]",
    "load.draft=eagle3",
    "load.concurrencies=[1,3]",
    "load.lengths=[1,4]",
    "load.generate=[2]",
    "load.poisson_shares=[0.5]",
    "load.poisson_requests=3",
    "load.requests=3",
    "load.max_new_tokens=6",
    "load.max_prompt_tokens=96",
    "load.blocks=2",
    "score.validation_prompts=1",
)
ON = "load.captured=on"
ARMS = ["none", "fixed-1", "fixed-4", "scheduled"]


@pytest.fixture(scope="module")
def built(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace whose drafts are built. Read only."""
    place = tiny_place.again(tmp_path_factory.mktemp("built"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        for stage in ("corpus", "build"):
            out, code = run(place.words(*WORDS, stage=stage))
            assert code == 0, out
    return place


def _own(place: Workplace, root: Path) -> Workplace:
    """Its target and outputs, to be written to."""
    own = place.again(root)
    shutil.copytree(place.artifacts, own.artifacts)
    return own


@pytest.fixture
def place(built: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A copy to put under load."""
    monkeypatch.chdir(tmp_path)
    return _own(built, tmp_path / "place")


@pytest.fixture(scope="module")
def loaded(built: Workplace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, str]:
    """A workplace after a load by captured rounds, and what the run said. Read only."""
    place = _own(built, tmp_path_factory.mktemp("loaded") / "place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        out, code = run(place.words(*WORDS, ON, stage="load"))
    assert code == 0, out
    return place, out


def _runs(place: Workplace) -> list[LoadRun]:
    return read_runs(place.only("load") / "records.jsonl")


def _answers(runs: list[LoadRun], *, arm: str = "none") -> dict[tuple[Point, int], list[tuple[str, str]]]:
    """What target-only decoding, or another arm, wrote at every load and block."""
    return {(r.point, r.block): [(s.prompt_id, s.digest) for s in r.trace.served] for r in runs if r.arm == arm}


def test_greedy_answers_of_all_arms_are_those_of_target_only_decoding(
    loaded: tuple[Workplace, str], place: Workplace
) -> None:
    runs = _runs(loaded[0])
    points = [Point(CLOSED, 1), Point(CLOSED, 3), Point(BATCH, 2), Point(POISSON, 3, 0.5)]
    expected = [
        (point, block, arm)
        for block in (0, 1)
        for point in points
        for arm in (["none", "generate"] if point.kind == BATCH else ARMS)
    ]
    assert [(r.point, r.block, r.arm) for r in runs] == expected
    for arm in ARMS:
        mine = _answers(runs, arm=arm)
        assert mine == {key: served for key, served in _answers(runs).items() if key in mine}
    assert all(s.mismatch is None and s.tokens <= 6 for r in runs for s in r.trace.served)
    # Kernel by kernel, which is what a CPU does by itself, the requests and answers are the same.
    out, code = run(place.words(*WORDS, "load.lengths=[1]", stage="load"))
    assert code == 0 and "captured rounds" not in out, out
    assert _answers(_runs(place)) == _answers(runs)
    assert read(place.only("load") / "manifest.json")["config"]["captured"] is False
    out, code = run(place.words(*WORDS, "load.lengths=[1]", "load.captured=off", stage="load"))
    assert code == 0 and "unchanged, skipped" in out


def test_every_arm_proposes_what_it_should(loaded: tuple[Workplace, str]) -> None:
    blocks = {
        arm: {int(n) for r in _runs(loaded[0]) if r.arm == arm for s in r.trace.served for n in s.blocks}
        for arm in ARMS
    }
    # No longer than the draft's own block.
    assert (blocks["none"], blocks["fixed-1"], blocks["fixed-4"]) == ({0}, {1}, {BLOCK})
    assert blocks["scheduled"] <= set(range(BLOCK + 1))
    for one in (s for r in _runs(loaded[0]) for s in r.trace.served if r.arm != "generate"):
        assert one.passes == sum(one.blocks.values()) == len(one.emissions)
        assert one.arrival <= one.start < one.end == one.emissions[-1][0]
    for r in _runs(loaded[0]):
        trace = r.trace
        assert 0 < trace.window <= trace.elapsed and trace.window_tokens > 0
        assert 0 < trace.pass_seconds <= trace.elapsed
        if r.point.kind == CLOSED:
            assert all(one.arrival == one.start for one in trace.served)


def test_what_it_went_by_is_kept_and_told(loaded: tuple[Workplace, str]) -> None:
    folder, out = loaded[0].only("load"), loaded[1]
    page, data = (folder / "load.md").read_text(), read(folder / "load.json")
    assert f"captured rounds: target-only decoding and eagle3, blocks of up to {BLOCK} tokens" in out
    manifest = read(folder / "manifest.json")["config"]
    assert (manifest["captured"], manifest["load"]["captured"], data["captured"]) == (True, "on", True)
    # Two places are what rounds of three requests shrink to, powers of two.
    costs = read(folder / "load_captured_costs.json")["fp32"]
    assert set(costs) == {"1", "2", "3"} and all(set(row) == {"0", "1", "2"} for row in costs.values())
    assert data["costs"]["fp32"]["passes"]["3"] == {"3": costs["3"]["0"], "6": costs["3"]["1"], "9": costs["3"]["2"]}
    assert list(data["measured"]["fp32"]["costs"]["passes"].values()) == list(costs["1"].values())
    assert 1 <= len(data["measured"]["fp32"]["conditional"]) <= BLOCK
    assert not list(folder.glob("calibration*")) and not (folder / "load_costs.json").exists()
    for expected in (
        "All but `generate` went by captured rounds",
        "| 3 | scheduled | fp32 | 2 |",
        "| 2 | captured rounds | fp32 | 2 |",
        "| places | none proposed | 1 | 2 |",
        "neither into captured rounds nor into reading prompts",
    ):
        assert expected in page, expected
    assert len(data["figures"]) == 4 + 4 + 2 + 4 and (folder / "load.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_load_goes_on_by_the_seconds_it_had(
    loaded: tuple[Workplace, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _own(loaded[0], tmp_path / "place")
    monkeypatch.chdir(place.root)
    whole = place.only("load")
    partial = whole.with_name(f".partial-{whole.name}")
    partial.mkdir()
    before, lines = _runs(place), (whole / "records.jsonl").read_bytes().splitlines(keepends=True)
    (partial / "records.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:80])
    kept = ("load_plan.json", "load_captured_costs.json")
    for name in kept:
        shutil.copyfile(whole / name, partial / name)
    known = [(partial / name).read_bytes() for name in kept]
    shutil.rmtree(whole)

    def timed_again(*_: Any, **__: Any) -> None:
        raise AssertionError("seconds are measured once")

    monkeypatch.setattr(load_captured, "load_seconds", timed_again)
    out, code = run(place.words(*WORDS, ON, stage="load"))
    assert code == 0, out
    folder = place.only("load")
    again = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:4] == lines[:4] and again[4:7] != lines[4:7]
    assert _answers(_runs(place)) == _answers(before)
    assert [(folder / name).read_bytes() for name in kept] == known


def test_requests_of_several_temperatures_share_rounds(place: Workplace) -> None:
    words = ["load.temperatures=[0.0,1.0]", "load.concurrencies=[3]", "load.requests=9", "load.blocks=1"]
    out, code = run(place.words(*WORDS, *words, "load.generate=[]", "load.poisson_shares=[]", ON, stage="load"))
    assert code == 0, out
    seen = {s.temperature for r in _runs(place) for s in r.trace.served}
    assert seen == {0.0, 1.0}
    cold = [[(s.prompt_id, s.digest) for s in r.trace.served if not s.temperature] for r in _runs(place)]
    assert cold[0] and all(one == cold[0] for one in cold)


# Who is refused


def _without(others: Sequence[str], *words: str) -> list[str]:
    """Words of other keys."""
    keys = {word.partition("=")[0] for word in others}
    return [word for word in words if word.partition("=")[0] not in keys]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["load.draft=lookup"], "lookup is no draft whose rounds can be captured [load.captured]: use auto or off"),
        (["decode.top_k=5"], "decode.repetition_penalty are more than they follow [load.captured]: use auto or off"),
        (["load.captured=maybe"], "load.captured is 'maybe'; choose one of auto, on, off, in quotes in a YAML file"),
    ],
)
def test_on_refuses_in_one_line_what_cannot_be_captured(
    place: Workplace, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    own = _without(words, *WORDS, ON)
    assert cli.main(place.words(*own, *words, stage="load")) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert place.complete("load") == []


def _uncapturable(*_: Any, **__: Any) -> None:
    raise InputError("this target's layers cannot be captured", where="target", mend="decode without captured rounds")


def test_on_refuses_a_target_that_cannot_be_captured(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load_captured, "Rounds", _uncapturable)
    assert cli.main(place.words(*WORDS, ON, stage="load")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "this target's layers cannot be captured [load.captured]: use auto or off" in line


@pytest.mark.parametrize("reason", ["draft", "target"])
def test_auto_goes_kernel_by_kernel_where_it_must_and_says_why(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    # As on a CUDA device.
    monkeypatch.setattr(load_captured, "asks", lambda cfg, captured: captured != "off")
    if reason == "target":
        monkeypatch.setattr(load_captured, "Rounds", _uncapturable)
    less = ["load.concurrencies=[2]", "load.lengths=[1]", "load.generate=[]", "load.poisson_shares=[]"]
    other = ["load.draft=lookup"] if reason == "draft" else []
    words = [*_without([*less, *other], *WORDS), *less, *other]
    out, code = run(place.words(*words, stage="load"))
    assert code == 0, out
    said = {
        "draft": "no captured rounds: lookup is no draft whose rounds can be captured",
        "target": "no captured rounds: this target's layers cannot be captured",
    }
    lines = [line for line in out.splitlines() if "captured rounds" in line]
    assert len(lines) == 1 and said[reason] in lines[0]
    folder = place.only("load")
    assert read(folder / "load.json")["captured"] is False and (folder / "load_costs.json").is_file()
    # Of the target nothing is known before it is loaded.
    assert read(folder / "manifest.json")["config"]["captured"] is (reason == "target")
    # What is there does not keep `on` from being refused.
    out, code = run(place.words(*words, ON, stage="load"))
    assert code == 2 and "[load.captured]: use auto or off" in out


def test_the_word_is_one_of_three() -> None:
    assert LoadConfig().captured == "auto"
    for word in ("auto", "on", "off"):
        assert dataclasses.replace(LoadConfig(), captured=word).captured == word
    with pytest.raises(ValueError, match=r"load\.captured is 'yes'; choose one of auto, on, off"):
        LoadConfig(captured="yes")
