"""Calibrate the chances a policy goes by, on validation prompts: fitted on half of them, judged on the other half.

Decodes with whole blocks, so that every position gets verdicts, and by captured rounds where the arm has them. The fit
that was judged is the one that is used, where it was judged better than the confidences as they are; if margins predict
better than the draft's own confidence, chances come from them.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference.block_length import record_validation
from inference.calibration import CalibrationRound
from inference.lookahead import Chances
from inference.reliability import CalibrationReport, fit_margin, report
from inference.sampling_settings import SamplingSettings
from inference.scoring import Arm, ScorePrompt
from inference.statistics import Estimate
from pipelines.calibration_plot import plot_reliability
from pipelines.files import write_json, write_text
from pipelines.report import markdown_table

logger = logging.getLogger(__name__)


def calibrate(
    arm: Arm,
    prompts: Sequence[ScorePrompt],
    *,
    tokens: int,
    settings: Sequence[SamplingSettings],
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    seed: int,
    folder: Path,
) -> Chances:
    """Chances of one draft; `calibration-<arm>.json`, `.md` and `.png` go into the folder.

    Args:
        arm: its lookahead is not used; captured, it decodes by captured rounds.
        prompts: validation prompts, at least two of a domain; every other one is for the fit.
        tokens: block that is proposed.
        settings: every prompt is decoded under each.
        max_new_tokens: per request.
        stop_tokens: end an answer.
        seed: of the run.
        folder: of the score.

    Returns:
        Confidences as they are where the draft proposed nothing in one of the halves.
    """
    halves: list[list[CalibrationRound]] = []
    for half in _halves(prompts):
        rounds: list[CalibrationRound] = []
        for prompt in half:
            for setting in settings:
                recording = record_validation(
                    arm,
                    prompt,
                    tokens=tokens,
                    settings=setting,
                    max_new_tokens=max_new_tokens,
                    stop_tokens=stop_tokens,
                    seed=seed,
                )
                rounds += [_round(prompt.id, *seen) for seen in recording.rounds]
        halves.append(rounds)
    if not all(halves):
        logger.warning(
            "calibration %s: no verdicts to fit or to judge by from %d validation prompts; confidences are taken as "
            "they are (two prompts of a domain are needed at least: see budget.responses)",
            arm.name,
            len(prompts),
        )
        return Chances()
    found = report(*halves, seed=seed)
    curves = _curves(halves[0], len(found.positions))
    source = found.source.source if curves else "confidence"
    chances = Chances(source, found.used, curves)
    _write(arm.name, found, chances, folder)
    first = found.positions[0]
    logger.info(
        "calibration %s%s: error of the first position %.3f, calibrated %.3f; AUC %.2f, of margins %.2f; goes by %s",
        arm.name,
        " by captured rounds" if arm.captured is not None else "",
        first.error_before.value,
        first.error_after.value,
        first.auc.value,
        first.margin_auc.value,
        _goes_by(chances),
    )
    return chances


def _goes_by(chances: Chances) -> str:
    if chances.source == "margin":
        return "the margins"
    return "the calibrated confidence" if chances.calibration else "the confidence as it is"


def _halves(prompts: Sequence[ScorePrompt]) -> tuple[list[ScorePrompt], list[ScorePrompt]]:
    """Every other prompt of each domain."""
    halves: tuple[list[ScorePrompt], list[ScorePrompt]] = ([], [])
    seen: Counter[str] = Counter()
    for prompt in prompts:
        halves[seen[prompt.domain] % 2].append(prompt)
        seen[prompt.domain] += 1
    return halves


def _round(prompt: str, signals: Sequence[Any], num_accepted: int) -> CalibrationRound:
    confidences = tuple(known.confidence for known in signals)
    return CalibrationRound(prompt, confidences, tuple(known.margin for known in signals), num_accepted)


def _curves(rounds: list[CalibrationRound], positions: int) -> tuple[tuple[float, float], ...]:
    """Margin curves of the positions that have one, from the first on."""
    estimator, curves = fit_margin(rounds), []
    for position in range(1, positions + 1):
        curve = estimator.parameters(position)
        if curve is None:
            break
        curves.append(curve)
    return tuple(curves)


def _write(name: str, found: CalibrationReport, chances: Chances, folder: Path) -> None:
    write_json(folder / f"calibration-{name}.json", _plain(asdict(found)) | {"chances": chances.to_json()})
    write_text(folder / f"calibration-{name}.md", calibration_markdown(name, found, chances))
    plot_reliability(found, folder / f"calibration-{name}.png")


def calibration_markdown(name: str, found: CalibrationReport, chances: Chances) -> str:
    """The figures per position, and which chances are used, and why."""
    header = ["position", "proposed", "verdicts", "T", "ECE", "ECE calibrated", "AUC", "AUC of margins"]
    rows = [
        [
            str(at.position),
            str(at.proposed),
            str(at.observations),
            f"{found.calibration.temperature(at.position):.2f}",
            *(_cell(e) for e in (at.error_before, at.error_after, at.auc, at.margin_auc)),
        ]
        for at in found.positions
    ]
    source = found.source
    verdict = (
        "The margins predict better, and are used."
        if chances.source == "margin"
        else "The draft's own confidence is used: the margins are not surely better."
        + ("" if chances.calibration else " As it is: calibrated, it was judged no nearer to what happened.")
    )
    return (
        f"# Calibration of {name}\n\nFitted on half of the validation prompts, judged on the other half; intervals are "
        "95 % bootstraps over prompts. ECE is of the chance that the whole prefix stands, AUC of the token's own "
        f"chance given the earlier ones.\n\n{markdown_table(header, rows)}\n"
        f"Mean log loss over {source.observations} verdicts: confidence {source.confidence_loss:.3f}, margins "
        f"{source.margin_loss:.3f}, difference {_cell(source.difference)}. {verdict}\n"
    )


def _cell(estimate: Estimate) -> str:
    return "-" if math.isnan(estimate.value) else str(estimate)


def _plain(data: Any) -> Any:
    """Not a number becomes null: JSON has no such number."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
