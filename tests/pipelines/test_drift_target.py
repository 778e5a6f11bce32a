"""A target that drifts: what it learns from, what it never sees, and the folders and the report that come out."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distill.prompts import SourceContext, package
from inference.errors import InputError
from inference.loading import load_causal_model
from inference.records import Record
from inference.statistics import Estimate
from inference.target import TargetConfig, target_digest
from pipelines import drift_target, staleness
from pipelines.drifting_data import Example, make_batch, read_examples, read_probe_prompts, split_examples
from pipelines.staleness import Settings, Tau
from tests.pipelines import tiny
from tests.pipelines.tiny import read

SMALL = ["--steps", "2", "--checkpoints", "1,2", "--rank", "2", "--lr", "0.01", "--batch", "2"]
SHORT = ["--tau-prompts", "3", "--answer-tokens", "4", "--device", "cpu"]


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A random llama with room for a question and its answer, a token a byte."""
    monkeypatch.setattr(tiny, "CONTEXT", 1024)
    yield tiny.write_model(tmp_path / "target", layers=1)


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """A draft that needs no weights."""
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "draft.json").write_text(json.dumps({"kind": "lookup", "longest": 4, "shortest": 2}), encoding="utf-8")
    return folder


def words(target: Path, draft: Path, out: Path) -> list[str]:
    return ["--target", str(target), "--draft", str(draft), "--out", str(out), *SMALL, *SHORT]


def test_checkpoints_are_targets_of_their_own_and_the_report_tells_of_each(
    target: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = target_digest(target)
    out = tmp_path / "out"
    assert drift_target.main(words(target, draft, out)) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "staleness.json",
        "staleness.md",
        "staleness.png",
        "step-1",
        "step-2",
    ]
    for name in ("step-1", "step-2"):
        model = TargetConfig(path=str(out / name), device="cpu").load(tmp_path / "cache", precision="fp32")
        assert model.tokenizer.chat_template == tiny.CHATML
        assert not (out / name / "draft.json").exists()
        assert read(out / name / "config.json")["dtype"] == "bfloat16"
    report = read(out / "staleness.json")
    digests = [point["digest"] for point in report["points"]]
    assert digests == [before, target_digest(out / "step-1"), target_digest(out / "step-2")]
    assert len(set(digests)) == 3
    assert target_digest(target) == before, "the base is left as it was"
    assert [point["step"] for point in report["points"]] == [0, 1, 2]
    # Three domains at two temperatures; nothing has changed at step 0.
    assert all(len(point["taus"]) == 6 for point in report["points"])
    assert {tau["change"]["value"] for tau in report["points"][0]["taus"]} == {0.0}
    assert report["points"][0]["train_loss"] is None and report["points"][2]["train_loss"] > 0.0
    table = (out / "staleness.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == table
    assert table.count("\n| 2 | ") == 2  # one row a temperature
    assert str(tmp_path) not in json.dumps(report) + table

    assert drift_target.main(words(target, draft, out)) == 2
    assert "results of another run" in capsys.readouterr().err


def test_only_the_answer_and_its_end_are_supervised(target: Path) -> None:
    tokenizer = tiny.tokenizer()
    example = read_examples(tokenizer, max_tokens=1024)[0]
    learned = tokenizer.decode([t for t, on in zip(example.tokens, example.supervised, strict=True) if on])
    # Row 0 of the data set as its authors wrote it: calculator marks, and the result after four hashes.
    assert "<<16-3-4=9>>9 duck eggs a day." in learned
    assert learned.endswith("#### 18<|im_end|>")
    assert "How much in dollars" not in learned and "assistant" not in learned


def test_labels_are_the_tokens_that_follow(target: Path) -> None:
    long = Example(0, [5, 6, 7, 8], [False, False, True, True])
    short = Example(1, [5, 9], [False, True])
    batch = make_batch([long, short], device=torch.device("cpu"))
    assert batch["tokens"].tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch["attention"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-1, 7, 8, -1], [9, -1, -1, -1]]


