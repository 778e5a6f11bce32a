"""Calibration and cost tables in the schemas of engines that read some; SGLang does, for DSpark."""

from collections.abc import Mapping, Sequence
from typing import Any

STS_FILE, SPS_FILE = "sglang_sts.json", "sglang_sps.json"


def sglang_temperatures(temperatures: Sequence[float], *, tokens: int, dataset: str) -> dict[str, Any]:
    """Temperatures of the confidences by position: SGLang takes sigmoid(logit / T_k), as `inference.calibration` does.

    Args:
        temperatures: T_1..; positions beyond the last have the last.
        tokens: proposed a round; as many temperatures are written.
        dataset: what they were fitted on.
    """
    filled = [float(temperatures[min(k, len(temperatures) - 1)]) for k in range(tokens)]
    return {"temperatures": filled, "dataset": dataset}


def sglang_steps(passes: Mapping[int, float]) -> dict[str, Any]:
    """Target passes a second by tokens verified together.

    Args:
        passes: seconds of a pass by its tokens.
    """
    widths = sorted(passes)
    return {
        "sample_batch_tokens": widths,
        "sample_steps_per_sec": [1.0 / passes[width] for width in widths],
        "max_batch_tokens": widths[-1],
    }
