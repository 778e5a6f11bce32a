"""Chances are fitted on half of the validation prompts, judged on the other, written down, and used."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from inference import block_length, calibration, reliability
from inference.block_length import decode_validation
from inference.drafters import Drafter
from inference.drafters.feature import FeatureDrafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.lookahead import Chances, RecordingLookahead
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.sampling_settings import SamplingSettings
from inference.scoring import Arm, ScorePrompt
from pipelines.calibrate import _halves, calibrate
from pipelines.stage_config import ScoreConfig
from tests.inference.law import tiny_model
from tests.inference.test_feature_drafts import CONFIGS, network_for
from tests.inference.test_graphed_arms import captured, lean

VOCAB = 12
PROMPTS = [
    ScorePrompt(f"{domain}/{n}", domain, torch.randint(VOCAB, (5,), generator=torch.Generator().manual_seed(n)))
    for n in range(4)
    for domain in ("chat", "code")
]


def _calibrated(drafter: Drafter, folder: Path, prompts: list[ScorePrompt] = PROMPTS) -> Chances:
    arm = Arm("draft", tiny_model(0, vocab=VOCAB), drafter, FixedLookahead(0))
    return calibrate(
        arm,
        prompts,
        tokens=2,
        settings=[SamplingSettings(temperature=t) for t in (0.0, 1.0)],
        max_new_tokens=40,
        stop_tokens=frozenset(),
        seed=0,
        folder=folder,
    )


@pytest.fixture(scope="module")
def model_drafter() -> ModelDrafter:
    return ModelDrafter(tiny_model(3, vocab=VOCAB, layers=1))


def test_what_was_measured_is_written_down_and_used(model_drafter: ModelDrafter, tmp_path: Path) -> None:
    chances = _calibrated(model_drafter, tmp_path)
    data = json.loads((tmp_path / "calibration-draft.json").read_text(), parse_constant=pytest.fail)
    assert Chances.from_json(data["chances"], where="here") == chances
    assert chances.calibration is not None and len(chances.calibration.temperatures) == 2
    # Over 50 verdicts on the first position, which confidences of an unrelated draft do not happen to fit.
    first = data["positions"][0]
    assert first["proposed"] == first["observations"] > 50 and chances.calibration.temperatures[0] != 1.0
    assert first["error_before"]["value"] != first["error_after"]["value"]
    page = (tmp_path / "calibration-draft.md").read_text()
    assert "| position | proposed | verdicts |" in page and "Mean log loss over" in page
    assert (tmp_path / "calibration-draft.png").read_bytes().startswith(b"\x89PNG")


def test_a_calibration_that_was_judged_worse_is_not_used(
    model_drafter: ModelDrafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = calibration.fit_calibration

    def spoilt(rounds: list[calibration.CalibrationRound], **options: Any) -> calibration.Calibration:
        return calibration.Calibration(tuple(0.1 * t for t in fitted(rounds, **options).temperatures))

    monkeypatch.setattr(reliability, "fit_calibration", spoilt)
    with caplog.at_level(logging.INFO, logger="pipelines.calibrate"):
        chances = _calibrated(model_drafter, tmp_path)
    assert (chances.source, chances.calibration) == ("confidence", None), "margins are compared with what is used"
    assert "goes by the confidence as it is" in caplog.text
    assert "calibrated, it was judged no nearer to what happened" in (tmp_path / "calibration-draft.md").read_text()


def test_the_same_prompts_give_the_same_chances(model_drafter: ModelDrafter, tmp_path: Path) -> None:
    assert _calibrated(model_drafter, tmp_path) == _calibrated(model_drafter, tmp_path)


def test_nothing_is_judged_on_what_it_was_fitted_on() -> None:
    halves = _halves(PROMPTS)
    assert {p.id for p in halves[0]} & {p.id for p in halves[1]} == set()
    # Both halves hold both domains.
    assert [sorted(p.id for p in half) for half in halves] == [
        ["chat/0", "chat/2", "code/0", "code/2"],
        ["chat/1", "chat/3", "code/1", "code/3"],
    ]


def test_look_up_has_confidences_and_no_margins(tmp_path: Path) -> None:
    chances = _calibrated(LookupDrafter(LookupSettings(longest=2, shortest=1)), tmp_path)
    assert (chances.source, chances.curves) == ("confidence", ())
    data = json.loads((tmp_path / "calibration-draft.json").read_text())
    assert data["positions"][0]["margin_auc"]["value"] is None


@pytest.mark.parametrize(("drafter", "prompts"), [(NoDrafter(), PROMPTS), (None, PROMPTS[:1])])
def test_without_verdicts_confidences_are_taken_as_they_are(
    drafter: Drafter | None,
    prompts: list[ScorePrompt],
    model_drafter: ModelDrafter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="pipelines.calibrate"):
        assert _calibrated(drafter or model_drafter, tmp_path, prompts) == Chances()
    assert "two prompts of a domain are needed" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_recording_has_a_signal_for_every_token(model_drafter: ModelDrafter) -> None:
    recording = RecordingLookahead(2)
    arm = Arm("draft", tiny_model(0, vocab=VOCAB), model_drafter, FixedLookahead(0))
    result = decode_validation(arm, PROMPTS[0], recording, SamplingSettings(temperature=1.0), 30, frozenset(), 0)
    assert sum(len(signals) for signals, _ in recording.rounds) == sum(n * r for n, r in result.blocks.items())
    assert sum(stood for _, stood in recording.rounds) == sum(result.accepted)
    for signals, stood in recording.rounds:
        assert 0 <= stood <= len(signals)
        assert all(0.0 < s.confidence <= 1.0 and s.margin >= 0.0 and math.isnan(s.entropy) for s in signals)


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_captured_rounds_give_the_chances_of_the_ordinary_decoder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = lean("llama", max_position_embeddings=256)
    network = network_for(CONFIGS[kind], target)
    found: list[dict[str, Any]] = []
    for decoder in (None, captured(target, network)):
        arm = Arm("draft", target, FeatureDrafter(network), FixedLookahead(0), decoder)
        folder = tmp_path / str(decoder is not None)
        folder.mkdir()
        with caplog.at_level(logging.INFO, logger="pipelines.calibrate"):
            calibrate(
                arm,
                PROMPTS,
                tokens=2,
                settings=[SamplingSettings()],
                max_new_tokens=40,
                stop_tokens=frozenset(),
                seed=0,
                folder=folder,
            )
        found.append(json.loads((folder / "calibration-draft.json").read_text()))
        monkeypatch.setattr(block_length, "decode", None)
    plain, by_rounds = found
    assert by_rounds["chances"]["source"] == plain["chances"]["source"]
    assert [at["observations"] for at in by_rounds["positions"]] == [at["observations"] for at in plain["positions"]]
    for name in ("error_before", "auc", "margin_auc"):
        values = [[at[name]["value"] for at in one["positions"]] for one in found]
        assert values[1] == pytest.approx(values[0], abs=1e-4), name
    lines = [record.getMessage() for record in caplog.records]
    assert [line.startswith("calibration draft by captured rounds: ") for line in lines] == [False, True]


def test_a_fit_and_a_test_take_two_prompts() -> None:
    with pytest.raises(ValueError, match=r"score.calibration_prompts is 1; use at least 2"):
        ScoreConfig(calibration_prompts=1)
