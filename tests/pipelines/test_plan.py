"""Minutes become counts by the measured costs; explicit numbers replace them; what is fixed stays fixed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from distill.responses.local import Config as LocalResponses
from inference.device_profile import WIDTHS, DeviceProfile
from inference.errors import InputError
from pipelines import config, plan
from pipelines.artifacts import Store
from tests.pipelines.tiny import Workplace

PROFILE = DeviceProfile(
    device="a made-up machine",
    versions={"torch": "0"},
    # One pass of 1 token takes 10 ms in fp32; passes of bf16 grow with their width, those of fp32 do not.
    passes={
        "fp32": dict.fromkeys(WIDTHS, 0.010),
        "bf16": {width: 0.004 * width for width in WIDTHS},
    },
    spread={name: dict.fromkeys(WIDTHS, 0.0001) for name in ("fp32", "bf16")},
    train={"fp32": {"layer": 1e-4, "head": 2e-4}, "bf16": {"layer": 5e-5, "head": 1e-4}},
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[DeviceProfile]:
    """The profile that the next plan is made from."""
    profiles = [PROFILE]
    monkeypatch.setattr(plan, "device_profile", lambda target, cache: profiles[-1])
    # Seconds per prompt token of a batch, and per step, in which only the latest profile's speed counts.
    step = lambda: profiles[-1].passes["fp32"][1]  # noqa: E731
    monkeypatch.setattr(plan, "time_generation", lambda cfg, corpus, precision: (step() / 10, step()))
    return profiles


def configured(place: Workplace, *words: str) -> config.RunConfig:
    """A typed configuration without the workplace's explicit numbers."""
    config.register()
    planned = ("budget.", "trainer.", "target.precision", "hydra.")
    kept = [w for w in place.words(*words) if w in words or not w.startswith(planned)]
    with initialize_config_module("conf", version_base="1.3"):
        return config.typed(compose("config", overrides=kept))


def made(place: Workplace, root: Path, *words: str) -> plan.Plan:
    return plan.make_plan(configured(place, *words), Store(root), target_digest="d")[0]


def test_each_job_gets_its_own_fastest_arithmetic(
    measured: list[DeviceProfile], tiny_place: Workplace, tmp_path: Path
) -> None:
    found = made(tiny_place, tmp_path)
    # one token: bf16 4 ms, fp32 10 ms; blocks of 4 to 8: bf16 16 to 32 ms, fp32 10 ms; training: bf16 is half
    assert (found.baseline_precision, found.block_precision) == ("bf16", "fp32")
    assert (found.generation_precision, found.train_precision) == ("fp32", "bf16")


def test_a_fixed_precision_holds_for_all_decoding(
    measured: list[DeviceProfile], tiny_place: Workplace, tmp_path: Path
) -> None:
    found = made(tiny_place, tmp_path, "target.precision=fp32")
    assert {found.baseline_precision, found.block_precision, found.generation_precision} == {"fp32"}
    assert found.train_precision == "bf16", "trainer.precision decides about training"
    with pytest.raises(InputError, match=r"fp16 is not on offer .* use auto or one of fp32, bf16"):
        made(tiny_place, tmp_path, "target.precision=fp16")


def test_responses_fill_the_budget(measured: list[DeviceProfile], tiny_place: Workplace, tmp_path: Path) -> None:
    # A batch of 4 takes 110 prompt tokens of 1 ms and 0.75 * 12 steps of 10 ms, 1.2 times that with the rest: 0.24 s.
    # 0.6 min hold 150 of them, or one fewer where rounding says so.
    assert made(tiny_place, tmp_path, "budget.corpus_minutes=0.601").responses == 600
    assert made(tiny_place, tmp_path, "budget.corpus_minutes=0.000001").responses == 4, "one batch at least"
    assert made(tiny_place, tmp_path, "budget.responses=7").responses == 7


