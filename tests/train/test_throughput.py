"""Training figures: operations counted in a real step, tokens and steps a second, and the share of a known peak."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.train import tiny
from train.batches import Batch
from train.peaks import PEAKS, device_peak_flops, named_peak
from train.results import LossOutput
from train.throughput import FlopCount, Speed, Usage


@pytest.mark.parametrize(
    ("name", "arithmetic", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "tf32", 494e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),  # a seventh of it
        ("Tesla T4", "bf16", None),
    ],
)
def test_a_peak_goes_by_the_name_of_the_device(name: str, arithmetic: str, peak: float | None) -> None:
    assert named_peak(name, arithmetic) == peak


def test_every_device_of_the_table_has_all_peaks_and_a_cpu_has_none() -> None:
    assert all(peaks["bf16"] > peaks["tf32"] >= peaks["fp32"] > 0 for _, peaks in PEAKS)
    assert device_peak_flops(torch.device("cpu"), "bf16") is None


def test_forward_and_backward_products_are_counted_as_they_run() -> None:
    layer, rows = nn.Linear(6, 5, bias=False), torch.ones(4, 6)
    with FlopCount() as count:
        layer(rows).sum().backward()
    # forward 2*4*6*5, gradient of the weights the same; the input wants none
    assert count.flops == 2 * (2 * 4 * 6 * 5)


def test_a_formula_that_fails_costs_a_count_and_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> float:
        raise AssertionError("unknown form")

    monkeypatch.setitem(__import__("train.throughput").throughput._FORMULAS, torch.ops.aten.mm, broken)
    with FlopCount() as count:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert (count.flops, product.tolist()) == (0.0, [[2.0, 2.0], [2.0, 2.0]])


def test_a_run_says_its_speed(tmp_path: Path) -> None:
    module = tiny.network()
    plain = tiny.loss_of(module)

    def loss(batch: Batch) -> LossOutput:
        output = plain(batch)
        output.supervised, output.fed = 4, torch.tensor(10)
        return output

    result = tiny.run(tmp_path, module, loss=loss, peak_tflops=2.0)
    speed = result.speed
    assert speed is not None
    assert speed.steps_per_s == pytest.approx(1.0 / result.step_seconds)
    # two micro-batches a step, of 4 supervised and 10 fed tokens each
    assert speed.tokens_per_s == pytest.approx(8 * speed.steps_per_s)
    assert speed.fed_tokens_per_s == pytest.approx(20 * speed.steps_per_s)
    # two micro-batches: 4 rows through a frozen 6 x 8 (forward alone) and a trained 8 x 5 (three products)
    step = 2 * (2 * 4 * 6 * 8 + 3 * 2 * 4 * 8 * 5)
    assert speed.step_tflops == pytest.approx(step / 1e12)
    assert speed.mfu == pytest.approx(step / 1e12 * speed.steps_per_s / 2.0)
    assert [line["supervised"] for line in result.history] == [24, 32, 48, 48]
    assert result.tokens == 6 * 7  # the accounts go by weights, as before


def test_without_a_peak_no_share_is_said(tmp_path: Path) -> None:
    speed = tiny.run(tmp_path, tiny.network()).speed
    assert speed is not None and speed.mfu is None
    assert set(speed.figures()) == {"steps_per_s", "tokens_per_s", "step_tflops"}
    assert "%" not in str(speed)


def test_a_run_that_had_ended_says_no_speed(tmp_path: Path) -> None:
    tiny.run(tmp_path, tiny.network())
    assert tiny.run(tmp_path, tiny.network()).speed is None


def test_a_peak_may_change_between_a_run_and_its_resumption(tmp_path: Path) -> None:
    tiny.run(tmp_path, tiny.network())
    assert tiny.run(tmp_path, tiny.network(), peak_tflops=3.0).resumed_step == 6


def test_figures_are_said_in_one_line() -> None:
    speed = Speed(20.0, 12_000.4, 40_000.0, step_tflops=10.0, peak_tflops=989.0)
    said = "20 steps/s, 12,000 supervised tokens/s, 40,000 fed tokens/s, 200 TFLOP/s (20.2 % of 989)"
    assert str(speed) == said
    assert speed.figures()["mfu"] == pytest.approx(200 / 989)


def test_usage_starts_anew_with_every_line() -> None:
    usage = Usage(torch.device("cpu"), peak=1000.0)
    usage.step(tokens=10, fed=0, seconds=2.0)
    usage.step(tokens=20, fed=0, seconds=3.0)
    taken = usage.taken(flops=500.0)
    assert (taken["steps_per_s"], taken["tokens_per_s"], taken["mfu"]) == (0.4, 6.0, 0.2)
    assert "fed_tokens_per_s" not in taken
    usage.step(tokens=10, fed=40, seconds=1.0)
    assert usage.taken(flops=0.0)["fed_tokens_per_s"] == 40.0
