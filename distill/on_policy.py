"""Conversations that the student itself writes, for the target to score: what it will meet when it drafts.

A student that only ever reads the target's text is never told how to go on from its own. So in a share of the
micro-batches it answers the prompts itself, and the loss is the divergence from the target at the tokens it wrote.
Nothing here runs the target or knows of losses.

Source: generalized knowledge distillation (Agarwal et al. 2023, arXiv 2306.13649); for drafts DistillSpec (Zhou et al.
2023, arXiv 2310.08461). Gradients do not go through the sampling.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from distill.conversation import Conversation
from inference.errors import InputError
from inference.generation import generate_batch
from inference.layers import decoder_layers
from inference.model import CausalModel
from inference.sampling_settings import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """How much the student writes itself, and how.

    Attributes:
        share: of the micro-batches, between 0 and 1.
        max_new_tokens: longest answer.
        temperature: of the student; 0 is greedy.
        stop_tokens: end an answer.
    """

    share: float
    max_new_tokens: int
    temperature: float
    stop_tokens: frozenset[int]

    def chosen(self, index: int, *, seed: int) -> bool:
        """Whether the student writes a micro-batch: a pure function, drawn for each by itself."""
        generator = torch.Generator().manual_seed(_seed(seed, index, 0))
        return bool(torch.rand((), generator=generator, dtype=torch.float64) < self.share)

    def written(
        self, student: CausalModel, samples: Sequence[Conversation], index: int, *, seed: int, max_tokens: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Let the student answer the prompts of some conversations, up to their first response.

        Args:
            student: in training; every part of it is left in the mode it was in.
            samples: of a micro-batch.
            index: of the micro-batch.
            seed: with the index, fixes every draw.
            max_tokens: of prompt and answer together.

        Returns:
            for each sample tokens int64 `[T]`, prompt and answer, and mask bool `[T]`, true where the student wrote.

        Raises:
            InputError: a prompt does not fit the student's context.
        """
        prompts = [sample.tokens[: max(1, sample.first_response)].tolist() for sample in samples]
        room = max_tokens - min(len(prompt) for prompt in prompts)
        with _eval_mode(student.model):
            responses = generate_batch(
                student,
                prompts,
                settings=SamplingSettings(temperature=self.temperature),
                max_new_tokens=min(self.max_new_tokens, room),
                stop_tokens=self.stop_tokens,
                seed=_seed(seed, index, 1),
            )
        rows = [
            torch.tensor((prompt + response.tokens)[:max_tokens])
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return rows, [torch.arange(len(row)) >= len(prompt) for row, prompt in zip(rows, prompts, strict=True)]


def check_whole(target: CausalModel) -> None:
    """Refuse a target that cannot score what a student wrote.

    Raises:
        InputError: it has no layers.
    """
    try:
        whole = len(decoder_layers(target.model)) > 0
    except InputError:
        whole = False
    if not whole:
        raise InputError(
            "the target is its head alone and cannot score what a student writes",
            where="draft.on_policy_share",
            mend="load the whole target, or set it to 0",
        )


def _seed(seed: int, index: int, purpose: int) -> int:
    """A seed for each micro-batch and purpose: were it one for both, a chosen batch would begin with a small draw."""
    return seed * 2_000_003 + 2 * index + purpose


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every part has its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
