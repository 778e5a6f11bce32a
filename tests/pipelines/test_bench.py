"""`dspark bench` on a tiny target: every row runs by itself and writes what it found; wrong words are told."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from inference.errors import InputError
from inference.loading import load_causal_model
from inference.pair_files import read_draft_spec
from pipelines import cli
from pipelines.bench import rows
from pipelines.bench.rows.speculative import write_cut_draft
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import LAYERS, Workplace, read, run

ROWS = ("corpus", "growth", "overhead", "speculative", "startup", "target_only", "training")


def words(place: Workplace, out: Path, row: str, *more: str) -> list[str]:
    """The command line of a row that takes seconds."""
    return [
        *("bench", "--rows", row, "--out", str(out), "--target", str(place.root / "target")),
        *("--prompt-file", str(place.root / "chat.jsonl"), "--cache", str(place.cache), "--precision", "fp32"),
        *("--prompts", "3", "--max-new-tokens", "12"),
        *(word for setting in more for word in ("--set", f"{row}.{setting}")),
    ]


def benched(place: Workplace, out: Path, row: str, *more: str) -> dict[str, Any]:
    """Run a row; returns what it wrote of it, after looking at what every row has in common."""
    text, code = run(words(place, out, row, *more))
    assert code == 0, text
    data = read(out / "bench.json")
    assert data["device"] and data["command"].startswith("dspark bench --rows") and data["provenance"]["packages"]
    assert set(data["rows"]) == {row}
    found: dict[str, Any] = data["rows"][row]
    table = (out / "bench.md").read_text(encoding="utf-8")
    for figure in found["figures"]:
        assert f"{row}: {figure['name']}: " in text and f"| {figure['name']} |" in table
        assert (figure["met"] is None) == (figure["goal"] is None)
        assert figure["goal"] is None or "goal " in text
    assert found["samples"] and all((out / f"{p['key']}.png").stat().st_size > 1000 for p in found["pictures"])
    return found


def named(row: dict[str, Any], text: str) -> list[dict[str, Any]]:
    return [figure for figure in row["figures"] if text in figure["name"]]


def units_of(row: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Samples by unit, in the order they were taken."""
    units: dict[str, list[dict[str, Any]]] = {}
    for sample in row["samples"]:
        units.setdefault(sample["unit"], []).append(sample)
    assert [s for unit in units.values() for s in unit] == row["samples"], "all arms of a unit before the next"
    return list(units.values())


def test_target_only(tiny_place: Workplace, tmp_path: Path) -> None:
    row = benched(tiny_place, tmp_path, "target_only")
    units = units_of(row)
    arms = {"dspark", "transformers", "transformers on our model"}
    assert len(units) == 3 and all({s["arm"] for s in unit} == arms for unit in units)
    [ratio, own] = named(row, "tokens/s over")
    assert ratio["goal"] == {"bound": 1.2, "at_least": True} and own["goal"] is None
    # The ratio is of the very samples that are written beside it; answers are as long, so tokens cancel out.
    seconds = {arm: sum(s["seconds"] for unit in units for s in unit if s["arm"] == arm) for arm in arms}
    if "fp32" in ratio["name"]:
        assert ratio["value"] == pytest.approx(seconds["transformers"] / seconds["dspark"])
    assert own["value"] == pytest.approx(seconds["transformers on our model"] / seconds["dspark"])
    [same] = named(row, "unlike those of transformers on our model")
    assert same["detail"] == {"same": 3, "near_ties": 0, "unexplained": 0} and same["met"]


def test_speculative(tiny_place: Workplace, tmp_path: Path) -> None:
    row = benched(tiny_place, tmp_path, "speculative", "drop=1", "tokens=3", "exact_prompts=2")
    assert [f["goal"] is not None for f in named(row, "tokens/s over")] == [True, False] * 2
    assert {name.partition(":")[0] for name in (f["name"] for f in named(row, "tokens/s"))} == {"T=0", "T=1"}
    [exact] = named(row, "both in fp32")
    assert exact["value"] == 0 and exact["met"]
    [greedy] = named(row, "T=0: tokens/s over transformers on our model")
    # Layers 0 and 2 say the same as all three now and then, under both loops alike.
    per_pass = [arm["tokens_per_pass"] for arm in greedy["detail"].values()]
    assert all(1.0 < value < 4.0 for value in per_pass) and per_pass[0] == pytest.approx(per_pass[1], rel=0.2)
    assert any("layers 0, 2, untrained" in note for note in row["notes"])


