"""Losslessness, exactly: over a tiny vocabulary the decoder's output law equals the target's, and mutants' does not."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inference import decoder, verification
from inference.attention import use_grouped_attention
from inference.cache import RollbackCache
from inference.costs import RoundCosts
from inference.drafters import Drafter, Proposal
from inference.drafters.feature import FeatureDrafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.mixed import MixedDrafter, MixedFeatureDrafter, mixed_drafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.drafters.quantized import quantization_config
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_drafts.dflash import Config as DFlash
from inference.feature_drafts.dspark import Config as DSpark
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import make_network
from inference.feature_networks._contexts import DraftCache
from inference.layers import keep_layers
from inference.loading import load_causal_model
from inference.lookahead import Lookahead, Measured
from inference.lookahead.confidence import ConfidenceLookahead
from inference.lookahead.entropy import EntropyLookahead
from inference.lookahead.estimator import EstimatorLookahead
from inference.lookahead.ewma import EwmaLookahead
from inference.lookahead.fixed import FixedLookahead
from inference.lookahead.scheduled import DelayedLookahead, ScheduledLookahead
from inference.lookup_settings import LookupSettings
from inference.margin import MarginEstimator
from inference.model import CausalModel
from inference.sampling_settings import SamplingSettings
from tests.inference.law import MemoModel, TokenCache, distance, speculative_law, target_law, tiny_model

EXACT = 1e-12
# A mutant must miss the law by more than rounding ever could.
VISIBLE = 1e-3

SETTINGS = {
    "T=0.5": SamplingSettings(temperature=0.5),
    "T=1": SamplingSettings(temperature=1.0),
    "T=1 top-k": SamplingSettings(temperature=1.0, top_k=2),
    "T=1 top-p": SamplingSettings(temperature=1.0, top_p=0.8),
    "T=1 penalty": SamplingSettings(temperature=1.0, repetition_penalty=1.5),
}
POLICIES: dict[str, Callable[[], Lookahead]] = {
    "fixed": lambda: FixedLookahead(2),
    "confidence": lambda: ConfidenceLookahead(2, threshold=0.5),
    "siblings": lambda: FixedLookahead(2, siblings=(1, 2)),
    "entropy": lambda: EntropyLookahead(2, threshold=0.6, gamma=0.2),
    "ewma": lambda: EwmaLookahead(2, MEASURED, rate=0.7, probe_rounds=2),
    "scheduled": lambda: ScheduledLookahead(2, MEASURED, patience_rounds=1),
    "scheduled, delayed": lambda: DelayedLookahead(2, MEASURED, delay_rounds=2),
    "scheduled, siblings": lambda: ScheduledLookahead(2, MEASURED, patience_rounds=1, siblings=(1, 1)),
    "estimator": lambda: EstimatorLookahead(2, MEASURED, estimator=_fitted(), patience_rounds=1),
}
ADAPTIVE = ["entropy", "ewma", "scheduled", "scheduled, delayed", "scheduled, siblings", "estimator"]
# Half a pass for one token more, a fifth for a second: rows decide whether that pays.
MEASURED = Measured(RoundCosts({1: 1.0, 2: 1.5, 3: 1.7, 4: 1.8, 5: 1.9}), (0.6, 0.6))


def _fitted() -> MarginEstimator:
    """Curves that refuse small margins, and go on learning from every verdict."""
    estimator = MarginEstimator(window=20, refit_every=1, least=4)
    for position in (1, 2):
        for margin, survived in ((0.1, False), (0.2, False), (2.0, True), (3.0, True)):
            estimator.add(position, margin, survived)
    return estimator


@pytest.fixture(scope="module")
def target() -> MemoModel:
    return MemoModel(tiny_model(0))


def _quantized(folder: Path, weight_format: str, kept: list[int] | None) -> CausalModel:
    # bitsandbytes works on blocks of 64 weights, so this self-draft is of a wider tiny target saved to disk.
    return load_causal_model(
        folder,
        precision="fp32",
        device=torch.device("cpu"),
        quantization=quantization_config(weight_format, compute_dtype=torch.float32),
        kept_layers=kept,
    )


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drafter]:
    folder = tmp_path_factory.mktemp("target")
    tiny_model(0, hidden=64).model.float().save_pretrained(folder)
    pruned = tiny_model(0)
    keep_layers(pruned.model, [0])
    return {
        "none": NoDrafter(),
        "lookup": LookupDrafter(LookupSettings(longest=2, shortest=1)),
        "pruned": ModelDrafter(MemoModel(pruned)),
        "pretrained": ModelDrafter(MemoModel(tiny_model(7, layers=1))),
        "quantized nf4": ModelDrafter(MemoModel(_quantized(folder, "nf4", None))),
        "quantized int8": ModelDrafter(MemoModel(_quantized(folder, "int8", None))),
        "quantized, layers skipped": ModelDrafter(MemoModel(_quantized(folder, "nf4", [1]))),
        "mixed": _mixed(ModelDrafter(MemoModel(tiny_model(7, layers=1)))),
    }


def _mixed(draft: Drafter) -> MixedDrafter:
    return mixed_drafter(LookupDrafter(LookupSettings(longest=2, shortest=1)), draft)


KINDS = [
    "none",
    "lookup",
    "pruned",
    "pretrained",
    "quantized nf4",
    "quantized int8",
    "quantized, layers skipped",
    "mixed",
]
FEATURE_CONFIGS: dict[str, FeatureDraftConfig] = {
    "dflash": DFlash(block=2, taps=[0, 1], vocabulary=0),
    "dspark": DSpark(block=2, taps=[0, 1], vocabulary=0, markov_rank=4),
    "dspark gated": DSpark(block=2, taps=[0], vocabulary=0, markov_rank=4, markov_head="gated"),
    "dspark rnn": DSpark(block=2, taps=[1], vocabulary=0, markov_rank=4, markov_head="rnn"),
    "eagle3": Eagle3(block=2, taps=[0, 1], vocabulary=0),
}


def _taking_siblings(model: CausalModel) -> CausalModel:
    use_grouped_attention(model.model)
    assert model.takes_siblings
    return model


def _feature_drafter(kind: str, *, reduced: bool = False) -> FeatureDrafter:
    """An untrained network whose proposals depend on everything it reads, and far from uniform."""
    target = tiny_model(0)
    network = make_network(FEATURE_CONFIGS[kind], target, torch.tensor([0, 2]) if reduced else None, seed=3).double()
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(11)
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter))
    return FeatureDrafter(network.eval())


@pytest.mark.parametrize(
    ("reduced", "policy", "settings"),
    [
        *((False, "fixed", settings) for settings in SETTINGS),
        *((True, "confidence", settings) for settings in SETTINGS),
        *((False, "siblings", settings) for settings in SETTINGS),
        *((False, policy, settings) for policy in ADAPTIVE for settings in ("T=0.5", "T=1")),
        # Two words to propose from: the second sibling of a position does not exist.
        (True, "siblings", "T=1"),
    ],
)
@pytest.mark.parametrize("kind", FEATURE_CONFIGS)
def test_output_law_of_feature_drafts_equals_the_targets(kind: str, reduced: bool, policy: str, settings: str) -> None:
    # The features kept by prefix depend on the taps, so every drafter gets a target of its own.
    target = MemoModel(tiny_model(0))
    law = speculative_law(target, _feature_drafter(kind, reduced=reduced), POLICIES[policy], SETTINGS[settings])
    assert distance(law, target_law(target, SETTINGS[settings])) < EXACT
    assert sum(law.values()) == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize("policy", ["fixed", "siblings"])
@pytest.mark.parametrize("kind", FEATURE_CONFIGS)
def test_law_of_feature_drafts_holds_with_real_caches_and_hooks(kind: str, policy: str) -> None:
    target, settings = _taking_siblings(tiny_model(0)), SETTINGS["T=1"]
    law = speculative_law(target, _feature_drafter(kind), POLICIES[policy], settings)
    assert distance(law, target_law(MemoModel(tiny_model(0)), settings)) < 1e-6


@pytest.mark.parametrize("policy", ["fixed", "siblings"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_law_of_feature_drafts_behind_look_up_equals_the_targets(
    kind: str, settings: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = MemoModel(tiny_model(0)), _mixed(_feature_drafter(kind))
    assert isinstance(drafter, MixedFeatureDrafter)
    proposed = {LookupDrafter: 0, FeatureDrafter: 0}
    for owner in (LookupDrafter, FeatureDrafter):

        def counted(self: Drafter, *args: object, _own: Any = owner.propose, **kwargs: object) -> Proposal:
            proposal: Proposal = _own(self, *args, **kwargs)
            proposed[type(self)] += len(proposal)  # type: ignore[index]
            return proposal

        monkeypatch.setattr(owner, "propose", counted)
    law = speculative_law(target, drafter, POLICIES[policy], SETTINGS[settings])
    assert distance(law, target_law(target, SETTINGS[settings])) < EXACT
    assert proposed[FeatureDrafter]
    # Where two of three words have mass, a token and a sibling leave look-up no turn.
    assert proposed[LookupDrafter] or (policy == "siblings" and "top" in settings)


class _Watched(FeatureDrafter):
    """Remembers the first row proposed after each prefix, and insists on it ever after.

    Attributes:
        ways: for each prefix, the lengths of the pieces in which its features came.
    """

    def __init__(self, drafter: FeatureDrafter) -> None:
        super().__init__(drafter.network)
        self.seen: dict[tuple[int, ...], torch.Tensor] = {}
        self.ways: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        self.pieces: tuple[int, ...] = ()

    def begin(self, prompt: torch.Tensor) -> None:
        super().begin(prompt)
        self.pieces = ()

    def read(self, features: torch.Tensor) -> None:
        super().read(features)
        self.pieces = (*self.pieces, features.shape[0])

    def propose(self, context: torch.Tensor, **kwargs: object) -> Proposal:
        proposal = super().propose(context, **kwargs)  # type: ignore[arg-type]
        if len(proposal):
            assert proposal.probs is not None
            prefix = tuple(context.tolist())
            self.ways.setdefault(prefix, set()).add(self.pieces)
            first = self.seen.setdefault(prefix, proposal.probs[0].clone())
            torch.testing.assert_close(proposal.probs[0], first, rtol=0, atol=1e-9)
        return proposal


@pytest.mark.parametrize("siblings", [(), (1, 0)])
@pytest.mark.parametrize("kind", FEATURE_CONFIGS)
def test_what_a_feature_draft_proposes_after_a_prefix_does_not_depend_on_how_it_got_there(
    kind: str, siblings: tuple[int, ...]
) -> None:
    """Every way of accepting and rejecting leads to the same context."""
    most = 0
    # Two tokens to choose from keep the walk short. These targets lead every kind to some prefix in two ways: its
    # second token comes after an accepted one or after a rejection.
    for seed in (1, 3):
        watched = _Watched(_feature_drafter(kind))
        policy = functools.partial(FixedLookahead, 2, siblings=siblings)
        law = speculative_law(MemoModel(tiny_model(seed)), watched, policy, SETTINGS["T=1 top-k"], length=4)
        assert len(law) == 16
        most = max(most, *(len(ways) for ways in watched.ways.values()))
    # With siblings, the features come in the same pieces whether the second token of a round is the first's or the
    # target's own; the mutant below shows that they are told apart.
    assert siblings or most == 2


def test_mutant_features_of_the_rejected_token_in_place_of_the_siblings_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = decoder.kept_rows
    monkeypatch.setattr(decoder, "kept_rows", lambda *args: list(range(len(kept(*args)))))
    watched, policy = _Watched(_feature_drafter("eagle3")), functools.partial(FixedLookahead, 2, siblings=(1, 0))
    with pytest.raises(AssertionError):
        speculative_law(MemoModel(tiny_model(1)), watched, policy, SETTINGS["T=1"], length=4)


def test_mutant_context_of_the_last_request_left_in_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # Output stays lossless whatever is drafted; a stale context would only cost acceptance, so it is looked for here.
    monkeypatch.setattr(DraftCache, "clear", lambda self: None)
    with pytest.raises((AssertionError, RuntimeError)):
        speculative_law(tiny_model(0), _Watched(_feature_drafter("dspark")), POLICIES["fixed"], SETTINGS["T=1"])


def test_mutant_rows_of_other_slots_of_a_feature_draft_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, settings = _feature_drafter("dspark"), SETTINGS["T=1"]
    target, propose = MemoModel(tiny_model(0)), FeatureDrafter.propose
    expected = target_law(target, settings)
    assert distance(speculative_law(target, drafter, POLICIES["fixed"], settings), expected) < EXACT

    def swapped(self: FeatureDrafter, *args: object, **kwargs: object) -> Proposal:
        proposal = propose(self, *args, **kwargs)  # type: ignore[arg-type]
        return Proposal(proposal.tokens, None if proposal.probs is None else proposal.probs.flip(0))

    monkeypatch.setattr(FeatureDrafter, "propose", swapped)
    assert distance(speculative_law(target, drafter, POLICIES["fixed"], settings), expected) > VISIBLE


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_law_equals_the_targets(
    target: MemoModel, drafters: dict[str, Drafter], kind: str, policy: str, settings: str
) -> None:
    law = speculative_law(target, drafters[kind], POLICIES[policy], SETTINGS[settings])
    expected = target_law(target, SETTINGS[settings])
    assert distance(law, expected) < EXACT
    # Every path was walked: the probabilities of all outputs add up to one.
    assert sum(law.values()) == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_adaptive_policies_keep_and_refuse_in_the_walk(
    target: MemoModel, drafters: dict[str, Drafter], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise their law would show nothing."""
    lengths, count = set[int](), decoder.Decoded.count

    def counted(self: decoder.Decoded, proposal: Proposal, verdict: verification.Verdict) -> None:
        # Later rounds may be cut short by the end of the answer.
        if not self.passes:
            lengths.add(len(proposal))
        count(self, proposal, verdict)

    monkeypatch.setattr(decoder.Decoded, "count", counted)
    settings = SamplingSettings(temperature=1.0)
    for seed in range(4):
        speculative_law(target, ModelDrafter(MemoModel(tiny_model(seed + 5, layers=1))), POLICIES[policy], settings)
    by_past = policy in {"ewma", "scheduled, delayed"}
    assert lengths == {2} if by_past else len(lengths) > 1


