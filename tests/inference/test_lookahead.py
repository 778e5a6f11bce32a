"""Policies position by position and round by round, and their settings."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from inference.calibration import Calibration
from inference.costs import RoundCosts
from inference.errors import InputError
from inference.lookahead import (
    BlockConfig,
    Chances,
    Lookahead,
    Measured,
    RecordingLookahead,
    Signals,
    Visible,
    confidence,
    entropy,
    estimator,
    ewma,
    fixed,
    scheduled,
)
from inference.lookahead._worth import best_length, pays
from inference.lookahead.confidence import ConfidenceLookahead
from inference.lookahead.entropy import EntropyLookahead
from inference.lookahead.estimator import EstimatorLookahead
from inference.lookahead.ewma import EwmaLookahead
from inference.lookahead.fixed import FixedLookahead, tree_when_sampled
from inference.lookahead.scheduled import DelayedLookahead, ScheduledLookahead
from inference.margin import MarginEstimator
from inference.trees import Tree

# One token more costs a tenth of a pass, drafting it nothing.
CHEAP = RoundCosts({1: 1.0, 2: 1.1, 11: 2.0})
# A second token doubles the pass.
DEAR = RoundCosts({1: 1.0, 2: 2.0, 3: 3.0})
MEASURED = Measured(CHEAP, (0.8, 0.6, 0.4))
MODULES = [confidence, entropy, estimator, ewma, fixed, scheduled]


def _kept(policy: Lookahead, signals: list[Signals]) -> int:
    """Positions kept before the first refusal."""
    count = 0
    while count < len(signals) and policy.keeps(Visible(count + 1, tuple(signals[: count + 1]))):
        count += 1
    return count


def _sure(*chances: float) -> list[Signals]:
    return [Signals(confidence=chance) for chance in chances]


# Worth


@pytest.mark.parametrize(
    ("conditional", "costs", "length"),
    [
        # Tokens 1, 1.8, 2.44, 2.824 over 1, 1.1, 1.2, 1.3: 1, 1.636, 2.033, 2.172.
        ((0.8, 0.8, 0.6), CHEAP, 3),
        # 1, 1.8 / 1.1 = 1.636, 1.88 / 1.2 = 1.567, 1.888 / 1.3.
        ((0.8, 0.1, 0.1), CHEAP, 1),
        # 1.05 / 1.1, 1.1 / 1.2: neither pays.
        ((0.05, 1.0), CHEAP, 0),
        ((0.99, 0.99), DEAR, 0),
        ((), CHEAP, 0),
    ],
)
def test_the_best_length_has_the_most_expected_tokens_a_second(
    conditional: tuple[float, ...], costs: RoundCosts, length: int
) -> None:
    assert best_length(conditional, costs, ()) == length


def test_a_later_position_may_carry_an_earlier_one_that_does_not_pay_alone() -> None:
    # Two tokens for the price of 1.3 passes, the first alone for 1.25: 1.2 / 1.25 = 0.96, (1 + 0.2 + 0.2) / 1.3 = 1.08.
    costs = RoundCosts({1: 1.0, 2: 1.25, 3: 1.3})
    assert best_length((0.2, 1.0), costs, ()) == 2
    assert not pays([0.2], costs, ())


def test_siblings_are_part_of_what_a_position_costs() -> None:
    # 1.15 tokens for 1.1 passes, for 1.2 with a sibling.
    assert pays([0.15], CHEAP, ())
    assert not pays([0.15], CHEAP, (1,))
    assert best_length((0.15,), CHEAP, ()) == 1
    assert best_length((0.15,), CHEAP, (1,)) == 0


def test_drafting_counts() -> None:
    slow = RoundCosts({1: 1.0, 2: 1.1, 11: 2.0}, block_seconds=0.3, token_seconds=0.1)
    # 1.45 tokens in 0.3 + 0.1 + 1.1 = 1.5; 1.55 would pay.
    assert not pays([0.45], slow, ())
    assert pays([0.55], slow, ())


# Policies


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_fixed_keeps_its_number_of_positions(tokens: int) -> None:
    assert _kept(FixedLookahead(tokens), _sure(*[0.0] * 9)) == tokens


def test_fixed_reads_nothing() -> None:
    assert FixedLookahead(3).keeps(Visible(3))
    assert not FixedLookahead(3).reads


@pytest.mark.parametrize(
    ("chances", "kept"),
    [
        # Products 0.9, 0.72, 0.504, 0.2520: the threshold 0.5 is met three times.
        ([0.9, 0.8, 0.7, 0.5], 3),
        ([0.4, 1.0], 0),
        # Exactly the threshold is enough.
        ([0.5, 1.0, 0.99], 2),
        ([1.0] * 9, 4),
    ],
)
def test_confidence_keeps_while_the_whole_block_is_likely_to_survive(chances: list[float], kept: int) -> None:
    assert _kept(ConfidenceLookahead(4, threshold=0.5), _sure(*chances)) == kept


@pytest.mark.parametrize(
    ("entropies", "kept"),
    [
        # 1 - sqrt(0.2 * 1.25) = 0.5, exactly enough; at 1.26 it is not.
        ([1.25, 1.25, 1.26, 0.0], 2),
        ([5.0, 0.0], 0),
        # Look-up has no rows.
        ([math.nan] * 9, 4),
    ],
)
def test_entropy_keeps_while_the_bound_on_acceptance_holds(entropies: list[float], kept: int) -> None:
    policy = EntropyLookahead(4, threshold=0.5, gamma=0.2)
    assert _kept(policy, [Signals(entropy=value) for value in entropies]) == kept


def test_ewma_follows_the_request_and_forgets_it() -> None:
    policy = EwmaLookahead(3, Measured(CHEAP, (0.9, 0.9)), rate=0.5, probe_rounds=0)
    # Beyond what validation saw the last position stands in.
    assert policy.conditional == [0.9, 0.9, 0.9] and policy.max_tokens == 3
    running = policy.begin()
    running.observe(3, 1)
    # Position 1 stood, position 2 did not, position 3 has no verdict.
    assert running.conditional == pytest.approx([0.95, 0.45, 0.9])
    for _ in range(8):
        running.observe(running.max_tokens, 0)
    # Position 1 has fallen to 0.95 / 16: not worth a tenth of a pass, and so it is tried no more.
    assert running.conditional[0] == pytest.approx(0.95 / 16) and running.max_tokens == 0
    assert running.begin().max_tokens == policy.max_tokens == 3


def test_ewma_tries_a_longer_block_now_and_then() -> None:
    policy = EwmaLookahead(3, Measured(CHEAP, (0.9, 0.0)), rate=0.1, probe_rounds=4)
    lengths = []
    for _ in range(8):
        lengths.append(policy.max_tokens)
        policy.observe(policy.max_tokens, 1)
    assert lengths == [1, 1, 1, 1, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("chances", "kept"),
    [
        # Tokens a second 1, 1.636, 2.033, 2.033 * ...: a_3 = 0.64 * 0.1 = 0.064 adds less than its tenth of a pass.
        ([0.8, 0.8, 0.1, 1.0], 2),
        # The first drop ends the block, whatever comes behind it.
        ([0.05, 1.0, 1.0], 0),
        ([1.0] * 9, 4),
    ],
)
def test_scheduled_admits_while_it_pays(chances: list[float], kept: int) -> None:
    assert _kept(ScheduledLookahead(4, MEASURED, patience_rounds=0), _sure(*chances)) == kept


def test_scheduled_stops_speculating_where_a_second_token_costs_a_pass() -> None:
    assert _kept(ScheduledLookahead(4, Measured(DEAR, ()), patience_rounds=0), _sure(0.99, 0.99)) == 0


def test_scheduled_pauses_drafting_that_brings_nothing_and_wakes_again() -> None:
    policy = ScheduledLookahead(4, MEASURED, patience_rounds=2).begin()
    asleep = []
    for _ in range(12):
        asleep.append(policy.max_tokens == 0)
        policy.observe(0, 0)
    # Two tries, a pause of 2; two tries, a pause of 4; two tries.
    assert asleep == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 4 + [False] * 2
    policy = ScheduledLookahead(4, MEASURED, patience_rounds=2)
    for proposed in (0, 3, 0, 3, 0):
        policy.observe(proposed, 0)
    assert policy.max_tokens == 4, "only empty rounds in a row count"


def test_the_asynchronous_form_goes_by_confidences_of_an_earlier_round() -> None:
    policy = DelayedLookahead(2, MEASURED, delay_rounds=2).begin()
    lengths = []
    for chances in ((0.0, 0.0), (0.9, 0.0), (0.9, 0.9), (0.0, 0.0), (0.0, 0.0)):
        lengths.append(policy.max_tokens)
        for position in (1, 2):
            policy.keeps(Visible(position, tuple(_sure(*chances[:position]))))
        policy.observe(2, 0)
    # Validation's for two rounds, then round 1's (0), round 2's (1), round 3's (2).
    assert lengths == [2, 2, 0, 1, 2]


def test_the_asynchronous_form_tries_a_token_where_it_would_never_hear_again() -> None:
    policy = DelayedLookahead(2, Measured(DEAR, (0.9,)), delay_rounds=2)
    lengths = []
    for _ in range(18):
        lengths.append(policy.max_tokens)
        policy.observe(policy.max_tokens, 0)
    assert lengths == [0] * 16 + [1, 0]


def _estimating(**settings: int) -> EstimatorLookahead:
    known = MarginEstimator(window=400, refit_every=100, least=50)
    return EstimatorLookahead(2, MEASURED, estimator=known, patience_rounds=0, **settings)  # type: ignore[arg-type]


def test_the_estimator_proposes_everything_until_it_has_verdicts() -> None:
    assert _kept(_estimating(), [Signals(confidence=0.0, margin=0.0)] * 9) == 2


def test_the_estimator_learns_which_margins_stand() -> None:
    policy = _estimating()
    for number in range(60):
        margin = 6.0 if number % 2 else 0.1
        request = policy.begin()
        request.keeps(Visible(1, (Signals(confidence=0.5, margin=margin),)))
        request.observe(1, number % 2)
    # Both are now known apart, in any request; what the draft itself believes does not matter.
    for request in (policy, policy.begin()):
        assert _kept(request, [Signals(confidence=0.0, margin=6.0)]) == 1
        assert _kept(request, [Signals(confidence=1.0, margin=0.1)]) == 0


def test_the_estimator_learns_nothing_from_positions_without_a_verdict() -> None:
    policy = _estimating()
    for _ in range(60):
        _kept(policy, [Signals(margin=1.0)] * 2)
        policy.observe(2, 0)
    # Position 2 has never had a verdict; position 1's curve stands in for it.
    assert policy.estimator.parameters(1) == policy.estimator.parameters(2)
    assert policy.estimator.chance(1, 1.0) == pytest.approx(0.0, abs=0.05)


def test_without_rows_the_estimator_goes_by_the_drafters_own_chance() -> None:
    policy = _estimating()
    assert _kept(policy, _sure(0.9, 0.9)) == 2
    assert _kept(policy, _sure(0.01, 0.9)) == 0
    policy.observe(2, 0)
    assert policy.estimator.parameters(1) is None


# Chances


CALIBRATION = Calibration((2.0, 0.5))
CURVES = ((-1.0, 0.5), (0.0, 1.0))


@pytest.mark.parametrize(
    ("chances", "signals", "expected"),
    [
        (Chances(), (0.9, 3.0), 0.9),
        # logit 0.9 = log 9; halved it is log 3, and 3 : 1 is 0.75.
        (Chances(calibration=CALIBRATION), (0.9, 3.0), 0.75),
        # sigmoid(-1 + 0.5 * 2) = 0.5.
        (Chances("margin", CALIBRATION, CURVES), (0.9, 2.0), 0.5),
        # Look-up has no margin; its own chance, calibrated, stands in.
        (Chances("margin", CALIBRATION, CURVES), (0.9, math.nan), 0.75),
    ],
)
def test_chances_come_from_where_they_predict_best(
    chances: Chances, signals: tuple[float, float], expected: float
) -> None:
    known = Signals(confidence=signals[0], margin=signals[1])
    assert chances.of([known]) == pytest.approx([expected])
    assert Chances.from_json(json.loads(json.dumps(chances.to_json())), where="pair.json") == chances


def test_positions_beyond_the_last_curve_use_the_last() -> None:
    # sigmoid(-1 + 0.5), then sigmoid(1) twice.
    found = Chances("margin", None, CURVES).of([Signals(confidence=0.0, margin=1.0)] * 3)
    assert found == pytest.approx([0.37754, 0.73106, 0.73106], abs=1e-5)


@pytest.mark.parametrize(("temperature", "kept"), [(0.2, 1), (5.0, 0)])
@pytest.mark.parametrize("module", [confidence, scheduled])
def test_policies_go_by_calibrated_chances(module: Any, temperature: float, kept: int) -> None:
    # 0.6 becomes sigmoid(5 log 1.5) = 0.88 or sigmoid(log 1.5 / 5) = 0.52; 0.8 is asked for, by the threshold or by
    # what the token costs.
    measured = Measured(RoundCosts({1: 1.0, 2: 1.8}), (), Chances(calibration=Calibration((temperature,))))
    config = module.Config(threshold=0.8) if module is confidence else module.Config()
    assert _kept(config.build(1, (), measured), _sure(0.6)) == kept


def test_a_margin_is_asked_for_only_where_it_is_used() -> None:
    by_margin = Measured(CHEAP, (), Chances("margin", None, CURVES))
    assert scheduled.Config().build(2, (), by_margin).reads == {"confidence", "margin"}
    assert scheduled.Config().build(2, (), MEASURED).reads == {"confidence"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "hope"}, "chances come from 'hope'"),
        ({"source": "margin"}, "chances come from 'margin' with 0 curves"),
        ({"curves": [[1.0]]}, "the chances are off"),
        ({"curves": [[1.0, math.inf]]}, "a curve is not finite"),
        ({"calibration": {"temperatures": [-1.0]}}, "not a calibration"),
    ],
)
def test_chances_that_are_off_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Chances.from_json(Chances().to_json() | changes, where="pair.json")


def test_a_recording_keeps_what_was_known_and_what_became_of_it() -> None:
    recording = RecordingLookahead(2)
    assert recording.begin() is recording
    signals = _sure(0.9, 0.8, 0.7)
    assert _kept(recording, signals) == 2
    recording.observe(2, 1)
    recording.observe(0, 0)
    assert recording.rounds == [(tuple(signals[:2]), 1)]


# What a policy may look at


POLICIES: dict[str, Callable[[], Lookahead]] = {
    "fixed": lambda: FixedLookahead(2),
    "confidence": lambda: ConfidenceLookahead(2, threshold=0.5),
    "entropy": lambda: EntropyLookahead(2, threshold=0.5, gamma=0.2),
    "ewma": lambda: EwmaLookahead(2, MEASURED, rate=0.5, probe_rounds=2),
    "scheduled": lambda: ScheduledLookahead(2, MEASURED, patience_rounds=2),
    "scheduled, delayed": lambda: DelayedLookahead(2, MEASURED, delay_rounds=2),
    "estimator": _estimating,
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_decision_depends_on_nothing_but_what_it_was_given(name: str) -> None:
    """Two policies with one past decide alike, and a decision taken is not taken back."""
    signals = [Signals(confidence=c, entropy=h, margin=m) for c, h, m in ((0.9, 0.3, 4.0), (0.2, 2.0, 0.5))]
    one, other = POLICIES[name]().begin(), POLICIES[name]().begin()
    for accepted in (1, 0, 2, 0, 0):
        kept = _kept(one, signals)
        assert kept == _kept(other, signals)
        assert kept <= one.max_tokens
        for policy in (one, other):
            policy.observe(kept, min(kept, accepted))


@pytest.mark.parametrize("name", POLICIES)
def test_only_a_policy_that_learns_lets_one_request_show_in_another(name: str) -> None:
    shared = POLICIES[name]()
    request = shared.begin()
    for _ in range(40):
        request.observe(_kept(request, [Signals(confidence=0.01, entropy=9.0, margin=0.01)] * 2), 0)
    fresh, later = POLICIES[name]().begin(), shared.begin()
    signals = [Signals(confidence=0.95, entropy=0.01, margin=9.0)] * 2
    assert shared.learns or _kept(later, signals) == _kept(fresh, signals)


def test_a_search_over_all_lengths_by_this_rounds_confidences_is_refused() -> None:
    for delay in (0, 1):
        with pytest.raises(ValueError, match=r"lookahead.search=whole looks ahead: .* use lookahead.delay_rounds=2"):
            scheduled.Config(search="whole", delay_rounds=delay)


# Settings


def test_policies_are_built_with_the_length_chosen_for_a_draft() -> None:
    for module in MODULES:
        built = module.Config().build(6, [1], Measured(CHEAP, (1.0,)))
        assert (built.max_tokens, built.siblings) == (6, (1,)), module
    assert confidence.Config(threshold=0.3).build(2).threshold == 0.3
    delayed = scheduled.Config(search="whole", delay_rounds=3).build(2, (), MEASURED)
    assert isinstance(delayed, DelayedLookahead) and delayed.delay_rounds == 3


@pytest.mark.parametrize("module", MODULES)
def test_a_policy_that_weighs_costs_is_not_built_without(module: object) -> None:
    config: BlockConfig = module.Config()  # type: ignore[attr-defined]
    if config.weighs_costs:
        with pytest.raises(ValueError, match=f"lookahead={config.kind} weighs tokens against seconds"):
            config.build(2)
    else:
        assert config.build(2).max_tokens == 2
    assert config.learns == config.build(2, (), MEASURED).learns


def test_outcomes_change_nothing_where_nothing_is_kept() -> None:
    for name in ("fixed", "confidence", "entropy"):
        policy = POLICIES[name]()
        before = dict(vars(policy))
        policy.observe(2, 0)
        assert vars(policy) == before and policy.begin() is policy


@pytest.mark.parametrize("module", MODULES)
def test_kinds_are_their_modules_names(module: object) -> None:
    config = module.Config()  # type: ignore[attr-defined]
    assert module.__name__.endswith("." + config.kind)  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": -1}, "lookahead.tokens is -1; use 0 for the automatic choice"),
        ({"longest_auto": 0}, "lookahead.longest_auto is 0; use at least 1"),
        ({"siblings_auto": -1}, "lookahead.siblings and lookahead.siblings_auto count tokens"),
        ({"tokens": 2, "siblings": [1, -1]}, "lookahead.siblings and lookahead.siblings_auto count tokens"),
        ({"tokens": 0, "siblings": [1]}, "set lookahead.tokens as well"),
        ({"trees": [16, 0]}, r"lookahead.trees is \[16, 0\]; give sizes of at least 1"),
        ({"tree_depths": [6, 0]}, r"lookahead.tree_depths is \[6, 0\]; give depths of at least 1"),
        ({"tree_depths": []}, r"lookahead.tree_depths is \[\]; give depths of at least 1"),
        ({"tree_lookup": -1}, "lookahead.tree_lookup is -1; use 0 for none or a number of tokens"),
    ],
)
def test_lengths_out_of_range_are_refused(module: object, values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.Config(**values)  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", [confidence, entropy])
@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_must_be_a_probability(module: object, threshold: float) -> None:
    with pytest.raises(ValueError, match=r"lookahead.threshold is .*; use a probability in \[0, 1\]"):
        module.Config(threshold=threshold)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("module", "values", "message"),
    [
        (entropy, {"gamma": 0.0}, "lookahead.gamma is 0.0; use a positive number"),
        (entropy, {"gamma": math.nan}, "lookahead.gamma is nan; use a positive number"),
        (ewma, {"rate": 0.0}, "lookahead.rate is 0.0; use a weight above 0 and up to 1"),
        (ewma, {"probe_rounds": -1}, "lookahead.probe_rounds is -1"),
        (scheduled, {"search": "best"}, "lookahead.search is 'best'; choose one of early_stop, whole"),
        (scheduled, {"delay_rounds": 2}, "lookahead.delay_rounds goes with search=whole"),
        (scheduled, {"patience_rounds": -1}, "lookahead.patience_rounds is -1"),
        (estimator, {"patience_rounds": -1}, "lookahead.patience_rounds is -1"),
        (estimator, {"least": 0}, "all of them positive"),
    ],
)
def test_settings_out_of_range_are_refused(module: object, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.Config(**values)  # type: ignore[attr-defined]


def test_a_tree_when_sampled_needs_a_tree() -> None:
    with pytest.raises(ValueError, match="tree_when_sampled needs a tree"):
        FixedLookahead(2, tree_when_sampled=True)
    tree = Tree.of([(0,), (1,)])
    for lookahead in (FixedLookahead(2), FixedLookahead(2, tree=tree), RecordingLookahead(2)):
        assert not tree_when_sampled(lookahead)
    assert tree_when_sampled(FixedLookahead(2, tree=tree, tree_when_sampled=True))
