"""Losslessness on the real target, greedy: fp32 output token for token, with a draft of every kind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.drafts import DraftContext
from distill.drafts.quantized import Config as QuantizedConfig
from inference.cache import RollbackCache
from inference.decoder import decode
from inference.drafters import Drafter, LoadContext, Proposal, ReadsFeatures, load_drafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.lookahead import Lookahead
from inference.lookahead.confidence import ConfidenceLookahead
from inference.lookahead.fixed import FixedLookahead
from inference.randomness import Source, TorchSource
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from inference.target import stop_tokens
from tests.inference.real import CPU, DOMAINS, TOKENS, fp32_target, greedy_reference, prompts, target_folder
from tests.inference.real_drafts import KINDS, SEED, real_drafter

pytestmark = [pytest.mark.real, pytest.mark.slow]

# Look-up, the target's own weights and the seed agree with the target often enough to run as they are; these are their
# blocks. A checkout may lack the seed.
NATURAL = {"lookup": 5, "pretrained": 8, **({"seed": 4} if SEED.is_dir() else {})}
OWN_BLOCK, KNOWN_BLOCK = 2, 15
# Enough for the mutant: its output is wrong from the eighth token on.
MUTANT_TOKENS = 24


class Alternating:
    """A round of the draft's own, then one that proposes what the target is known to write next, and so on.

    An untrained draft is hardly ever accepted, which is slow and never leaves several tokens standing. Every third
    known block has one wrong token, at a place that moves, so that every number of tokens stands at some time. A draft
    that is passed over is not told of the round: it finds several new tokens in the context when its turn comes.
    """

    kind = "alternating"

    def __init__(self, inner: Drafter, known: list[int], lookahead: Lookahead) -> None:
        self.inner, self.known, self.lookahead = inner, known, lookahead
        self.rounds = 0
        self.own_proposed: list[int] = []
        self.own_accepted: list[int] = []
        self.known_accepted: list[int] = []

    @property
    def own_turn(self) -> bool:
        """Whether the latest round is the draft's own."""
        return self.rounds % 2 == 1

    def begin(self, prompt: torch.Tensor) -> None:
        """See `Drafter.begin`."""
        self.prompt_tokens = prompt.shape[0]
        self.inner.begin(prompt)

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        """See `Drafter.propose`; the draft gets a policy of its own."""
        self.rounds += 1
        if self.own_turn:
            limit = min(limit, self.lookahead.max_tokens)
            proposal = self.inner.propose(
                context, limit=limit, lookahead=self.lookahead, settings=settings, generator=generator
            )
            assert len(proposal) <= limit
            self.own_proposed.append(len(proposal))
            return proposal
        start = context.shape[0] - self.prompt_tokens
        tokens = context.new_tensor(self.known[start : start + limit])
        turn = self.rounds // 2
        if turn % 3 == 0 and len(tokens):
            place = (self.prompt_tokens + turn) % len(tokens)
            tokens[place] = (tokens[place] + 1) % fp32_target().vocab_size
        return Proposal(tokens)

    def rollback(self, num_accepted: int) -> None:
        """See `Drafter.rollback`."""
        if self.own_turn:
            self.own_accepted.append(num_accepted)
            self.inner.rollback(num_accepted)
        else:
            self.known_accepted.append(num_accepted)

    def nbytes(self) -> int:
        """See `Drafter.nbytes`."""
        return self.inner.nbytes()


class AlternatingReader(Alternating):
    """The same around a draft that reads the target's features: it reads those of every round."""

    def __init__(self, inner: ReadsFeatures, known: list[int], lookahead: Lookahead) -> None:
        super().__init__(inner, known, lookahead)  # type: ignore[arg-type]
        self.reader, self.taps = inner, inner.taps

    def read(self, features: torch.Tensor) -> None:
        """See `ReadsFeatures.read`."""
        self.reader.read(features)


def _greedy(
    drafter: Drafter, prompt: torch.Tensor, *, block: int, tokens: int = TOKENS, siblings: tuple[int, ...] = ()
) -> Decoded:
    target = fp32_target()
    return decode(
        target,
        drafter,
        prompt,
        request=Request(settings=SamplingSettings(), max_new_tokens=tokens, stop_tokens=stop_tokens(target)),
        lookahead=FixedLookahead(block, siblings=siblings),
        generator=TorchSource.seeded(0),
    )


# 8 prompts of each of 3 domains: 24 prompts x 128 tokens for every kind of draft.


@pytest.mark.timeout(900)
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("kind", NATURAL)
def test_greedy_output_equals_target_only_output(kind: str, domain: str, shared: Path) -> None:
    for prompt, expected in zip(prompts(domain), greedy_reference(domain, shared), strict=True):
        result = _greedy(real_drafter(kind, shared), prompt, block=NATURAL[kind])
        assert result.tokens == expected
        assert result.passes <= len(expected)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NATURAL])