def test_law_holds_with_stop_tokens_inside_a_block(target: MemoModel, drafters: dict[str, Drafter]) -> None:
    settings, stops = SETTINGS["T=1"], frozenset({2})
    law = speculative_law(target, drafters["pretrained"], POLICIES["fixed"], settings, stop_tokens=stops)
    assert distance(law, target_law(target, settings, stop_tokens=stops)) < EXACT
    # A stop token is the last of its output wherever it stands.
    assert all(2 not in output[:-1] for output in law)
    assert any(len(output) < 3 for output in law)


@pytest.mark.parametrize("policy", ["fixed", "siblings"])
@pytest.mark.parametrize("kind", ["pruned", "pretrained"])
def test_law_holds_with_real_caches(kind: str, policy: str) -> None:
    # The same walk through transformers' forward and our rollback cache, on both sides, in fp64. Passes of different
    # widths round differently in the last bits, which is all that may be seen.
    drafter_model = tiny_model(7, layers=1) if kind == "pretrained" else tiny_model(0)
    if kind == "pruned":
        keep_layers(drafter_model.model, [0])
    settings = SETTINGS["T=1"]
    target = _taking_siblings(tiny_model(0))
    law = speculative_law(target, ModelDrafter(drafter_model), POLICIES[policy], settings)
    assert distance(law, target_law(MemoModel(target), settings)) < 1e-6