def test_a_cut_draft_keeps_the_outer_layers(tiny_place: Workplace, tmp_path: Path) -> None:
    assert write_cut_draft(tiny_place.root / "target", tmp_path / "draft", drop=1) == [0, 2]
    assert read_draft_spec(tmp_path / "draft") == {"kind": "model"}
    config = json.loads((tmp_path / "draft" / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == 2
    with pytest.raises(InputError, match=f"cannot drop {LAYERS} of {LAYERS} layers"):
        write_cut_draft(tiny_place.root / "target", tmp_path / "none", drop=LAYERS)


def test_speculative_with_a_draft_of_ones_own(tiny_place: Workplace, tmp_path: Path) -> None:
    write_cut_draft(tiny_place.root / "target", tmp_path / "mine", drop=1)
    line = words(tiny_place, tmp_path / "out", "speculative", "temperatures=0", "exact_prompts=0")
    text, code = run([*line, "--draft", str(tmp_path / "mine")])
    assert code == 0, text
    assert any(
        "the draft is mine" in note for note in read(tmp_path / "out/bench.json")["rows"]["speculative"]["notes"]
    )
    (tmp_path / "mine" / "draft.json").write_text('{"kind": "lookup"}', encoding="utf-8")
    text, code = run([*line, "--draft", str(tmp_path / "mine")])
    assert code == cli.BAD_INPUT and "not by 'lookup'" in text


def test_corpus(tiny_place: Workplace, tmp_path: Path) -> None:
    row = benched(tiny_place, tmp_path, "corpus", "batches=2,4", "rounds=2", "pool=2")
    units = units_of(row)
    assert [unit[0]["unit"] for unit in units] == [f"batch {b}, round {r}" for b in (2, 4) for r in (1, 2)]
    arms = {"the corpus stage", "the same, states kept", "transformers"}
    assert all({s["arm"] for s in unit} == arms for unit in units)
    # Every prompt has an answer of one token at least and twelve at most; a pool is twice its batch.
    for unit in units:
        prompts = 2 * int(unit[0]["unit"].split()[1].rstrip(","))
        assert all(prompts <= s["amount"] <= 12 * prompts for s in unit)
    assert len(named(row, "over transformers")) == 4


def test_overhead_of_a_published_pair(finished: Finished, tmp_path: Path) -> None:
    line = words(finished.place, tmp_path, "overhead", "temperatures=0,1")
    text, code = run([*line, "--pair", str(finished.place.champion)])
    assert code == 0, text
    row = read(tmp_path / "bench.json")["rows"]["overhead"]
    assert any("champion" in note for note in row["notes"])
    # Three prompts, two temperatures, target-only and the pair.
    assert len(row["samples"]) == 12 and {s["arm"] for s in row["samples"]} == {"none", "draft"}
    assert [f["goal"] is not None for f in row["figures"]] == [True, *[False] * 4]
    # Of the pair's records: seconds outside the two kinds of passes over those of rounds.
    mine = [s["seconds"] for s in row["samples"] if s["arm"] == "draft"]
    outside = sum(s[part] for s in mine for part in ("accept", "cache", "other"))
    rounds = sum(seconds for s in mine for part, seconds in s.items() if part != "prefill")
    [share] = named(row, "outside the passes")
    assert share["value"] == pytest.approx(100 * outside / rounds)


def test_overhead_without_a_pair_takes_look_up_where_the_seed_draft_does_not_fit(
    tiny_place: Workplace, tmp_path: Path
) -> None:
    row = benched(tiny_place, tmp_path, "overhead", "temperatures=0")
    assert any("look-up" in note for note in row["notes"])


def test_growth(tiny_place: Workplace, tmp_path: Path) -> None:
    sizes = ["contexts=8,16,9999", "batches=1,2", "corpora=16,32", "corpus_tokens=16", "rounds=2", "decode_tokens=2"]
    row = benched(tiny_place, tmp_path, "growth", *sizes, "steps=2", "batch_context=8")
    grown = {sample["name"]: sample for sample in row["samples"]}
    # 9,999 tokens are more than the target has room for.
    assert grown["a pass of 1, by context"]["sizes"] == grown["a pass of 5, by context"]["sizes"] == [8, 16]
    assert all(len(s["seconds"]) == 2 and len(s["seconds"][0]) == len(s["sizes"]) for s in grown.values())
    held = [figure["name"] for figure in row["figures"] if figure["goal"]]
    assert len(held) == 5 and all("requests" in name or "conversations" in name for name in held)
    assert len(row["pictures"]) == 4


def test_startup(tiny_place: Workplace, tmp_path: Path) -> None:
    row = benched(tiny_place, tmp_path, "startup", "rounds=1")
    assert {s["arm"] for s in row["samples"]} == {
        *("dspark --help", "dspark --cfg job", "dspark pairs list", "python -c pass")
    }
    [bare] = named(row, "python -c pass")
    assert bare["goal"] is None and all(bare["value"] < f["value"] for f in row["figures"] if f["goal"])


@pytest.mark.slow  # six processes that import torch
def test_training(tiny_place: Workplace, tmp_path: Path) -> None:
    tiny = [
        *tiny_place.prompts(),
        *("corpus.max_new_tokens=12", "corpus.batch_size=4"),
        *("draft.pruned.layers=1", "draft.pruned.sequences_per_step=2"),
    ]
    settings = ["steps=2", "rounds=1", "unroll=2", "responses=18", f"words={shlex.join(tiny)}"]
    row = benched(tiny_place, tmp_path, "training", *settings)
    arms = {(s["draft"], s["arm"]) for s in row["samples"]}
    assert arms == {*(("student", a) for a in ("ours", "plain")), *(("eagle3", a) for a in ("ours", "plain", "public"))}
    assert len(named(row, "tokens/s over the")) == len(named(row, "peak memory over the")) == 3
    assert all(s["tokens"] > 0 and s["step_seconds"] > 0 and s["peak_mib"] > 50 for s in row["samples"])
    # Both plain loops of a student supervise whole responses.
    tokens = {(s["draft"], s["arm"]): s["tokens"] for s in row["samples"]}
    assert tokens["eagle3", "ours"] == tokens["eagle3", "plain"]


def test_every_row_is_tested_here() -> None:
    assert tuple(name for name in rows.row_names() if name in ROWS) == ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--rows", "corpsu"], "unknown row 'corpsu' [--rows]: did you mean 'corpus'?"),
        (["--rows", "nonsense"], "unknown row 'nonsense' [--rows]: rows are "),
        (["--pair", "nowhere"], "no pair here [nowhere/pair.json]"),
        (["--draft", "nowhere"], "no draft here [nowhere/draft.json]"),
        (["--prompts", "0"], "--prompts is 0; use at least 1"),
        (["--rows", "startup", "--set", "rounds=3"], "cannot read 'rounds=3' [--set]: write ROW.NAME=VALUE"),
        (["--rows", "startup", "--set", "growth.rounds=3"], "'growth' is not among the rows that run"),
        (
            ["--rows", "startup", "--set", "startup.runs=3"],
            "startup has no setting 'runs' [--set]: settings are rounds",
        ),
        (
            ["--rows", "captured", "--set", "captured.blocks=", "--set", "captured.trees="],
            "captured needs blocks or trees",
        ),
        (["--rows", "captured", "--set", "captured.temperatures="], "cannot read ''"),
        (["--rows", "startup", "--set", "startup.rounds=x"], "cannot read 'x'"),
        (["--rows", "startup", "--set", "startup.rounds=0"], "startup.rounds is 0; use at least 1"),
        (["--rows", "captured", "--set", "captured.tree_lookup=-1"], "and tree_lookup of 0 or more"),
        (["--rows", "startup", "--precision", "fp9"], "target.precision is 'fp9'"),
        (["--rows", "target_only", "--target", "/nowhere/at/all"], "no such model folder [/nowhere/at/all]"),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text, code = run(["bench", *line])
    told = [one for one in text.splitlines() if one.startswith("dspark: ")]
    assert code == cli.BAD_INPUT and len(told) == 1 and message in told[0]
    assert "Traceback" not in text


def test_help_names_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    text = capsys.readouterr().out
    assert all(rows.summary(name) in text and rows.summary(name) for name in rows.row_names())


ADDED = '''"""A row that was added.

Says one."""

from dataclasses import dataclass

from inference.errors import InputError
from inference.statistics import Estimate
from pipelines.bench.outcome import Figure, Goal, Outcome


@dataclass(kw_only=True)
class Config:
    kind: str = "%(name)s"
    value: float = 1.0

    def run(self, bench):
        if self.value < 0:
            raise InputError("below nothing")
        return Outcome([Figure("one", Estimate(self.value, None, None), "", Goal(1))], [self.value])
'''


def test_a_row_is_added_by_one_module_and_what_was_measured_survives_a_later_failure(
    tiny_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("added_one", "added_two"):
        (tmp_path / f"{name}.py").write_text(ADDED % {"name": name}, encoding="utf-8")
    monkeypatch.setattr(rows, "__path__", [*rows.__path__, str(tmp_path)])
    line = words(tiny_place, tmp_path / "out", "added_one,added_two")
    text, code = run([*line, "--set", "added_one.value=2.5", "--set", "added_two.value=-1"])
    assert code == cli.BAD_INPUT and "added_one: one: 2.50 [no interval], goal >= 1: met" in text
    assert [f["value"] for f in read(tmp_path / "out" / "bench.json")["rows"]["added_one"]["figures"]] == [2.5]


def test_transformers_leaves_nothing_on_a_model_of_ours(tiny_place: Workplace) -> None:
    import torch

    from pipelines.bench.plain import Plain

    target = load_causal_model(tiny_place.root / "target", precision="fp32", device=torch.device("cpu"))
    plain = Plain.of(target)
    answer = plain.generate([[1, 2, 3], [4]], temperature=0.0, max_new_tokens=3, stop_tokens=frozenset(), seed=0)
    assert [len(one) for one in answer] == [3, 3] and plain.passes == 3
    assert not target.model._forward_pre_hooks
