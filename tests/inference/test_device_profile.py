"""Which arithmetic a profile chooses, by hand-made profiles; and that a machine is measured once."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from inference import device_profile as module
from inference.cache import RollbackCache
from inference.costs import monotone
from inference.device_profile import WIDTHS, DeviceProfile, device_profile, measure, profile_from_json
from inference.model import CausalModel
from inference.precision import available_precisions
from inference.target import TargetConfig
from tests.inference.families import CONTEXT, family_model
from tests.pipelines.tiny import write_model


def _profile(passes: Mapping[str, Sequence[float]], *, spread: float = 0.0) -> DeviceProfile:
    """Milliseconds for passes of 1, 2, 3, 4, 6, 8, 16, 32 tokens."""
    by_width = {name: {w: t / 1e3 for w, t in zip(WIDTHS, row, strict=True)} for name, row in passes.items()}
    spreads = {name: {w: spread / 1e3 for w in WIDTHS} for name in passes}
    train = {"fp32": {"layer": 3.0, "head": 1.0}, "bf16": {"layer": 1.0, "head": 2.0}}
    return DeviceProfile("machine", {"torch": "1"}, by_width, spreads, train)


FP32 = [30, 34, 37, 40, 42, 45, 70, 110]
PACKED = [20, 24, 27, 30, 35, 40, 60, 130]
BF16 = [15, 30, 45, 60, 90, 95, 95, 96]


def test_each_use_gets_its_own_fastest_arithmetic() -> None:
    profile = _profile({"fp32": FP32, "fp16_packed": PACKED, "bf16": BF16})
    # A prompt of 128 tokens by the last line: 350, 550, 102. And 128 tokens one by one: 3,840, 2,560, 1,920.
    assert profile.baseline_precision == "bf16"
    # And 64 blocks of 4, 6, 8: 64 times 42.3, 35, 81.7. 32 tokens: bf16's 96.
    assert profile.block_precision == "fp16_packed"
    # And fp32's 110 is within a quarter of that, fp16_packed's 130 is not.
    assert profile.generation_precisions == ["bf16", "fp32"]
    # 3 + 1 against 1 + 2.
    assert profile.train_precision == "bf16"


def test_a_prompt_counts_as_much_as_its_seconds() -> None:
    # 3 ms dearer in each of 64 blocks is 192 ms, less than the 448 that the prompt takes less.
    by_rows = [*(cost + 3 for cost in PACKED[:6]), 60, 102]
    assert _profile({"fp16_packed": PACKED, "by_rows": by_rows}).block_precision == "by_rows"
    # 8 ms are 512.
    dearer = [*(cost + 8 for cost in PACKED[:6]), 60, 102]
    assert _profile({"fp16_packed": PACKED, "by_rows": dearer}).block_precision == "fp16_packed"


@pytest.mark.parametrize(
    ("other", "spread", "chosen"),
    [
        # 20 against 19.5 milliseconds differ by less than both spreads together from 0.25 on.
        (19.5, 0.2, "other"),
        (19.5, 0.3, "fp16_packed"),
        # A request of 3.11 s against 2.964 s: 0.146 is within a twentieth of the latter. With 18.8: 0.154 is not.
        (18.86, 4.0, "fp16_packed"),
        (18.8, 4.0, "other"),
    ],
)
def test_the_baseline_takes_the_blocks_arithmetic_only_when_the_two_cannot_be_told_apart(
    other: float, spread: float, chosen: str
) -> None:
    passes = {"fp16_packed": PACKED, "other": [other, 24, 27, 60, 60, 60, 60, 130]}
    assert _profile(passes, spread=spread).baseline_precision == chosen


def test_a_single_arithmetic_serves_all() -> None:
    profile = _profile({"fp32": FP32})
    assert [profile.baseline_precision, profile.block_precision, *profile.generation_precisions] == ["fp32"] * 3


@pytest.mark.parametrize(
    ("width", "milliseconds"),
    [
        (1, 30.0),
        (4, 40.0),
        (32, 110.0),
        # Between 4 and 6, 6 and 8, 16 and 32 in a straight line.
        (7, 43.5),
        (5, 41.0),
        (24, 90.0),
        # Beyond 32 the last line goes on: 40 milliseconds per 16 tokens.
        (48, 150.0),
        (64, 190.0),
        (0, 30.0),
    ],
)
def test_seconds_between_measured_widths_are_linear(width: int, milliseconds: float) -> None:
    assert 1e3 * _profile({"fp32": FP32}).pass_seconds("fp32", width) == pytest.approx(milliseconds)


@pytest.mark.parametrize(
    ("values", "fitted"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        ([1.0, 3.0, 2.0], [1.0, 2.5, 2.5]),
        # 4 and 1 pool to 2.5, which is less than 3: all three pool.
        ([3.0, 4.0, 1.0, 5.0], [8 / 3, 8 / 3, 8 / 3, 5.0]),
        ([2.0], [2.0]),
    ],
)
def test_a_wider_pass_never_costs_less(values: list[float], fitted: list[float]) -> None:
    assert monotone(values) == pytest.approx(fitted)


def test_a_profile_survives_json() -> None:
    profile = _profile({"fp32": FP32, "bf16": BF16}, spread=0.5)
    assert profile_from_json(json.loads(json.dumps(asdict(profile)))) == profile


def test_the_table_holds_milliseconds() -> None:
    row = ["fp32", "30.0", "34.0", "37.0", "40.0", "42.0", "45.0", "70.0", "110.0"]
    assert _profile({"fp32": FP32}).table() == [row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("target"), layers=1)


def test_measuring_times_every_arithmetic_at_every_width(folder: Path) -> None:
    profile = measure(folder, device=torch.device("cpu"))
    assert list(profile.passes) == available_precisions(torch.device("cpu"))
    for precision, row in profile.passes.items():
        assert tuple(row) == tuple(profile.spread[precision]) == WIDTHS
        assert all(seconds > 0.0 for seconds in row.values())
        assert all(seconds >= 0.0 for seconds in profile.spread[precision].values())
    assert set(profile.train) == {"fp32", "bf16"}
    assert all(seconds > 0.0 for row in profile.train.values() for seconds in row.values())


def _pretend(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Has passes take as many seconds as they have tokens, twice as many in three visits; returns the groups timed."""
    groups: list[list[str]] = []

    def pretend(models: list[CausalModel], seconds: list[dict[int, list[float]]]) -> None:
        for found, width in itertools.product(seconds, WIDTHS):
            found[width] += [width * (1.0 if len(groups) > 2 else 2.0)] * 8
        groups.append([model.precision for model in models])

    monkeypatch.setattr(module, "_time_passes", pretend)
    return groups


