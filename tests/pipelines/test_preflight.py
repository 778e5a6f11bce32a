"""What a training cannot do here is said before anything is made, in one line."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from inference.drafters import quantized
from inference.drafters.quantized import check_packed_step
from inference.errors import InputError
from pipelines import config, preflight
from tests.pipelines.tiny import Workplace, run

BASE = ("lookahead.tokens=3", "trainer.steps=3")


def composed(words: list[str]) -> config.RunConfig:
    config.register()
    with initialize_config_module("conf", version_base="1.3"):
        return config.typed(compose("config", overrides=[word for word in words if not word.startswith("hydra.")]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("draft=[none,pruned]", "trainer=deepspeed", "trainer.zero_stage=3", "draft.pruned.on_policy_share=0.5"),
            "a student whose weights are spread cannot write by itself",
        ),
        (
            (
                "draft=[none,pretrained]",
                "draft.pretrained.path=.",
                "draft.pretrained.adapter=qlora",
                "trainer=deepspeed",
                "trainer.zero_stage=3",
            ),
            "4-bit weights cannot be spread",
        ),
        (("draft=[none,eagle3]", "target.teacher_precision=nf4"), "a draft cannot start from layers packed as nf4"),
        (
            ("draft=[none,pruned]", "draft.pruned.keep_share=0.5", "draft.pruned.reference=nowhere"),
            "'nowhere' is neither a draft in the list nor a folder",
        ),
        (("draft=[none,pruned]", "trainer.offload=all"), "trainer.offload=all needs zero_stage=3"),
        (
            ("draft=[none,pruned]", "trainer=replicated", "trainer.offload=optimizer"),
            "trainer.offload=optimizer is DeepSpeed's: use trainer=deepspeed, or offload=none",
        ),
        (
            ("draft=[none,dspark]", "target.teacher_precision=nf4", "target.spread_teacher=true"),
            "target.spread_teacher spreads fp32 or bf16 weights",
        ),
    ],
)
def test_refused_before_a_corpus_is_written(
    tiny_place: Workplace, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    place = tiny_place.again(tmp_path / "here")
    text, code = run(place.words(*BASE, *words))
    assert code == 2, text
    assert said in text
    assert not place.artifacts.exists()


def test_the_engines_of_several_processes_are_named_where_the_first_trains_alone(
    tiny_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "num_processes", lambda: 2)
    cfg = composed(tiny_place.again(tmp_path).words(*BASE, "draft=[none,eagle3]"))
    preflight.check_training(cfg)
    [line] = [record.getMessage() for record in caplog.records]
    assert "trainer=replicated (drafts that fit each process) or trainer=deepspeed uses all 2" in line


def test_a_spread_teacher_needs_deepspeed_whatever_trains(
    tiny_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*BASE, "draft=[none,eagle3]", "trainer=replicated", "trainer.accumulation=2", "target.spread_teacher=true")
    cfg = composed(tiny_place.again(tmp_path).words(*words))
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    preflight.check_training(cfg)  # one process spreads nothing
    monkeypatch.setattr(preflight, "num_processes", lambda: 2)
    with pytest.raises(InputError, match=r"deepspeed is not installed \[target.spread_teacher\]"):
        preflight.check_training(cfg)


@pytest.mark.parametrize("weight_format", ["nf4", "int8"])
def test_a_format_is_tried_on_one_layer(weight_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_packed_step(weight_format, torch.device("cpu"))
    import bitsandbytes

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(bitsandbytes.nn, "Linear4bit", broken)
    monkeypatch.setattr(bitsandbytes.nn, "Linear8bitLt", broken)
    with pytest.raises(InputError, match=f"cannot train through {weight_format} on cpu: RuntimeError: no kernel"):
        check_packed_step(weight_format, torch.device("cpu"))
    assert quantized.quantization_config(weight_format, compute_dtype=torch.float32) is not None


# Under autocast torch says that fp32 norms of bf16 states are not fused; they are meant to be fp32.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["nf4", "int8", "bf16"])
def test_drafts_learn_from_a_teacher_in_less_memory(tiny_place: Workplace, tmp_path: Path, weight_format: str) -> None:
    place = tiny_place.again(tmp_path / "here")
    words = [
        *BASE,
        "draft=[none,pruned,dspark]",
        "draft.dspark.init=random",
        "corpus.keep_features=false",
        "corpus.keep_states=false",
    ]
    taught = f"target.teacher_precision={weight_format}"
    text, code = run(place.words(*words, taught, stage="corpus"))
    assert code == 0, text
    if weight_format == "bf16":
        text, code = run(place.words(*words, taught, "trainer.precision=fp32", stage="build"))
        assert code == 2 and "a teacher in bf16 has a head in bf16, and trainer.precision is fp32" in text
        words.append("trainer.precision=bf16")
    text, code = run(place.words(*words, taught, stage="build"))
    assert code == 0, text
    # Another teacher is another draft: the plain one is made anew.
    text, code = run(place.words(*words, stage="build"))
    assert code == 0 and "training pruned" in text
