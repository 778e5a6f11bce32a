"""Target features: what chosen decoder layers of any causal LM put out, collected by hooks while it runs anyway.

Layer ids are decoder indices, as in DFlash and DSpark checkpoints: id i is the raw output of layer i, which
transformers calls `hidden_states[i + 1]`; -1 is the input of the first layer. EAGLE-3 checkpoints and vLLM's `aux` ids
count one higher. Knows nothing of drafting.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from inference.layers import decoder_layers
from inference.taps import EMBEDDING


class Features:
    """Collects the tapped layers of the latest pass.

    Attributes:
        taps: layer ids, in the order in which their outputs are concatenated.
    """

    def __init__(self, taps: Sequence[int]) -> None:
        self.taps = tuple(taps)
        self._latest: dict[int, torch.Tensor] = {}

    def put(self, tap: int, output: torch.Tensor) -> None:
        """Keep what one layer put out, `[batch, n, D]`."""
        self._latest[tap] = output.detach()

    def take(self) -> torch.Tensor:
        """Features of the latest pass, `[batch, n, m * D]` for m taps, and forget them.

        Raises:
            RuntimeError: no pass was made since the last call.
        """
        if len(self._latest) < len(self.taps):
            raise RuntimeError("no pass was made since features were last taken")
        outputs = [self._latest[tap] for tap in self.taps]
        self._latest.clear()
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


@contextmanager
def tapped(model: PreTrainedModel, taps: Sequence[int]) -> Iterator[Features]:
    """Collect features of every pass made inside the block; hooks are gone afterwards. No taps, no hooks.

    Example:
        with tapped(model, [1, 14, 27]) as features:
            model(input_ids=tokens[None])
            rows = features.take()[0]
    """
    features = Features(taps)
    layers = decoder_layers(model) if taps else nn.ModuleList()
    handles = []
    for tap in taps:
        if tap == EMBEDDING:
            handles.append(layers[0].register_forward_pre_hook(_input_hook(features), with_kwargs=True))
        else:
            handles.append(layers[tap].register_forward_hook(_output_hook(features, tap)))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(features: Features, tap: int) -> Any:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        features.put(tap, output[0] if isinstance(output, tuple) else output)

    return keep


def _input_hook(features: Features) -> Any:
    def keep(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        features.put(EMBEDDING, inputs[0] if inputs else named["hidden_states"])

    return keep
