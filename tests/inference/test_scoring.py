"""Arms on one prompt: order, records, explained differences; and the arithmetic that chooses a block length."""

import functools
from typing import Any

import pytest
import torch

from inference.block_length import DraftedRequest, Drafting, best_block, choose_block
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.lookahead.fixed import FixedLookahead
from inference.records import Record, tokens_digest
from inference.sampling_settings import SamplingSettings
from inference.scoring import Arm, ScorePrompt, explain_mismatch, request_seed, score_prompt
from tests.inference.families import family_model, greedy_reference
from tests.inference.law import MemoModel, tiny_model

NONE: frozenset[int] = frozenset()
PROMPT = ScorePrompt("p", "chat", torch.tensor([3, 1, 4]))


@functools.cache
def _arms(*, block: int = 3) -> list[Arm]:
    target = family_model("llama")
    drafts = {"same": family_model("llama"), "other": family_model("llama", seed=1)}
    arms = [Arm("none", target, NoDrafter(), FixedLookahead(0))]
    return arms + [Arm(name, target, ModelDrafter(draft), FixedLookahead(block)) for name, draft in drafts.items()]


def _score(prompt: ScorePrompt = PROMPT, *, temperature: float = 0.0, seed: int = 0, tokens: int = 16) -> list[Record]:
    return score_prompt(
        _arms(),
        prompt,
        settings=SamplingSettings(temperature=temperature),
        max_new_tokens=tokens,
        stop_tokens=NONE,
        seed=seed,
    )


def test_every_arm_leaves_a_record_in_the_arms_order() -> None:
    records = _score()
    expected = greedy_reference(family_model("llama"), PROMPT.tokens, 16)
    assert [r.arm for r in records] == ["none", "same", "other"]
    assert {(r.prompt_id, r.domain, r.temperature, r.prompt_tokens, r.emitted) for r in records} == {
        ("p", "chat", 0.0, 3, 16)
    }
    assert {r.digest for r in records} == {tokens_digest(expected)}
    assert [r.mismatch for r in records] == [None] * 3
    none, same, _ = records
    assert (none.passes, none.blocks) == (16, {"0": 16})
    # A draft that is the target: four tokens a pass.
    assert (same.passes, same.blocks, same.accepted) == (4, {"3": 4}, [4, 4, 4])


def test_bytes_are_weights_and_caches() -> None:
    none, same, _ = _score()
    weights, cache = family_model("llama").nbytes(), 2 * 2 * 2 * 8 * 256 * 8
    assert (none.draft_bytes, none.target_bytes) == (0, weights + cache)
    assert same.draft_bytes == weights + cache


def test_the_order_of_arms_is_shuffled_by_prompt_and_fixed_by_the_seed() -> None:
    def order(prompt: int, seed: int) -> tuple[int, ...]:
        return tuple(r.order for r in _score(ScorePrompt(f"p{prompt}", "chat", PROMPT.tokens), seed=seed, tokens=2))

    first = [order(prompt, 0) for prompt in range(8)]
    assert first == [order(prompt, 0) for prompt in range(8)]
    assert first != [order(prompt, 1) for prompt in range(8)]
    assert all(sorted(o) == [0, 1, 2] for o in first)
    # Every arm comes first somewhere.
    assert {o.index(0) for o in first} == {0, 1, 2}


def test_sampled_records_repeat_and_are_not_compared() -> None:
    one, again, other = (_score(temperature=1.0, seed=s) for s in (0, 0, 1))
    assert [r.digest for r in one] == [r.digest for r in again]
    assert [r.digest for r in one] != [r.digest for r in other]
    assert all(r.mismatch is None for r in one)


def test_seeds_of_requests_differ_in_every_part() -> None:
    seeds = [
        request_seed(0),
        request_seed(1),
        request_seed(0, "a"),
        request_seed(0, "a", 0.0),
        request_seed(0, "a", 1.0),
    ]
    assert len(set(seeds)) == 5
    assert request_seed(3, "p", 0.5) == request_seed(3, "p", 0.5)
    # torch takes seeds of up to 63 bits.
    assert all(0 <= seed < 2**63 for seed in seeds)


