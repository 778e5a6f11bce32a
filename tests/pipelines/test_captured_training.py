"""Drafts trained by captured steps through the command line, on a CPU uncaptured: they learn what the others do."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.build import HISTORY_FILE
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


def test_students_and_a_draft_without_few_shapes_are_trained_as_ever(
    tiny_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CapturedEngine, "_captured", lambda *_: pytest.fail("a student's batches have many shapes"))
    _built(tiny_place.again(tmp_path / "student"), "trainer.captured=on")
