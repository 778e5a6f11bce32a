"""Where a draft's pass spends its time: reading what was verified, the backbone, the sequential part, drawing tokens.

Timed after a score on its loaded drafts, over a context of noise; decides nothing.
"""

import statistics
import time
from collections.abc import Callable

import torch

from inference.drafters import Ask, Drafter
from inference.drafters.feature import FeatureDrafter, propose_blocks
from inference.drafters.mixed import MixedDrafter
from inference.feature_networks import FeatureNetwork
from inference.lookahead.fixed import FixedLookahead
from inference.randomness import TorchSource
from inference.sampling_settings import SamplingSettings

PARTS = ("read", "block", "slots", "draw")
_CONTEXT_TOKENS = 128
_REPEATS = 15


def draft_parts(drafter: Drafter, *, tokens: int) -> dict[str, float] | None:
    """Seconds of drafting `tokens` tokens by part, medians; None for drafts that are no feature network.

    `read` projects the features of one verified token; `block` is what all slots share (the backbone of a block
    drafter, next to nothing for EAGLE-3); `slots` is what runs once a token (a sequential head, or EAGLE-3's layer);
    `draw` is all else: choosing tokens and putting the proposal together.
    """
    inner = drafter.draft if isinstance(drafter, MixedDrafter) else drafter
    return _timed_parts(inner.network, min(tokens, inner.network.block)) if isinstance(inner, FeatureDrafter) else None


@torch.inference_mode()
def _timed_parts(network: FeatureNetwork, tokens: int) -> dict[str, float]:
    device = next(network.parameters()).device
    source = torch.Generator().manual_seed(0)
    text = torch.randint(network.shape.vocab, (_CONTEXT_TOKENS + _REPEATS + 2,), generator=source).to(device)
    width = len(network.taps) * network.shape.hidden
    features = torch.randn(_CONTEXT_TOKENS, width, generator=source).to(device)
    cache = network.new_cache()
    network.read(features, text[1 : _CONTEXT_TOKENS + 1], cache)
    settings, policy, random = SamplingSettings(), FixedLookahead(tokens), TorchSource.seeded(0, device=device)

    def run_slots(anchors: torch.Tensor) -> None:
        block = network.begin_block(anchors, cache)
        for slot in range(tokens):
            network.step(block, slot, anchors, confidence=False)

    seconds: dict[str, list[float]] = {name: [] for name in ("read", "block", "both", "whole")}
    # The first repeat warms up; every one has a longer context, as in decoding.
    for end in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + _REPEATS + 1):
        anchors, context = text[end : end + 1], text[: end + 1]
        ask = Ask(context, tokens, policy, settings, random)
        work: dict[str, Callable[[], object]] = {
            "block": lambda anchors=anchors: network.begin_block(anchors, cache),  # type: ignore[misc]
            "both": lambda anchors=anchors: run_slots(anchors),  # type: ignore[misc]
            "whole": lambda ask=ask: propose_blocks(network, cache, [ask]),  # type: ignore[misc]
            "read": lambda end=end: network.read(features[:1], text[end + 1 : end + 2], cache),  # type: ignore[misc]
        }
        for name, part in work.items():
            seconds[name].append(_seconds(part, device))
    median = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    return {
        "read": median["read"],
        "block": median["block"],
        "slots": max(0.0, median["both"] - median["block"]),
        "draw": max(0.0, median["whole"] - median["both"]),
    }


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