def _mutant_law_error(target: MemoModel, drafter: Drafter, policy: str = "fixed") -> float:
    settings = SETTINGS["T=1"]
    return distance(speculative_law(target, drafter, POLICIES[policy], settings), target_law(target, settings))


@pytest.fixture
def other(target: MemoModel) -> ModelDrafter:
    """A draft that disagrees with the target; unmutated, the law is exact."""
    drafter = ModelDrafter(MemoModel(tiny_model(7, layers=1)))
    assert _mutant_law_error(target, drafter) < EXACT
    return drafter


def test_mutant_residual_not_renormalised_fails(
    target: MemoModel, other: ModelDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "residual_probs", lambda p, q, token: (p - q).clamp(min=0.0))
    assert _mutant_law_error(target, other) > VISIBLE


def test_mutant_residual_is_the_target_itself_fails(
    target: MemoModel, other: ModelDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "residual_probs", lambda p, q, token: p)
    assert _mutant_law_error(target, other) > VISIBLE


def test_mutant_draft_probs_of_another_temperature_fail(
    target: MemoModel, other: ModelDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    propose = ModelDrafter.propose

    def cooler(self: ModelDrafter, *args: object, **kwargs: object) -> Proposal:
        proposal = propose(self, *args, **kwargs)  # type: ignore[arg-type]
        probs = None if proposal.probs is None else torch.softmax(2.0 * proposal.probs.log(), dim=-1)
        return Proposal(proposal.tokens, probs)

    monkeypatch.setattr(ModelDrafter, "propose", cooler)
    assert _mutant_law_error(target, other) > VISIBLE


def test_mutant_dropping_the_token_that_turned_out_unlikely_fails(
    target: MemoModel, other: ModelDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    propose = ModelDrafter.propose

    def picky(self: ModelDrafter, *args: object, **kwargs: object) -> Proposal:
        proposal = propose(self, *args, **kwargs)  # type: ignore[arg-type]
        if proposal.probs is None:
            return proposal
        chances = proposal.probs.gather(1, proposal.tokens[:, None])[:, 0]
        kept = int((chances > 0.4).long().cumprod(0).sum())
        return Proposal(proposal.tokens[:kept], proposal.probs[:kept] if kept else None)

    monkeypatch.setattr(ModelDrafter, "propose", picky)
    assert _mutant_law_error(target, other) > VISIBLE


def test_mutant_look_up_in_place_of_a_block_that_turned_out_unlikely_fails(
    target: MemoModel, other: ModelDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = _mixed(other)
    assert _mutant_law_error(target, mixed) < EXACT

    def regretting(self: MixedDrafter, context: torch.Tensor, **kwargs: Any) -> Proposal:
        drawn = self.draft.propose(context, **kwargs)
        self._proposed = len(drawn)
        matched = self.lookup.propose(context, **kwargs)
        if len(matched) and drawn.probs is not None and float(drawn.probs[0, drawn.tokens[0]]) < 0.4:
            return matched
        return drawn

    monkeypatch.setattr(MixedDrafter, "propose", regretting)
    assert _mutant_law_error(target, mixed) > VISIBLE


def test_mutant_bonus_token_from_the_wrong_row_fails(
    target: MemoModel, other: ModelDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = verification.verify_sampled

    def early_row(
        tokens: torch.Tensor, draft: torch.Tensor | None, probs: torch.Tensor, **kwargs: object
    ) -> verification.Verdict:
        shifted = torch.cat([probs[:-1], probs[-2:-1]]) if tokens.shape[0] else probs
        return verify(tokens, draft, shifted, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "verify_sampled", early_row)
    assert _mutant_law_error(target, other) > VISIBLE


def test_mutant_target_cache_not_rolled_back_fails(
    target: MemoModel, other: ModelDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sticky(TokenCache):
        def rollback(self, length: int) -> None:
            pass

    monkeypatch.setattr(MemoModel, "new_cache", lambda self: Sticky() if self is target else TokenCache())
    assert _mutant_law_error(target, other) > VISIBLE


def test_mutant_real_cache_not_rolled_back_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS["T=1"]
    target, drafter = tiny_model(0), ModelDrafter(tiny_model(7, layers=1))
    rollback = RollbackCache.rollback
    monkeypatch.setattr(RollbackCache, "rollback", lambda self, n: rollback(self, n) if n == 0 else None)
    law = speculative_law(target, drafter, POLICIES["fixed"], settings)
    assert distance(law, target_law(MemoModel(tiny_model(0)), settings)) > VISIBLE


def test_policy_may_look_at_earlier_tokens_of_the_block(target: MemoModel, other: ModelDrafter) -> None:
    # Position 2 is kept only if the token sampled at position 1 was token 0.
    class Peeking(FixedLookahead):
        def keeps(self, visible: object) -> bool:
            position: int = visible.position  # type: ignore[attr-defined]
            return position == 1 or (position == 2 and seen_token() == 0)

    def seen_token() -> int:
        cache = other.cache
        assert isinstance(cache, TokenCache)
        return cache.tokens[-1]

    settings = SETTINGS["T=1"]
    law = speculative_law(target, other, lambda: Peeking(2), settings)
    # Looking at earlier tokens of the block is allowed (x_1 is known before x_2 is sampled), so the law still holds.
    assert distance(law, target_law(target, settings)) < EXACT


def _other_target_pass_for_siblings(self: MemoModel, tokens: torch.Tensor, cache: TokenCache, **options: Any) -> Any:
    """A pass in which a sibling sees the token it stands beside, as it would without a mask of its own."""
    rows = MemoModel.logits(self, tokens, cache, **options)
    held, slots = cache.tokens[: len(cache.tokens) - len(tokens)], options.get("slots", ())
    for index, slot in enumerate(slots):
        place = len(tokens) - len(slots) + index
        seen = (*held, *tokens[: slot + 2].tolist(), int(tokens[place]))
        rows[place] = self.row(seen)
    return rows


SIBLING_MUTANTS: dict[str, Callable[[pytest.MonkeyPatch, MemoModel], None]] = {
    "siblings tested against the whole row": lambda patch, _: patch.setattr(
        verification, "without", lambda row, token: row
    ),
    "every sibling stands": lambda patch, _: patch.setattr(
        verification,
        "acceptance_ratios",
        lambda tokens, q, p, own=verification.acceptance_ratios: own(tokens, q, p) ** (p.shape[0] > 1),
    ),
    "siblings tested against the target's own row": lambda patch, _: patch.setattr(
        verification, "residual_probs", lambda p, q, token: p
    ),
    "the state of the rejected token stays in place of the sibling's": lambda patch, _: patch.setattr(
        TokenCache, "move", lambda self, source, destination: None
    ),
    "the next token from the row of the rejected one": lambda patch, _: patch.setattr(
        decoder,
        "after_sibling",
        lambda row, context, *rest, own=decoder.after_sibling: own(row.flip(0), context, *rest),
    ),
    "a sibling sees the token beside it": lambda patch, target: patch.setattr(
        target, "logits", functools.partial(_other_target_pass_for_siblings, target)
    ),
}


@pytest.mark.parametrize("mutant", SIBLING_MUTANTS)
def test_mutants_of_siblings_fail(
    target: MemoModel, other: ModelDrafter, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _mutant_law_error(target, other, "siblings") < EXACT
    SIBLING_MUTANTS[mutant](monkeypatch, target)
    assert _mutant_law_error(target, other, "siblings") > VISIBLE


def test_mutant_real_states_of_a_sibling_left_behind_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RollbackCache, "move", lambda self, source, destination: None)
    target, settings = _taking_siblings(tiny_model(0)), SETTINGS["T=1"]
    law = speculative_law(target, ModelDrafter(tiny_model(7, layers=1)), POLICIES["siblings"], settings)
    assert distance(law, target_law(MemoModel(tiny_model(0)), settings)) > VISIBLE


def test_a_policy_that_chooses_siblings_by_what_it_drew_is_a_mutant_that_fails(
    target: MemoModel, other: ModelDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    propose = ModelDrafter.propose

    def regretting(self: ModelDrafter, *args: object, **kwargs: object) -> Proposal:
        proposal = propose(self, *args, **kwargs)  # type: ignore[arg-type]
        if len(proposal) and proposal.siblings is not None and int(proposal.siblings[0]) == 0:
            # Offered only unless it is token 0.
            return Proposal(proposal.tokens, proposal.probs)
        return proposal

    monkeypatch.setattr(ModelDrafter, "propose", regretting)
    assert _mutant_law_error(target, other, "siblings") > VISIBLE
