"""Several drafts of one target at once: outputs are as alone, shares hold, losers go off, swaps drop nothing."""

import gc
import random
import weakref
from collections.abc import Callable

import pytest
import torch

from inference.attention import use_grouped_attention
from inference.batch import BatchEngine, Handle, Outcome
from inference.batch.arms import ArmEngine, ArmSpec, GuardConfig, _Pairs
from inference.betting import BettingTest
from inference.decoder import decode
from inference.drafters import Drafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from tests.inference.law import tiny_model

VOCAB = 12


def model(seed: int) -> CausalModel:
    found = tiny_model(seed, vocab=VOCAB, spread=3.0)
    found.context_limit = 48
    use_grouped_attention(found.model)
    return found


@pytest.fixture(scope="module")
def target() -> CausalModel:
    return model(0)


def perfect(target: CausalModel) -> Callable[[], Drafter]:
    return lambda: ModelDrafter(target)


def rubbish() -> Callable[[], Drafter]:
    other = model(9)
    return lambda: ModelDrafter(other)


def lookup() -> Drafter:
    return LookupDrafter(LookupSettings(longest=3, shortest=1))


def request(number: int) -> tuple[torch.Tensor, Request]:
    rng = random.Random(number)
    prompt = torch.tensor([rng.randrange(VOCAB) for _ in range(rng.randint(2, 9))])
    settings = SamplingSettings(temperature=rng.choice([0.0, 1.0]))
    return prompt, Request(settings=settings, max_new_tokens=rng.randint(4, 12), stop_tokens=frozenset())


def alone(target: CausalModel, make: Callable[[], Drafter], number: int, tokens: int) -> list[int]:
    prompt, asked = request(number)
    source = TorchSource.seeded(number)
    return decode(target, make(), prompt, request=asked, lookahead=FixedLookahead(tokens), generator=source).tokens


def submit(engine: ArmEngine, number: int) -> Handle:
    prompt, asked = request(number)
    return engine.submit(prompt, asked, request_id=f"r{number}", generator=TorchSource.seeded(number))


def finish(engine: ArmEngine) -> None:
    for _ in range(10_000):
        if engine.idle:
            return
        engine.step()
    raise AssertionError("requests never end")


@pytest.fixture
def drafts(target: CausalModel) -> dict[str, tuple[Callable[[], Drafter], int]]:
    """Drafter and block length by arm."""
    return {"none": (NoDrafter, 0), "lookup": (lookup, 2), "other": (rubbish(), 3)}


def specs(drafts: dict[str, tuple[Callable[[], Drafter], int]], shares: dict[str, float]) -> list[ArmSpec]:
    return [ArmSpec(name, *_spec(drafts[name]), share) for name, share in shares.items()]


def _spec(draft: tuple[Callable[[], Drafter], int]) -> tuple[Callable[[], Drafter], FixedLookahead]:
    return draft[0], FixedLookahead(draft[1])


@pytest.mark.parametrize("max_requests", [1, 3, 8])
def test_whatever_its_arm_a_request_gets_the_tokens_it_gets_alone(
    target: CausalModel, drafts: dict[str, tuple[Callable[[], Drafter], int]], max_requests: int
) -> None:
    engine = ArmEngine(target, specs(drafts, {"none": 1, "lookup": 1, "other": 1}), max_requests=max_requests)
    handles = {number: submit(engine, number) for number in range(24)}
    met = {number: engine.arm_of(f"r{number}") for number in handles}
    finish(engine)
    assert set(met.values()) == set(drafts)
    for number, handle in handles.items():
        make, tokens = drafts[met[number]]
        assert handle.outcome is Outcome.DONE
        assert handle.result.tokens == alone(target, make, number, tokens)


def test_a_swap_changes_and_drops_no_request_that_was_taken_before(
    target: CausalModel, drafts: dict[str, tuple[Callable[[], Drafter], int]]
) -> None:
    engine = ArmEngine(target, specs(drafts, {"lookup": 1}), max_requests=2)
    before = {number: submit(engine, number) for number in range(6)}
    engine.step()
    engine.swap("lookup", ArmSpec("lookup", *_spec(drafts["other"]), 1))
    after = {number: submit(engine, number) for number in range(6, 12)}
    finish(engine)
    for handles, name in ((before, "lookup"), (after, "other")):
        make, tokens = drafts[name]
        assert all(h.result.tokens == alone(target, make, n, tokens) for n, h in handles.items())
    assert len(engine._engines()) == 1
    (figures,) = engine.figures()
    assert figures.requests == 6  # of the new draft alone


def test_shares_hold_and_ids_keep_their_arm(target: CausalModel) -> None:
    def engine(share: float) -> ArmEngine:
        arms = [
            ArmSpec("a", NoDrafter, FixedLookahead(0), 1 - share),
            ArmSpec("b", NoDrafter, FixedLookahead(0), share),
        ]
        return ArmEngine(target, arms, max_requests=1)

    ids = [f"request-{i}" for i in range(4000)]
    tenth, fifth = engine(0.1), engine(0.2)
    first = [tenth.arm_of(i) for i in ids]
    assert first == [tenth.arm_of(i) for i in ids]
    assert 0.08 < first.count("b") / len(ids) < 0.12
    moved = sum(a != fifth.arm_of(i) for a, i in zip(first, ids, strict=True)) / len(ids)
    assert 0.07 < moved < 0.13  # as few as can be: a tenth more goes to b