def test_greedy_output_equals_target_only_output_with_a_draft_that_is_hardly_ever_right(
    kind: str, domain: str, shared: Path
) -> None:
    drafter = real_drafter(kind, shared)
    own_proposed, own_rejected, stood = list[int](), 0, set[int]()
    for prompt, expected in zip(prompts(domain), greedy_reference(domain, shared), strict=True):
        # DSpark has a confidence head, which ends blocks early in one domain.
        unsure = kind == "dspark" and domain == "chat"
        lookahead = ConfidenceLookahead(3, threshold=0.25) if unsure else FixedLookahead(OWN_BLOCK)
        alternating = AlternatingReader if isinstance(drafter, ReadsFeatures) else Alternating
        both = alternating(drafter, expected, lookahead)  # type: ignore[arg-type]
        assert _greedy(both, prompt, block=KNOWN_BLOCK).tokens == expected
        own_proposed += both.own_proposed[:-1]  # the last round may have no room left
        own_rejected += sum(a < p for p, a in zip(both.own_proposed, both.own_accepted, strict=True))
        stood |= {*both.known_accepted}
    if unsure:
        # Blocks of several lengths, so that the policy decided something.
        assert len({*own_proposed}) > 1 and sum(own_proposed) > 0
    else:
        assert {*own_proposed} == {OWN_BLOCK}
    assert own_rejected > 0
    # Whole blocks stood, and parts of them: rejected at their start, inside and at the end.
    assert KNOWN_BLOCK in stood and len(stood) > 5


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_full_depth_quantized_drafts_keep_greedy_output(weights: str, tmp_path: Path, shared: Path) -> None:
    QuantizedConfig(format=weights).write(DraftContext(target_folder(), tmp_path, CPU, 30))
    drafter = load_drafter(LoadContext(tmp_path, target_folder(), fp32_target(), "fp32", CPU))
    accepted = proposed = 0
    for domain in DOMAINS:
        result = _greedy(drafter, prompts(domain)[0], block=3, tokens=40)
        assert result.tokens == greedy_reference(domain, shared)[0][:40]
        accepted, proposed = accepted + sum(result.accepted), proposed + sum(result.proposed)
    # The target's own weights in 4 or 8 bits agree with it most of the time; an unrelated draft would not.
    assert accepted / proposed > 0.5


@pytest.mark.parametrize("domain", DOMAINS)
def test_one_by_one_target_only_output_equals_the_batched_reference(domain: str, shared: Path) -> None:
    assert _greedy(NoDrafter(), prompts(domain)[0], block=0).tokens == greedy_reference(domain, shared)[0]


@pytest.mark.parametrize("kind", ["pruned", "eagle3"])
def test_mutant_cache_not_rolled_back_changes_greedy_output(
    kind: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollback = RollbackCache.rollback
    monkeypatch.setattr(RollbackCache, "rollback", lambda self, n: rollback(self, n) if n == 0 else None)
    result = _greedy(real_drafter(kind, shared), prompts("chat")[0], block=2, tokens=MUTANT_TOKENS)
    assert result.tokens != greedy_reference("chat", shared)[0][:MUTANT_TOKENS]


def _second_best(self: ModelDrafter, context: torch.Tensor, **options: Any) -> Proposal:
    """The draft's proposal with chain and first sibling exchanged at every place: what stands is the sibling."""
    proposal = _propose(self, context, **options)
    if proposal.siblings is None:
        return proposal
    tokens, siblings = proposal.tokens.clone(), proposal.siblings.clone()
    first = proposal.slots.index(len(proposal) - 1)
    tokens[-1], siblings[first] = siblings[first].clone(), tokens[-1].clone()
    return Proposal(tokens, None, siblings, proposal.slots)


_propose = ModelDrafter.propose


@pytest.mark.parametrize("domain", DOMAINS)
def test_greedy_output_stays_where_siblings_stand(domain: str, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The target's own weights as the draft, the last token of each chain made a sibling: most rounds end in one.
    monkeypatch.setattr(ModelDrafter, "propose", _second_best)
    stood = 0
    for prompt, expected in zip(prompts(domain)[:3], greedy_reference(domain, shared), strict=False):
        result = _greedy(real_drafter("pretrained", shared), prompt, block=3, siblings=(0, 1, 2))
        assert result.tokens == expected
        stood += sum(sum(ranks) for ranks in result.siblings)
    assert stood > 30


def test_greedy_output_of_a_feature_draft_stays_where_siblings_are_offered(shared: Path) -> None:
    for kind in ("eagle3", "mixed"):
        result = _greedy(real_drafter(kind, shared), prompts("code")[0], block=2, siblings=(3, 2), tokens=48)
        assert result.tokens == greedy_reference("code", shared)[0][:48]


def test_mutant_states_of_a_sibling_left_behind_change_greedy_output(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelDrafter, "propose", _second_best)
    monkeypatch.setattr(RollbackCache, "move", lambda self, source, destination: None)
    result = _greedy(
        real_drafter("pretrained", shared), prompts("chat")[0], block=3, siblings=(0, 1, 2), tokens=MUTANT_TOKENS
    )
    assert result.tokens != greedy_reference("chat", shared)[0][:MUTANT_TOKENS]
