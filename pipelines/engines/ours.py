"""The job in our own decoder: what engines are compared with."""

import time
from pathlib import Path

import torch

from inference.decoder import decode
from inference.drafters import Drafter, LoadContext, Proposal, load_drafter
from inference.drafters.feature import FeatureDrafter
from inference.lookahead import Lookahead
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.randomness import Source, TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from pipelines.engines.job import Job, Outcome


def load_draft(draft: Path, target: CausalModel, *, tokens: int) -> Drafter:
    """The draft itself, not its export, proposing as many tokens as engines do."""
    assert target.folder is not None, "targets here come from folders"
    drafter = load_drafter(LoadContext(draft, target.folder, target, target.precision or "fp32", target.device))
    if isinstance(drafter, FeatureDrafter):
        drafter.network.block = max(drafter.network.block, tokens)  # EAGLE-3 steps as often as it is asked to
    return drafter


class LikeliestTokens:
    """Proposes a draft's likeliest tokens as certain ones, whatever the temperature, as vLLM and llama.cpp do.

    Lossless like any proposal; less is accepted of sampled answers than of tokens drawn from the draft's rows.
    """

    kind = "likeliest"

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    def begin(self, prompt: torch.Tensor) -> None:
        """See `Drafter.begin`."""
        self._drafter.begin(prompt)

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        """See `Drafter.propose`."""
        greedy = SamplingSettings(temperature=0.0)
        return self._drafter.propose(context, limit=limit, lookahead=lookahead, settings=greedy, generator=generator)

    def rollback(self, num_accepted: int) -> None:
        """See `Drafter.rollback`."""
        self._drafter.rollback(num_accepted)

    def nbytes(self) -> int:
        """See `Drafter.nbytes`."""
        return self._drafter.nbytes()


class LikeliestTokensOfFeatures(LikeliestTokens):
    """The same for a draft that reads the target's features."""

    def __init__(self, drafter: FeatureDrafter) -> None:
        super().__init__(drafter)
        self.taps, self.read = drafter.taps, drafter.read


def as_engines_draft(drafter: Drafter, *, sampled: bool) -> Drafter:
    """A drafter that draws its tokens, or takes the likeliest ones, as an engine does."""
    if sampled:
        return drafter
    return LikeliestTokensOfFeatures(drafter) if isinstance(drafter, FeatureDrafter) else LikeliestTokens(drafter)


def run(job: Job, target: CausalModel, drafter: Drafter) -> Outcome:
    """Answer every prompt under a fixed length of proposals; see `Outcome`."""
    settings = SamplingSettings(temperature=job.temperature)
    request = Request(settings=settings, max_new_tokens=job.max_tokens, stop_tokens=frozenset(job.stop_tokens))
    answers, seconds = [], []
    rounds = proposed = 0
    accepted_at = [0] * job.tokens
    for index, prompt in enumerate(job.prompts):
        started = time.perf_counter()
        decoded = decode(
            target,
            drafter,
            torch.tensor(prompt, device=target.device),
            request=request,
            lookahead=FixedLookahead(job.tokens),
            generator=TorchSource.seeded(job.seed + index, device=target.device),
        )
        seconds.append(time.perf_counter() - started)
        answers.append(decoded.tokens)
        rounds += sum(count for length, count in decoded.blocks.items() if length)
        proposed += sum(length * count for length, count in decoded.blocks.items())
        for position, count in enumerate(decoded.accepted):
            accepted_at[position] += count
    return Outcome("dspark", answers, seconds, rounds, proposed, sum(accepted_at), accepted_at)