def test_bounds_hold_over_all_arms_and_admission_is_in_order(
    target: CausalModel, drafts: dict[str, tuple[Callable[[], Drafter], int]]
) -> None:
    engine = ArmEngine(target, specs(drafts, {"none": 1, "lookup": 1, "other": 1}), max_requests=3, max_cache_tokens=60)
    handles = [submit(engine, number) for number in range(20)]
    while not engine.idle:
        engine.step()
        assert engine.num_running <= 3 and engine.cache_tokens <= 60
        started = [handle.outcome is not Outcome.WAITING for handle in handles]
        assert started == sorted(started, reverse=True)
    assert all(handle.outcome is Outcome.DONE for handle in handles)


def test_a_draft_that_proposes_rubbish_is_turned_off_and_what_runs_ends(target: CausalModel) -> None:
    arms = [
        ArmSpec("good", perfect(target), FixedLookahead(3), 1),
        ArmSpec("bad", rubbish(), FixedLookahead(3), 1),
        ArmSpec("same", perfect(target), FixedLookahead(3), 1),
    ]
    engine = ArmEngine(target, arms, max_requests=4, guard=GuardConfig(margin=0.05, alpha=0.05))
    handles = [submit(engine, number) for number in range(160)]
    finish(engine)
    on = {figures.name: figures.on for figures in engine.figures()}
    assert on == {"good": True, "bad": False, "same": True}
    assert all(handle.outcome is Outcome.DONE for handle in handles)
    assert "bad" not in {engine.arm_of(f"new{i}") for i in range(200)}
    tau = {figures.name: figures.tau for figures in engine.figures()}
    assert tau["good"] > tau["bad"]


def test_traffic_that_moves_turns_off_no_equal_arm() -> None:
    """Shares of nine to one, rewards that fall by half: pairs are of the same time, whichever side has more."""
    for start, end in ((0.6, 0.3), (0.3, 0.6)):
        off = 0
        for seed in range(40):
            rng, pairs = random.Random(seed), _Pairs()
            test = BettingTest(null_mean=-0.05, low=-1.0, high=1.0, alternative="less")
            for number in range(3000):
                mean = start + (end - start) * number / 3000
                reward = min(1.0, max(0.0, rng.gauss(mean, 0.1)))
                difference = pairs.mine(reward) if rng.random() < 0.1 else pairs.control(reward)
                if difference is not None:
                    test.update(difference)
            off += test.rejected(0.05)
        assert off <= 4


def test_a_draft_that_was_swapped_out_is_let_go(target: CausalModel) -> None:
    engine = ArmEngine(target, [ArmSpec("a", lookup, FixedLookahead(2), 1)], max_requests=2)
    for number in range(4):
        submit(engine, number)
    engine.step()
    old = weakref.ref(engine._engines()[0])
    engine.swap("a", ArmSpec("a", NoDrafter, FixedLookahead(0), 1))
    finish(engine)
    gc.collect()
    assert old() is None and not engine._taken_by


def test_a_request_of_the_whole_context_fits_an_arm_with_longer_blocks_than_the_control(target: CausalModel) -> None:
    arms = [ArmSpec("a", NoDrafter, FixedLookahead(0), 0), ArmSpec("b", rubbish(), FixedLookahead(3), 1)]
    engine = ArmEngine(target, arms, max_requests=1)
    asked = Request(settings=SamplingSettings(temperature=0.0), max_new_tokens=100, stop_tokens=frozenset())
    handle = engine.submit(torch.tensor([1, 2, 3]), asked, request_id="r", generator=TorchSource.seeded(0))
    finish(engine)
    assert handle.outcome is Outcome.DONE


def test_an_arm_that_is_no_worse_is_seldom_turned_off_however_often_one_looks() -> None:
    rng = random.Random(3)
    off = 0
    for _ in range(300):
        test = BettingTest(null_mean=-0.02, low=-1.0, high=1.0, alternative="less")
        for _ in range(200):
            test.update(rng.betavariate(3, 3) - rng.betavariate(3, 3) - 0.02)
        off += test.rejected(0.05)
    assert off / 300 <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_cancelled_and_late_requests_leave_nothing(target: CausalModel) -> None:
    now = [0.0]
    engine = ArmEngine(target, [ArmSpec("a", NoDrafter, FixedLookahead(0), 1)], max_requests=1, clock=lambda: now[0])
    running, waiting, late = (submit(engine, number) for number in range(3))
    late.deadline = 1.0
    engine.step()
    engine.cancel(waiting)
    engine.cancel(running)
    now[0] = 2.0
    finish(engine)
    assert [h.outcome for h in (running, waiting, late)] == [Outcome.CANCELLED, Outcome.CANCELLED, Outcome.LATE]
    assert engine.num_running == 0 and engine.cache_tokens == 0 and not engine._taken_by


def test_arms_are_checked(target: CausalModel) -> None:
    arm = ArmSpec("a", NoDrafter, FixedLookahead(0), 1)
    with pytest.raises(ValueError, match="a name of its own"):
        ArmEngine(target, [arm, arm], max_requests=1)
    with pytest.raises(ValueError, match="shares of arms"):
        ArmEngine(target, [ArmSpec("a", NoDrafter, FixedLookahead(0), 0)], max_requests=1)
    with pytest.raises(ValueError, match="margin"):
        GuardConfig(margin=0)
    assert isinstance(ArmEngine(target, [arm], max_requests=1)._engines()[0], BatchEngine)
