"""`dspark plan` as a command: without weights, a corpus or a long wait; bad descriptions are refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from inference.device_profile import WIDTHS, DeviceProfile
from pipelines.planning import duration, machine
from pipelines.planning.config import PlanningConfig
from tests.pipelines.tiny import Workplace, read, run

DESCRIBED = ("plan.tflops=10", "plan.bandwidth_gb_s=100", "plan.memory_gib=4", "plan.disk_gib=4", "plan.host_gib=4")


def test_it_needs_neither_weights_nor_a_corpus(tiny_place: Workplace, tmp_path: Path) -> None:
    place = tiny_place.again(tmp_path / "place")
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_bytes((place.root / "target" / "config.json").read_bytes())
    out = tmp_path / "out" / "plan.json"
    words = ["draft=[none,lookup,pruned,eagle3]", "draft.pruned.layers=1", *DESCRIBED, f"plan.json={out}"]
    text, code = run(place.words(*words, f"target.path={folder}", stage="plan"))
    assert code == 0, text
    for said in ("parameters", "pruned: GiB of one process", "training on 10 TFLOP/s", "tokens to write", "fits"):
        assert said in text
    figures = read(out)
    assert list(figures["drafts"]) == ["pruned", "eagle3"], "what is not trained costs nothing to train"
    assert figures["misfits"] == [] and figures["corpus"]["conversations"] == 18
    # 6 steps of 2 conversations, as the words say.
    assert figures["drafts"]["pruned"]["steps"] == 6 and figures["drafts"]["pruned"]["conversations"] == 2
    assert not place.artifacts.exists(), "nothing is made"


def test_what_does_not_fit_is_said(tiny_place: Workplace, tmp_path: Path) -> None:
    words = (*DESCRIBED[:2], "plan.memory_gib=0.1", "plan.disk_gib=0.000001", "plan.host_gib=1")
    text, code = run(tiny_place.again(tmp_path).words(*words, stage="plan"))
    assert code == 0
    assert "does not fit: pruned: 0.6 GiB of 0.1 GiB of device memory" in text
    assert "does not fit: disk: " in text and "too much" in text


def test_layers_that_a_training_does_not_read_are_not_loaded(tiny_place: Workplace, tmp_path: Path) -> None:
    place, out = tiny_place.again(tmp_path), tmp_path / "plan.json"
    common = (
        "draft=[none,pruned,eagle3,dspark]",
        "corpus.taps=[0,1]",
        "draft.eagle3.taps=[0,1]",
        "draft.dspark.taps=[1]",
    )
    loading = {}
    for name, words in {"kept": (), "captured": ("corpus.keep_features=false",)}.items():
        text, code = run(place.words(*common, *DESCRIBED, *words, f"plan.json={out}", stage="plan"))
        assert code == 0, text
        loading[name] = {draft: figures["loading"] for draft, figures in read(out)["drafts"].items()}
    kept, captured = loading["kept"], loading["captured"]
    assert kept["eagle3"] < captured["eagle3"], "its features are captured by the whole target otherwise"
    assert kept["dspark"] == captured["dspark"], "it runs the target once to start from it"
    assert kept["pruned"] == captured["pruned"], "it reads states alone"


def test_steps_follow_from_epochs_and_what_is_not_for_validation(tiny_place: Workplace, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    words = ("budget.responses=null", "trainer.steps=0", "plan.responses=100", "plan.epochs=3", f"plan.json={out}")
    assert run(tiny_place.again(tmp_path).words(*words, *DESCRIBED, stage="plan"))[1] == 0
    # 94 of 100 are trained on, three times, two a step.
    assert read(out)["drafts"]["pruned"]["steps"] == 141


def test_a_replicated_training_is_planned_with_all_of_it_in_each_process(tiny_place: Workplace, tmp_path: Path) -> None:
    place, out = tiny_place.again(tmp_path), tmp_path / "plan.json"
    several = ("plan.processes=2", "trainer.accumulation=2", "trainer.precision=fp32", f"plan.json={out}")
    found = {}
    for name, words in {"one": (), "copies": ("trainer=replicated",), "spread": ("trainer=deepspeed",)}.items():
        processes = several if words else several[1:]
        text, code = run(place.words("draft=[none,eagle3]", *words, *processes, *DESCRIBED, stage="plan"))
        assert code == 0, text
        found[name] = read(out)
    one, copies, spread = (found[name]["drafts"]["eagle3"] for name in ("one", "copies", "spread"))
    assert found["copies"]["engine"] == "replicated" and found["copies"]["zero_stage"] == 0
    assert list(copies["memory"]) == ["0"], "there is nothing to spread"
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert copies["memory"]["0"][part] == one["memory"]["0"][part] == spread["memory"]["0"][part]
    assert copies["memory"]["0"]["exchange"] == 4 * copies["trained"] and one["memory"]["0"]["exchange"] == 0
    assert copies["step_seconds"] == spread["step_seconds"] == pytest.approx(one["step_seconds"] / 2)
    between = (sum(copies["memory"]["0"].values()) + copies["loading"]) / 2
    tight = f"plan.memory_gib={between / 2**30}"
    described = [word for word in DESCRIBED if "memory_gib" not in word]
    text, code = run(
        place.words("draft=[none,eagle3]", "trainer=replicated", *several, *described, tight, stage="plan")
    )
    assert code == 0 and "trainer=replicated" in text and "by ZeRO stage" not in text
    assert "does not fit: eagle3" in text and "use trainer=deepspeed, which spreads weights" in text


def test_this_machine_is_measured_where_none_is_described(
    tiny_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = DeviceProfile(
        device="a made-up machine",
        versions={},
        passes={"fp32": dict.fromkeys(WIDTHS, 0.01)},
        spread={"fp32": dict.fromkeys(WIDTHS, 0.0)},
        train={"fp32": {"layer": 1e-4, "head": 2e-4}},
    )
    monkeypatch.setattr(machine, "device_profile", lambda target, cache: profile)
    monkeypatch.setattr(duration, "time_generation", lambda cfg, corpus, precision: (0.001, 0.01))
    out = tmp_path / "plan.json"
    words = ("plan.prompt_tokens=30", "plan.response_tokens=10", f"plan.json={out}")
    assert run(tiny_place.again(tmp_path).words(*words, stage="plan"))[1] == 0
    figures = read(out)
    assert figures["machine"] == "a made-up machine"
    # 2 conversations of 40 tokens through one layer and 10 through the head, 1.25 times that: 15 ms.
    assert figures["drafts"]["pruned"]["step_seconds"] == pytest.approx(2 * (40 * 1e-4 + 10 * 2e-4) * 1.25)
    # 18 in 5 batches of up to 4: 30 prompt tokens of 1 ms and 10 steps of 10 ms each, 1.2 times that.
    assert figures["corpus"]["tokens_per_s"] == pytest.approx(180 / (5 * 0.13 * 1.2))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("plan.tflops=10",), "plan.tflops alone says nothing of generation"),
        (("+plan.shape={model_type:llama}",), "plan.shape has no weights to measure with"),
        (("+plan.shape={hidden_size:64}", *DESCRIBED), "plan.shape needs a model_type"),
        (("+plan.shape={model_type:lama}", *DESCRIBED), "transformers knows no model type 'lama'"),
        (("target.path=/not/there", *DESCRIBED), "set plan.shape"),
        (("plan.zero_stage=4",), "plan.zero_stage is 4: use 0, 1, 2, 3"),
        (("draft=[none,pretrained]", *DESCRIBED), r"set it to a model folder"),
    ],
)
def test_bad_descriptions_are_refused_in_one_line(
    words: tuple[str, ...], reason: str, tiny_place: Workplace, tmp_path: Path
) -> None:
    text, code = run(tiny_place.again(tmp_path).words(*words, stage="plan"))
    assert code == 2 and reason in text and len(text.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"processes": 0}, "plan.processes is 0: use 1 or more"),
        ({"mfu": 1.5}, "plan.mfu is 1.5: use a share above 0, at most 1"),
        ({"disk_gib": -1.0}, "plan.disk_gib is -1.0: use 0 or more"),
        ({"epochs": 0.0}, "epochs above 0"),
    ],
)
def test_numbers_are_checked_once(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PlanningConfig(**wrong)
