"""Drafts trained by captured steps through the command line, on a CPU uncaptured: they learn what the others do."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines import training
from pipelines.build import HISTORY_FILE
from pipelines.company import Company
from tests.pipelines.test_feature_drafts import KINDS, THREE
from tests.pipelines.tiny import Workplace, read, run
from train.engines.captured import CapturedEngine


def _losses(place: Workplace, kind: str) -> list[float]:
    return [line["loss"] for line in read(place.draft(kind) / HISTORY_FILE) if "loss" in line]


def _built(place: Workplace, *words: str) -> str:
    for stage in ("corpus", "build"):
        text, code = run(place.words(*words, stage=stage))
        assert code == 0, text
    return text


def test_captured_steps_learn_what_the_others_do(
    tiny_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    captures: list[int] = []
    capture = CapturedEngine._captured

    def counted(engine: CapturedEngine, batch: Any) -> Any:
        captures.append(len(batch))
        return capture(engine, batch)

    monkeypatch.setattr(CapturedEngine, "_captured", counted)
    off, on = (tiny_place.again(tmp_path / name) for name in ("off", "on"))
    _built(off, *THREE, "trainer.log_every_steps=1", "trainer.captured=off")
    assert not captures
    said = _built(on, *THREE, "trainer.log_every_steps=1", "trainer.captured=on")
    assert len(captures) >= len(KINDS), "some shapes of every draft"
    for kind in KINDS:
        assert f"{kind}: 0.0 GiB of the corpus onto the device" in said
        losses = _losses(off, kind)
        assert len(losses) == 8 and _losses(on, kind) == pytest.approx(losses, rel=1e-4)


@dataclass(frozen=True)
class _Two(Company):
    """Two processes, of which the other one has so much room."""

    other: float = math.inf

    def of_all(self, said: str) -> list[str]:
        return [said, str(self.other)]


@pytest.mark.parametrize(("other", "fits"), [(math.inf, True), (2.0**34 + 2**20, True), (2.0**34, False)])
def test_a_corpus_lies_on_all_devices_or_on_none(other: float, fits: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    task: Any = SimpleNamespace(resident_bytes=lambda: 1000, target=SimpleNamespace(device=torch.device("cpu")))
    assert training._all_have_room(task, "eagle3", _Two(other=other)) is fits
    [said] = [record.getMessage() for record in caplog.records]
    assert ("onto the device" in said) is fits and ("of which 16.0 are free, so steps run" in said) is not fits


def test_students_and_a_draft_without_few_shapes_are_trained_as_ever(
    tiny_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CapturedEngine, "_captured", lambda *_: pytest.fail("a student's batches have many shapes"))
    _built(tiny_place.again(tmp_path / "student"), "trainer.captured=on")