class _Flat(MemoModel):
    """Tokens 1 and 2 on top, apart by a set margin; token 0 far below."""

    def __init__(self, margin: float) -> None:
        super().__init__(tiny_model(0))
        self.margin = margin

    def row(self, prefix: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([-9.0, 5.0, 5.0 - self.margin], dtype=torch.float64)


@pytest.mark.parametrize(
    ("margin", "tokens", "near", "distance"),
    [
        # fp32 explains a hundredth: both tokens on top, close.
        (0.005, [1, 2], True, 0.005),
        (0.05, [1, 2], False, 0.05),
        # Close on top, but one of the two tokens is not there.
        (0.005, [1, 0], False, 14.0),
    ],
)
def test_a_difference_is_a_near_tie_only_between_tokens_on_top(
    margin: float, tokens: list[int], near: bool, distance: float
) -> None:
    mismatch = explain_mismatch(_Flat(margin), torch.tensor([0]), tokens, [1, 1], reference_precision="fp32")
    assert mismatch is not None
    assert (mismatch.position, mismatch.near_tie) == (1, near)
    assert mismatch.margin == pytest.approx(distance, abs=1e-6)


@pytest.mark.parametrize(("second", "near"), [(4.995, True), (4.9, False)])
def test_three_tokens_may_be_near(second: float, near: bool) -> None:
    class Three(MemoModel):
        def row(self, prefix: tuple[int, ...]) -> torch.Tensor:
            return torch.tensor([5.0, 4.998, second], dtype=torch.float64)

    mismatch = explain_mismatch(Three(tiny_model(0)), torch.tensor([0]), [2], [1], reference_precision="fp32")
    assert mismatch is not None and mismatch.near_tie is near


@pytest.mark.parametrize(("reference", "near"), [("fp32", False), ("bf16", True)])
def test_the_coarser_arithmetic_of_the_two_says_what_is_near(reference: str, near: bool) -> None:
    mismatch = explain_mismatch(_Flat(0.2), torch.tensor([0]), [1, 2], [1, 1], reference_precision=reference)
    assert mismatch is not None and mismatch.near_tie is near


@pytest.mark.parametrize(
    ("best", "margin", "near"),
    [(5.0, 0.6, False), (31.0, 0.6, False), (33.0, 1.0, True), (33.0, 1.1, False), (-66.0, 2.0, True)],
)
def test_in_bf16_tokens_with_large_logits_are_near_where_their_numbers_are(
    best: float, margin: float, near: bool
) -> None:
    class Large(MemoModel):
        def row(self, prefix: tuple[int, ...]) -> torch.Tensor:
            return torch.tensor([best - 9.0, best, best - margin], dtype=torch.float64)

    mismatch = explain_mismatch(Large(tiny_model(0)), torch.tensor([0]), [2], [1], reference_precision="bf16")
    assert mismatch is not None and mismatch.near_tie is near


def test_equal_tokens_need_no_explanation() -> None:
    assert explain_mismatch(_Flat(0.0), torch.tensor([0]), [1, 2], [1, 2], reference_precision="fp32") is None


@pytest.mark.parametrize(("tokens", "reference"), [([1], [1, 1]), ([1, 1], [1])])
def test_an_answer_that_merely_ends_early_is_no_near_tie(tokens: list[int], reference: list[int]) -> None:
    mismatch = explain_mismatch(_Flat(0.001), torch.tensor([0]), tokens, reference, reference_precision="fp32")
    assert mismatch is not None and (mismatch.position, mismatch.near_tie) == (1, False)


def test_best_block_by_hand() -> None:
    # Smoothed by one pseudo-count at the neighbour: (8 + 0.5) / 11, then (1 + that) / 9.
    first = 8.5 / 11
    second = (1 + first) / 9
    passes = {1: 1.0, 2: 1.1, 3: 1.2}
    choice = best_block([8, 1], [10, 8], 0.1, pass_seconds=passes.__getitem__)
    assert choice.conditional == pytest.approx([first, second])
    # A block of one: 1 + first tokens in 0.1 + 1.1; of two: first x second more in 0.2 + 1.2.
    expected = [(1 + first) / 1.2, (1 + first + first * second) / 1.4]
    assert choice.expected == pytest.approx(expected)
    assert (choice.tokens, choice.draft_seconds) == (1, 0.1)


def test_best_block_counts_rounds_that_proposed_less_or_nothing() -> None:
    # 10 rounds: 4 proposed nothing, 2 one token, 4 two. Of 6 first tokens 3 stood; 2 of these had a second; 1 stood.
    passes = {1: 1.0, 2: 1.1, 3: 1.2}
    choice = best_block(
        [3, 1], [6, 2], 0.1, block_seconds=0.2, pass_seconds=passes.__getitem__, blocks={0: 4, 1: 2, 2: 4}
    )
    first = 3.5 / 7
    second = (1 + first) / 3
    assert choice.conditional == pytest.approx([first, second])
    one, two = 1 + 0.6 * first, 1 + 0.6 * first + 0.2 * second
    costs = [0.4 * 1.0 + 0.6 * (0.2 + 0.1 + 1.1), 0.4 * 1.0 + 0.2 * (0.2 + 0.1 + 1.1) + 0.4 * (0.2 + 0.2 + 1.2)]
    assert choice.expected == pytest.approx([one / costs[0], two / costs[1]])


def test_best_block_takes_siblings_that_are_worth_their_place() -> None:
    # 100 rounds of one token: 40 stood, in 20 others the first sibling did, in 5 the second.
    shares: dict[str, Any] = {"blocks": {1: 100}, "beside": [[20, 5]]}
    flat = best_block([40], [100], 0.1, pass_seconds=lambda w: 1.0, **shares)
    assert (flat.siblings, flat.shape) == ([2], "1+(2)")
    share = (40 + 0.5) / 101
    assert flat.expected == pytest.approx([(1 + share + 0.25) / 1.1])
    # 0.1 a token: the first adds 0.2 tokens to 1.4 in 1.2, the second 0.05 to 1.6 in 1.3.
    rising = best_block([40], [100], 0.1, pass_seconds=lambda w: 0.9 + 0.1 * w, **shares)
    assert rising.siblings == [1]
    assert rising.expected == pytest.approx([(1 + share + 0.2) / 1.3])
    steep = best_block([40], [100], 0.1, pass_seconds=lambda w: 0.5 + 0.5 * w, **shares)
    assert (steep.siblings, steep.shape) == ([], "1")


def test_best_block_offers_siblings_only_beside_its_own_tokens() -> None:
    # The second token hardly ever stands, but a sibling beside it would: a chain of one cannot have it.
    choice = best_block(
        [50, 0], [100, 50], 0.2, pass_seconds=lambda w: 1.0 + 0.02 * w, blocks={2: 100}, beside=[[0], [4]]
    )
    assert (choice.tokens, choice.siblings) == (1, [])


def test_best_block_is_longer_where_a_round_costs_the_same_whatever_its_length() -> None:
    shares, counts = [60.0] * 6, [100.0] * 6
    by_token = best_block(shares, counts, 0.3, pass_seconds=lambda w: 1.0)
    by_round = best_block(shares, counts, 0.0, block_seconds=0.3, pass_seconds=lambda w: 1.0)
    assert by_token.tokens < by_round.tokens == 6
    assert by_round.expected[0] == pytest.approx(by_token.expected[0])


def test_best_block_grows_with_acceptance_and_shrinks_with_cost() -> None:
    def block(share: float, draft_seconds: float, slope: float) -> int:
        counts = [100.0] * 8
        accepted = [share * 100.0] * 8
        return best_block(accepted, counts, draft_seconds, pass_seconds=lambda w: 1.0 + slope * w).tokens

    assert block(0.99, 0.01, 0.01) == 8
    assert block(0.3, 0.1, 0.1) == 1
    assert block(0.8, 0.01, 0.01) > block(0.8, 0.3, 0.01) >= 1
    assert block(0.8, 0.01, 0.01) > block(0.8, 0.01, 0.5)


def test_drafting_costs_are_a_line_through_two_block_lengths() -> None:
    # 3 ms a round and 2 ms a token: blocks of 5 take 13 ms, blocks of 1 take 5.
    long = Drafting([DraftedRequest(10, 50, 0.13), DraftedRequest(20, 100, 0.26)])
    assert long.costs(Drafting([DraftedRequest(4, 4, 0.02)])) == pytest.approx((0.003, 0.002))
    assert long.costs(Drafting()) == pytest.approx((0.0, 0.0026))
    assert Drafting().costs(Drafting()) == (0.0, 0.0)


def test_a_request_that_was_held_up_does_not_make_drafting_dear() -> None:
    long = Drafting([DraftedRequest(10, 50, 0.13), DraftedRequest(10, 50, 9.0), DraftedRequest(10, 50, 0.13)])
    short = Drafting([DraftedRequest(4, 4, 0.02), DraftedRequest(4, 4, 0.02), DraftedRequest(4, 4, 5.0)])
    assert long.costs(short) == pytest.approx((0.003, 0.002))


def test_best_block_without_any_round_assumes_little() -> None:
    choice = best_block([0.0, 0.0], [0.0, 0.0], 0.2, pass_seconds=lambda w: 1.0)
    assert choice.conditional == [0.5, 0.5]


@pytest.mark.parametrize(("name", "tokens"), [("same", 5), ("other", 1)])
def test_a_block_length_is_chosen_from_what_is_measured(name: str, tokens: int) -> None:
    arm = next(a for a in _arms() if a.name == name)
    choice = choose_block(
        arm,
        [ScorePrompt(f"v{i}", "chat", torch.tensor([i, 2, 7])) for i in range(3)],
        longest=5,
        settings=[SamplingSettings()],
        max_new_tokens=24,
        stop_tokens=NONE,
        # A pass so slow and flat that drafting is free: only acceptance counts.
        pass_seconds=lambda width: 100.0 + (0.0 if name == "same" else 60.0 * width),
        seed=0,
    )
    assert choice.tokens == tokens
    assert len(choice.expected) == len(choice.conditional) == 5
    assert choice.draft_seconds > 0.0
    assert (choice.conditional[0] > 0.9) == (name == "same")
