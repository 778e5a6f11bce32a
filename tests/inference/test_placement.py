"""Where a target lies in a run of several processes: by its size, as asked for, or as its heads allow."""

import logging
import os
from pathlib import Path

import pytest
import torch

from inference import placement, processes
from inference.device_profile import device_name
from inference.model import CausalModel
from inference.parallel import load_target
from inference.placement import AUTO, ONE, TENSOR, fits_one, placing, precisions_for, undivided, weight_bytes
from inference.precision import available_precisions, is_packed
from pipelines.config import DECODING
from tests.inference.families import family_config
from tests.pipelines.tiny import write_model

CPU = torch.device("cpu")


class _Group:
    """Two processes, as far as they are counted."""

    size = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A target whose heads two processes can share out."""
    return write_model(tmp_path / "target", layers=1)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the first process of two."""
    monkeypatch.setattr(processes, "_GROUP", _Group())


def room_for(monkeypatch: pytest.MonkeyPatch, folder: Path, *, precision: str) -> None:
    """Let a device have room for the weights in one arithmetic, and for not a byte more."""
    wanted = weight_bytes(folder, precision=precision)
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * wanted}  # of which each of two processes has half
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(placement, "_WEIGHTS_SHARE", 1.0)


def where(folder: Path, precision: str = "fp32", **how: str) -> int:
    return placement.placement(folder, precision=precision, device=CPU, **how).processes


def test_the_words_of_the_configuration_are_the_ways_there_are() -> None:
    assert DECODING == (AUTO, ONE, TENSOR)


@pytest.mark.parametrize(
    ("way", "large", "fits", "processes"),
    [
        (AUTO, False, True, 1),
        (AUTO, False, False, 2),
        (AUTO, True, True, 2),  # said to be too large
        (TENSOR, False, True, 2),
        (ONE, True, False, 1),
    ],
)
def test_who_holds_a_target(
    folder: Path, two: None, monkeypatch: pytest.MonkeyPatch, way: str, large: bool, fits: bool, processes: int
) -> None:
    room_for(monkeypatch, folder, precision="fp32" if fits else "bf16")
    with placing(way, large=large):
        assert where(folder) == processes
        assert where(folder, way=TENSOR) == 2, "who loads it may know better"
    assert where(folder) == (1 if fits else 2), "outside of it the size decides"


def test_one_process_holds_its_targets_whatever_is_asked_for(folder: Path) -> None:
    with placing(TENSOR, large=True):
        assert where(folder) == 1
        assert device_name(CPU, folder) == device_name(CPU)


def test_each_arithmetic_is_placed_by_its_own_size(folder: Path, two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(monkeypatch, folder, precision="bf16")
    assert (where(folder, "fp32"), where(folder, "bf16")) == (2, 1)
    # Packed weights are read as fp32, or kept as bf16: those that are too large are not on offer, as they cannot be
    # spread.
    offered = precisions_for(folder, CPU)
    assert [name for name in offered if not is_packed(name)] == ["fp32", "bf16"]
    assert set(offered) <= {"fp32", "bf16", "bf16_packed"}
    assert device_name(CPU, folder).startswith(f"{device_name(CPU)}, 2 processes except in bf16")


def test_a_target_that_lies_whole_is_decoded_as_on_one_process(
    folder: Path, two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, folder, precision="fp32")
    assert precisions_for(folder, CPU) == available_precisions(CPU)
    assert device_name(CPU, folder) == device_name(CPU), "its figures are those of one process"
    with placing(TENSOR):
        assert precisions_for(folder, CPU) == ["fp32", "bf16"]
        assert device_name(CPU, folder) == f"{device_name(CPU)}, 2 processes"


def test_what_is_loaded_lies_there_and_one_line_says_why(
    folder: Path, two: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    room_for(monkeypatch, folder, precision="fp32")
    for precision in ("fp32", "bf16"):
        loaded = load_target(folder, precision=precision, device=CPU)
        assert type(loaded) is CausalModel and loaded.precision == precision
    [line] = [record for record in caplog.records if "holds the target" in record.message]
    assert line.levelno == logging.INFO
    assert line.message == (
        "the first process holds the target alone, the others wait: "
        "0.00 GiB of weights in fp32, of at most 0.00 on one device"
    )


def test_a_target_that_should_be_spread_and_cannot_be_is_warned_of(
    two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_model(tmp_path / "target", layers=1)
    monkeypatch.setattr(placement, "undivided", lambda folder, *, size: "its heads are odd")
    with placing(TENSOR):
        assert type(load_target(folder, precision="fp32", device=CPU)) is CausalModel
    [line] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert line.message == "the first process holds the target alone, the others wait: its heads are odd"


def test_a_gpu_has_room_for_a_share_of_its_own_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 5 * weight_bytes(folder, precision="fp32") // 3  # of which three fifths are for weights

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert fits_one(folder, precision="bf16", device=torch.device("cuda"), size=2)[0]
    Properties.total_memory -= 3
    assert not fits_one(folder, precision="fp32", device=torch.device("cuda"), size=2)[0]


def test_weights_are_counted_in_the_arithmetic_they_will_have(folder: Path) -> None:
    assert weight_bytes(folder, precision="fp32") == 2 * weight_bytes(folder, precision="bf16")
    # The file holds fp32 weights and a header.
    assert 0 < (folder / "model.safetensors").stat().st_size - weight_bytes(folder, precision="fp32") < 10_000


@pytest.mark.parametrize(
    ("family", "changes", "size", "reason"),
    [
        ("llama", {"num_attention_heads": 9, "hidden_size": 36, "num_key_value_heads": 3}, 2, "(3 processes would do)"),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}, 3, "(2 or 4 processes would do)"),
        ("llama", {"num_key_value_heads": 1}, 2, "cannot be shared out among 2 processes"),
        ("gpt2", {}, 2, "no tensor-parallel plan for gpt2"),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}, 4, ""),
    ],
)
def test_a_target_that_cannot_be_shared_out_stays_whole_and_says_why(
    tmp_path: Path, family: str, changes: dict[str, int], size: int, reason: str
) -> None:
    family_config(family, **changes).save_pretrained(tmp_path)
    found = undivided(tmp_path, size=size)
    assert found.endswith(reason) and bool(found) == bool(reason)
