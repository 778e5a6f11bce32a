"""The rows of captured rounds, for one request and many, on a tiny target, uncaptured: what they measure adds up."""

import json
from pathlib import Path

import pytest
import torch

from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import make_network
from inference.feature_networks._checkpoint import save_network
from inference.loading import load_causal_model
from pipelines.bench.rows import row_names
from tests.pipelines.test_bench import benched, named, units_of, words
from tests.pipelines.tiny import Workplace, read, run

ROW = "captured_load"
BLOCK = 3


@pytest.fixture(scope="module")
def draft(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained EAGLE-3 draft of the tiny target."""
    target = load_causal_model(tiny_place.root / "target", precision="fp32", device=torch.device("cpu"))
    network = make_network(Eagle3(block=BLOCK, taps=[0, 1], vocabulary=0), target, None, seed=1)
    folder = tmp_path_factory.mktemp("eagle3")
    save_network(network, folder)
    (folder / "draft.json").write_text(json.dumps({"kind": "eagle3"}), encoding="utf-8")
    return folder


def test_nothing_is_measured_on_a_cpu(tiny_place: Workplace, tmp_path: Path) -> None:
    assert ROW in row_names()
    text, code = run(words(tiny_place, tmp_path, ROW))
    assert code == 0, text
    row = read(tmp_path / "bench.json")["rows"][ROW]
    assert row["figures"] == [] and row["notes"] == ["not run: captured rounds are for a GPU"]


def test_uncaptured_the_row_adds_up(
    tiny_place: Workplace, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.bench.bench.SEED_DRAFT", draft)
    settings = ["uncaptured=true", "concurrency=1,3", "rounds=2", "fewest=4", "turns=2", "blocks=1,0"]
    row = benched(tiny_place, tmp_path, ROW, *settings, "corpus=4", "corpus_rounds=2")
    units = units_of(row)
    loads = [unit for unit in units if "requests" in unit[0]["unit"]]
    arms = {"none", "draft-1", f"draft-{BLOCK}", "scheduled"}
    assert [unit[0]["unit"] for unit in loads] == [
        f"{count} requests, T={temperature}, block {block}"
        for count in (1, 3)
        for temperature in (0, 1)
        for block in (1, 2)
    ]
    assert all({s["arm"] for s in unit} == arms and [s["order"] for s in unit] == [0, 1, 2, 3] for unit in loads)
    # Four or six requests of at most twelve tokens; of three at once some have not ended with the window.
    assert all(0 < s["amount"] <= 12 * (4 if unit[0]["unit"][0] == "1" else 6) for unit in loads for s in unit)
    speedups = named(row, "over target-only")
    assert len(speedups) == 2 * 2 * 3
    for figure in speedups:
        mine, baseline = (figure["detail"][arm] for arm in sorted(figure["detail"], key=lambda arm: arm == "none"))
        # A round emits its own token and as many proposed ones as stand; one that ends it may cut them off.
        assert baseline["tau"] == 1.0 and baseline["depths"] == {"0": 1.0}
        assert 0.8 < mine["tau"] <= 1 + BLOCK and sum(mine["depths"].values()) == pytest.approx(1.0)
        assert mine["ms_per_token"]["p90"] >= mine["ms_per_token"]["median"] > 0
        fixed = figure["name"].split("draft-")[1][0] if "draft-" in figure["name"] else ""
        assert not fixed or list(mine["depths"]) == [fixed]
    # The ratio is of the very samples that are written beside it.
    own = [s for unit in loads for s in unit if s["unit"].startswith("3 requests, T=0")]
    speeds = {
        arm: sum(s["amount"] for s in own if s["arm"] == arm) / sum(s["seconds"] for s in own if s["arm"] == arm)
        for arm in arms
    }
    [figure] = named(row, "3 requests, T=0: scheduled over")
    assert figure["value"] == pytest.approx(speeds["scheduled"] / speeds["none"])
    assert [figure["value"] for figure in named(row, "greedy answers like")] == [100.0, 100.0]
    assert len(named(row, "corpus, 4 at once")) == 3
    corpora = [unit for unit in units if "corpus" in unit[0]["unit"]]
    assert len(corpora) == 2 and all(len(unit) == 4 and s["amount"] >= 8 for unit in corpora for s in unit)
    assert sum("ms of a round" in note for note in row["notes"]) == 4


def test_settings_that_measure_nothing_are_told(tiny_place: Workplace, tmp_path: Path) -> None:
    text, code = run(words(tiny_place, tmp_path, ROW, "rounds=0"))
    assert code == 2 and "of at least 1" in text


def test_uncaptured_the_row_of_single_requests_weighs_chains_and_trees(
    tiny_place: Workplace, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.bench.bench.SEED_DRAFT", draft)
    settings = [
        "uncaptured=true",
        "blocks=0",
        "trees=2,4",
        "tree_depth=3",
        "tree_lookup=5",
        "tree_prompts=2",
        "profile=0",
    ]
    row = benched(tiny_place, tmp_path, "captured", *settings)
    arms = [f"draft-{BLOCK}", "tree-7", "tree-9"]
    names = [figure["name"] for figure in named(row, "over target-only")]
    assert names == [
        f"{arm} over target-only, T={temperature}{what}"
        for arm in arms
        for temperature in (0, 1)
        for what in ("", ", mean of the domains")
    ]
    # The goal is held against one arm, which no held-out prompt has chosen.
    [judged] = [figure for figure in row["figures"] if figure["goal"] and "over target-only" in figure["name"]]
    milliseconds = {
        arm: next(f["value"] for f in named(row, "whole of a round") if f["name"].startswith(arm)) for arm in arms
    }
    taus = {
        note.partition(":")[0]: float(note.partition(", tau ")[2].split()[0])
        for note in row["notes"]
        if "levels" in note
    }
    assert list(taus) == arms[1:] and min(taus.values()) >= 1.0
    fastest = max(taus, key=lambda arm: taus[arm] / milliseconds[arm])
    assert judged["name"] == f"{fastest} over target-only, T=0, mean of the domains"
    [answers] = named(row, "greedy answers unlike")
    assert answers["detail"]["unexplained"] == 0