def test_steps_fill_the_budget_shared_by_the_trained_drafts(
    measured: list[DeviceProfile], tiny_place: Workplace, tmp_path: Path
) -> None:
    one = made(tiny_place, tmp_path, "budget.training_minutes=1").steps
    # sequences of 110 prompt and 0.75 * 12 = 9 response tokens, 2 a step; bf16, one layer:
    # 119 * 2 * 5e-5 + 9 * 2 * 1e-4 = 0.0137 s, 1.8 * 1.4 times that with overhead and casts: 1737 steps a minute
    assert one == {"pruned": 1737}
    two = made(tiny_place, tmp_path, "budget.training_minutes=1", "+draft@draft.twin=pruned", "draft.twin.layers=1")
    assert set(two.steps) == {"pruned", "twin"} and two.steps["pruned"] == 1737 // 2
    assert made(tiny_place, tmp_path, "trainer.steps=5").steps == {"pruned": 5}


def test_generation_is_timed_as_the_corpus_is_written(tiny_place: Workplace) -> None:
    cfg = configured(tiny_place)
    assert isinstance(cfg.corpus, LocalResponses)
    prompts, step = plan.time_generation(cfg, cfg.corpus, "fp32")
    assert 0.0 < prompts < step < 10.0, "a token of a prompt costs less than a step of its own"


def test_the_corpus_is_written_in_the_arithmetic_that_generates_fastest(
    measured: list[DeviceProfile], tiny_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = {"fp32": dict.fromkeys(WIDTHS, 0.010), "bf16": dict.fromkeys(WIDTHS, 0.012)}
    measured.append(replace(PROFILE, passes=passes))
    timed: list[str] = []

    def generation(cfg: object, corpus: object, precision: str) -> tuple[float, float]:
        timed.append(precision)
        return {"fp32": (0.001, 0.010), "bf16": (0.001, 0.009)}[precision]

    monkeypatch.setattr(plan, "time_generation", generation)
    assert made(tiny_place, tmp_path / "minutes").generation_precision == "bf16"
    assert timed == ["fp32", "bf16"]
    # A number of responses leaves nothing to time, and so the wide passes decide.
    assert made(tiny_place, tmp_path / "number", "budget.responses=7").generation_precision == "fp32"
    assert timed == ["fp32", "bf16"]


def test_a_server_needs_an_explicit_number(
    measured: list[DeviceProfile], tiny_place: Workplace, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"the speed of a server is not known here \[budget.responses\]: set"):
        made(tiny_place, tmp_path, "corpus=server")
    assert made(tiny_place, tmp_path, "corpus=server", "budget.responses=3").responses == 3


def test_a_plan_once_made_is_kept_when_the_machine_is_measured_again(
    measured: list[DeviceProfile], tiny_place: Workplace, tmp_path: Path
) -> None:
    first = made(tiny_place, tmp_path)
    slower = {name: {width: 2 * s for width, s in row.items()} for name, row in PROFILE.passes.items()}
    measured.append(replace(PROFILE, passes=slower))
    assert made(tiny_place, tmp_path) == first
    measured.append(replace(PROFILE, passes=slower, device="another machine"))
    assert made(tiny_place, tmp_path).responses < first.responses


def test_the_plan_is_printed_in_four_lines(
    measured: list[DeviceProfile], tiny_place: Workplace, tmp_path: Path
) -> None:
    lines = made(tiny_place, tmp_path, "trainer.steps=5", "budget.responses=7").lines()
    assert [line.split()[0] for line in lines] == ["device", "precision", "corpus", "training"]
    assert "7 responses" in lines[2] and "pruned 5" in lines[3]


def test_the_trainer_gets_steps_precision_and_seed_from_plan_and_run(
    measured: list[DeviceProfile], tiny_place: Workplace, tmp_path: Path
) -> None:
    cfg = configured(tiny_place, "trainer.steps=5", "seed=3")
    found, _ = plan.make_plan(cfg, Store(tmp_path), target_digest="d")
    trainer: Any = plan.resolved_trainer(cfg, found, "pruned")
    assert (trainer.steps, trainer.precision, trainer.seed) == (5, "bf16", 3)