def test_all_arithmetics_take_turns_where_memory_allows_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = _pretend(monkeypatch)
    measure(folder, device=torch.device("cpu"))
    assert groups == [available_precisions(torch.device("cpu"))]


def test_where_memory_is_short_a_machine_that_is_slower_for_a_while_does_not_make_an_arithmetic_slower(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = _pretend(monkeypatch)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # Half of it is room for two models of four copies each.
    monkeypatch.setattr(module, "_free_bytes", lambda device: 2 * 2 * 4 * size)
    four = ["fp32", "bf16", "fp32_packed", "fp16_packed"]
    monkeypatch.setattr(module, "precisions_for", lambda folder, device: four)
    profile = measure(folder, device=torch.device("cpu"))
    first, last = ["fp32", "bf16"], ["fp32_packed", "fp16_packed"]
    assert groups == [first, last, last, first]
    # One of its two visits fell into the slow while: the lower quartile is what the other found.
    assert profile.passes["fp32"] == {width: float(width) for width in WIDTHS}


def test_a_model_too_large_for_two_is_timed_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = _pretend(monkeypatch)
    monkeypatch.setattr(module, "_free_bytes", lambda device: 1)
    measure(folder, device=torch.device("cpu"))
    names = available_precisions(torch.device("cpu"))
    assert groups == [[name] for name in [*names, *reversed(names)]]


def test_free_memory_is_some_and_less_than_there_is() -> None:
    assert 0 < module._free_bytes(torch.device("cpu")) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Puts a pretended measurement in place; the folders it was given."""
    seen: list[Path] = []

    def pretend(folder: Path, **_: object) -> DeviceProfile:
        seen.append(folder)
        return _profile({"fp32": FP32})

    monkeypatch.setattr(module, "measure", pretend)
    return seen


def test_a_machine_is_measured_once_per_shape(folder: Path, tmp_path: Path, measured: list[Path]) -> None:
    cache = tmp_path / "cache"
    first = device_profile(TargetConfig(path=str(folder)), cache)
    assert device_profile(TargetConfig(path=str(folder)), cache) == first
    # Other weights of the same shape take as long; another shape does not.
    device_profile(TargetConfig(path=str(write_model(tmp_path / "same", layers=1, seed=3))), cache)
    assert len(measured) == 1
    device_profile(TargetConfig(path=str(write_model(tmp_path / "deeper", layers=2))), cache)
    assert len(measured) == 2
    assert not list((cache / "profiles").glob("*.partial"))


def test_other_versions_are_measured_anew(
    folder: Path, tmp_path: Path, measured: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device_profile(TargetConfig(path=str(folder)), tmp_path)
    monkeypatch.setattr(torch, "__version__", "99.0")
    device_profile(TargetConfig(path=str(folder)), tmp_path)
    assert len(measured) == 2


def test_passes_are_timed_over_a_context_that_grows_as_in_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, logits, lengths = family_model("llama"), CausalModel.logits, list[int]()

    def noted(self: CausalModel, tokens: torch.Tensor, cache: RollbackCache, **options: Any) -> torch.Tensor:
        lengths.append(cache.length)
        return logits(self, tokens, cache, **options)

    monkeypatch.setattr(CausalModel, "logits", noted)
    module._time_passes([model], [{width: [] for width in WIDTHS}])
    # Half of what the model holds, then a token more a pass, with room for the widest; and again.
    first, last = CONTEXT // 2, CONTEXT - max(WIDTHS) - 1
    assert lengths[: last - first + 3] == [0, *range(first, last + 1), first]