def test_no_row_is_trained_on_that_is_probed_or_held_out() -> None:
    tokenizer = tiny.tokenizer()
    context = SourceContext(tokenizer, 0)
    training, probed = split_examples(read_examples(tokenizer, max_tokens=4096))
    assert [e.row for e in training] == list(range(900))
    assert [e.row for e in probed] == list(range(900, 1000))
    texts = [tokenizer.decode(e.tokens) for e in (*training, *probed)]
    heldout = package.Config(dataset="gsm8k_heldout").read(context)
    assert not [p.id for p in heldout for text in texts if p.turns[0] in text]
    prompts = read_probe_prompts(tokenizer, count=24, seed=0)
    asked = [p for p in prompts if p.domain == "maths"]
    trained = texts[: len(training)]
    assert len(asked) == 24 and all(900 <= int(p.id) < 1000 for p in asked)
    assert not [p.id for p in asked for text in trained if p.turns[0] in text]
    assert [sum(p.domain == d for p in prompts) for d in ("code", "chat")] == [8, 8]


def test_every_conversation_comes_once_an_epoch() -> None:
    examples = [Example(row, [row], [True]) for row in range(6)]
    settings = Settings(steps=4, checkpoints=(4,), batch=3)
    rows = [e.row for step in range(4) for e in drift_target._drawn(examples, step, settings)]
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
    assert rows[:6] != rows[6:]


def test_the_loss_is_that_of_the_answer_alone(target: Path) -> None:
    model = load_causal_model(target, precision="fp32", device=torch.device("cpu"))
    example = Example(0, [5, 6, 7, 8], [False, False, True, True])
    padding = Example(1, [9] * 8, [False] * 8)
    output = drift_target.answer_loss(model, make_batch([example, padding], device=model.device))
    # Slowly: the whole conversation alone, rows 1 and 2 against tokens 2 and 3.
    logits = model.model(torch.tensor([example.tokens])).logits[0].detach()
    rows = torch.log_softmax(logits.float(), dim=-1)
    assert output.weight_sum == 2
    assert float(output.loss_sum.detach()) == pytest.approx(-float(rows[1, 7] + rows[2, 8]), rel=1e-4)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--checkpoints", "1,3"], "rising numbers between 1 and steps"),
        (["--lr", "0"], "rate > 0"),
        (["--rank", "0"], "rank is 0"),
        (["--max-tokens", "10"], "no conversation is short enough"),
        (["--target", "./nowhere"], "no such model folder"),
        (["--draft", "nowhere"], "no draft here"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], match: str, target: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drift_target.main([*words(target, draft, tmp_path / "out"), *more]) == 2
    line = capsys.readouterr().err
    assert match in line and line.count("\n") == 1


def test_a_save_that_fails_leaves_no_folder(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_model(target, precision="fp32", device=torch.device("cpu"))
    adapted = drift_target._with_adapters(model, Settings(rank=2))

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(drift_target, "fsync_tree", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="no space left"):
        drift_target._save_merged(adapted, target, tmp_path / "out" / "step-1")
    assert list((tmp_path / "out").iterdir()) == []


def test_changes_are_paired_over_prompts() -> None:
    def record(prompt: str, emitted: int, passes: int) -> Record:
        return Record(prompt, "maths", 0.0, "draft", 0, 4, emitted, passes, [], [], {}, {}, 0, 0, "", None, [])

    base = [record("a", 40, 20), record("b", 90, 30)]
    now = [record("a", 30, 20), record("b", 45, 20)]
    # tau 130 / 50 = 2.6 before, 75 / 40 = 1.875 after; each prompt alone falls by exactly a quarter.
    tau = staleness._tau(base, now, "maths", 0.0, seed=0)
    assert isinstance(tau, Tau) and isinstance(tau.change, Estimate)
    assert tau.tau.value == pytest.approx(1.875)
    assert tau.change.value == pytest.approx(1.875 / 2.6 - 1.0)
    assert tau.change.high is not None and tau.change.high == pytest.approx(-0.25)
