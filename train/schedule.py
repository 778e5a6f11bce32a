"""Learning-rate factors as a pure function of the step; no state, so nothing to save and nothing to restore."""

import math

SCHEDULES = ("constant", "linear", "cosine", "wsd")


def factor(
    step: int,
    *,
    schedule: str,
    steps: int,
    warmup_share: float = 0.0,
    final_factor: float = 0.0,
    decay_share: float = 0.2,
) -> float:
    """Return what the base learning rate is multiplied by at a step.

    Warm-up rises in a straight line and reaches 1 at its last step. After it, `constant` stays at 1; `linear` and
    `cosine` fall from 1 towards `final_factor`, which they would reach one step after the last, so that no step is
    wasted on a rate of zero; `wsd` (warm-up, stable, decay) stays at 1 and falls linearly over the last `decay_share`
    of the steps.

    Args:
        step: step about to be made, counted from 0.
        schedule: one of `SCHEDULES`.
        steps: steps of the whole run.
        warmup_share: share of the steps spent warming up, rounded up to whole steps.
        final_factor: where a falling schedule ends.
        decay_share: share of the steps over which `wsd` falls, rounded up to whole steps.

    Returns:
        A factor between 0 and 1.
    """
    warmup = _whole(warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    start = max(warmup, steps - _whole(decay_share * steps)) if schedule == "wsd" else warmup
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, steps - start))
    fall = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return final_factor + (1.0 - final_factor) * fall


def _whole(steps: float) -> int:
    """Round up, forgiving binary noise: 0.07 * 100 is 7 steps, not 8."""
    return math.ceil(round(steps, 6))
