"""transformers as anyone runs it: a model loaded in one dtype, its own `generate`, and its assisted generation.

The same call also drives a model of ours, packed weights and attention included, so that what is left between the two
is the decoding loop alone.
"""

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from inference.decoder import up_to_stop
from inference.generation import left_padded
from inference.loading import quiet_transformers
from inference.model import CausalModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TRIES = 3


@dataclass
class Plain:
    """A model that transformers decodes with.

    Attributes:
        name: of its arithmetic.
        model: the target.
        assistant: the draft; None without one.
        passes: of the target so far, those of prompts included.
    """

    name: str
    model: PreTrainedModel
    assistant: PreTrainedModel | None = None
    passes: int = field(default=0, init=False)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the target's passes inside the block; outside it a model of ours has no hook that could slow it."""

        def count(*_: object) -> None:
            self.passes += 1

        handle = self.model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()

    @classmethod
    def load(cls, folder: Path, dtype: str, *, device: torch.device, draft: Path | None = None) -> "Plain":
        """Load target and draft in one dtype, with transformers' own defaults else."""
        return cls(dtype, _loaded(folder, dtype, device), None if draft is None else _loaded(draft, dtype, device))

    @classmethod
    def of(cls, target: CausalModel, draft: CausalModel | None = None) -> "Plain":
        """Models of ours, as they are."""
        return cls(f"our {target.precision}", target.model, None if draft is None else draft.model)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_new_tokens: int,
        stop_tokens: frozenset[int],
        seed: int,
        num_draft_tokens: int = 0,
    ) -> list[list[int]]:
        """Answer a batch, padded on the left; what a row holds after its stop token does not count.

        Args:
            prompts: token ids.
            temperature: 0 is greedy.
            max_new_tokens: longest answer.
            stop_tokens: each ends a row.
            seed: of sampled answers.
            num_draft_tokens: proposed a round, always as many; 0 for target-only decoding.
        """
        pad = min(stop_tokens, default=0)
        ids, mask = left_padded(prompts, device=self.model.device, pad=pad)
        options: dict[str, Any] = {}
        if num_draft_tokens:
            assert self.assistant is not None, "assisted generation has a draft"
            settings: Any = self.assistant.generation_config
            settings.num_assistant_tokens = num_draft_tokens
            settings.num_assistant_tokens_schedule = "constant"
            settings.assistant_confidence_threshold = 0.0
            options["assistant_model"] = self.assistant
        drawn: dict[str, Any] = {"do_sample": False}
        if temperature:
            drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
        generating: Any = self.model  # only some classes of transformers' own declare `generate`
        with self._counted():
            written = generating.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(stop_tokens) or None,
                pad_token_id=pad,
                **drawn,
                **options,
            )
        return [up_to_stop(row, stop_tokens)[0] for row in written[:, ids.shape[1] :].tolist()]


def _loaded(folder: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False
        )
    torch.nn.Module.to(model, device)
    model.eval()
    return model


def fastest(
    load: Callable[[str], Plain], work: Callable[[Plain], int], *, clock: Callable[[], float] = time.perf_counter
) -> tuple[Plain, dict[str, float]]:
    """The dtype in which transformers does a piece of work fastest here: in turns, the best of three of each.

    Args:
        load: a model in a dtype.
        work: what is timed, after once untimed; returns the tokens written.
        clock: seconds.

    Returns:
        The faster model, and tokens per second by dtype.
    """
    models = {dtype: load(dtype) for dtype in DTYPES}
    found = dict.fromkeys(models, 0.0)
    for model in models.values():
        work(model)
    for _ in range(_TRIES):
        for dtype, model in models.items():
            began = clock()
            count = work(model)
            found[dtype] = max(found[dtype], count / (clock() - began))
    return models[max(found, key=lambda dtype: found[dtype])], found


def chosen_note(found: dict[str, float], chosen: str) -> str:
    """A sentence on what `fastest` took."""
    speeds = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    version = importlib.metadata.version("transformers")
    return f"transformers {version} runs in {chosen}, the faster here (tokens/s on one piece of the work: {speeds})"
