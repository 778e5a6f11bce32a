"""One engine under load: how many run, which seconds count, and what each request waited for.

The clock moves by one second a step of the engine, just before its round; so the n-th step begins at n - 1 and emits
at n, and every figure can be derived by hand.
"""

import itertools
import statistics

import pytest
import torch

from inference.attention import GROUPED, use_grouped_attention
from inference.batch import BatchEngine
from inference.batch.copies import drafter_maker
from inference.batch.costs import LoadCosts
from inference.batch.load import (
    BATCH,
    CLOSED,
    Asked,
    LoadRun,
    Point,
    Served,
    Trace,
)
from inference.batch.load_figures import LoadFigure, claims, foretold, load_figures
from inference.batch.plain import plain_generate
from inference.batch.timing import timed_passes
from inference.decoder import decode
from inference.drafters import Drafter
from inference.drafters.feature import FeatureDrafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.mixed import MixedDrafter, mixed_drafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.driving import closed_loop, poisson_arrivals, timed_load
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import make_network
from inference.graphed.engine import GraphedEngine
from inference.graphed.rounds import Rounds
from inference.lean import use_lean_layers
from inference.lookahead import Lookahead
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.records import Mismatch
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from tests.inference.law import tiny_model

VOCAB = 12
LOOP = Point(CLOSED, 2)


def _model(seed: int = 0) -> CausalModel:
    model = tiny_model(seed, vocab=VOCAB, spread=3.0)
    use_grouped_attention(model.model)
    return model


@pytest.fixture(scope="module")
def target() -> CausalModel:
    return _model()


class _Stepping(BatchEngine):
    """Moves a clock by a second a step, and notes how many requests each round had."""

    now = 0.0

    def step(self) -> None:
        self.now += 1.0
        super().step()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def _engine(target: CausalModel, drafter: Drafter, lookahead: Lookahead, *, places: int) -> _Stepping:
    return _Stepping(target, drafter_maker(drafter), lookahead, max_requests=places)


def _plain(target: CausalModel, places: int) -> _Stepping:
    return _engine(target, NoDrafter(), FixedLookahead(0), places=places)


def _asked(*lengths: int, prompts: int = 4, stops: frozenset[int] = frozenset()) -> list[Asked]:
    """Greedy requests that write so many tokens each."""
    return [
        Asked(
            prompt_id=f"p{index}",
            domain=("chat", "code")[index % 2],
            prompt=torch.arange(1 + index % prompts) % VOCAB,
            request=Request(settings=SamplingSettings(), max_new_tokens=length, stop_tokens=stops),
            seed=index,
        )
        for index, length in enumerate(lengths)
    ]


# Closed loops


def test_each_that_ends_is_replaced_and_the_drain_does_not_count(target: CausalModel) -> None:
    # Two run. 0 writes at 1, 2; 1 at 1, 2, 3; 2 takes the place of 0 and writes at 3; 3 comes at 3, alone: 4, 5.
    trace, answers = closed_loop(engine := _plain(target, 2), _asked(2, 3, 1, 2), concurrency=2, clock=engine.clock)
    assert [one.arrival for one in trace.served] == [0.0, 0.0, 2.0, 3.0]
    assert [one.start for one in trace.served] == [0.0, 0.0, 2.0, 3.0]
    assert [one.end for one in trace.served] == [2.0, 3.0, 3.0, 5.0]
    assert [[moment for moment, _ in one.emissions] for one in trace.served] == [[1, 2], [1, 2, 3], [3], [4, 5]]
    # From 3 on a place is free that nobody can take: 2 + 3 + 1 tokens in three seconds.
    assert (trace.window, trace.window_tokens, trace.elapsed, trace.rounds) == (3.0, 6, 5.0, 5)
    assert [len(answer) for answer in answers] == [2, 3, 1, 2]


def test_as_many_run_as_were_asked_for(target: CausalModel) -> None:
    engine = _plain(target, 5)
    trace, _ = closed_loop(engine, _asked(*[4, 3, 5, 2, 4, 3, 2, 5]), concurrency=3, clock=engine.clock)
    running = [sum(one.start <= begun < one.end for one in trace.served) for begun in range(trace.rounds)]
    assert running[: int(trace.window)] == [3] * int(trace.window)
    assert trace.window < trace.rounds and all(count < 3 for count in running[int(trace.window) :])


def test_where_the_last_ones_end_together_everything_counts(target: CausalModel) -> None:
    trace, _ = closed_loop(engine := _plain(target, 2), _asked(3, 3, 3, 3), concurrency=2, clock=engine.clock)
    assert (trace.window, trace.window_tokens) == (6.0, 12)


def test_too_few_requests_or_places_are_refused(target: CausalModel) -> None:
    with pytest.raises(ValueError, match="1 requests and 4 places cannot keep 2 requests running"):
        closed_loop(_plain(target, 4), _asked(1), concurrency=2)
    with pytest.raises(ValueError, match="3 requests and 1 places cannot keep 2"):
        closed_loop(_plain(target, 1), _asked(1, 1, 1), concurrency=2)


def test_a_round_that_emits_three_tokens_gives_three_gaps_of_a_third(target: CausalModel) -> None:
    # The draft is the target, so every token stands: seven tokens come as 3, 3 and 1.
    engine = _engine(target, ModelDrafter(_model()), FixedLookahead(2), places=1)
    trace, _ = closed_loop(engine, _asked(7), concurrency=1, clock=engine.clock)
    [one] = trace.served
    assert one.emissions == [(1.0, 3), (2.0, 3), (3.0, 1)]
    assert one.gaps(until=3.0) == pytest.approx([1 / 3] * 3 + [1.0]), "the first round's time is the prefill's"
    assert one.gaps(until=2.5) == pytest.approx([1 / 3] * 3)
    assert one.seconds_per_token == pytest.approx(3 / 7)
    assert (one.passes, one.tokens, one.blocks) == (3, 7, {"0": 1, "2": 2})
    assert (one.proposed, one.accepted) == ([2, 2], [2, 2])


def test_answers_under_load_are_those_alone(target: CausalModel) -> None:
    asked = _asked(5, 3, 6, 4, 2)
    engine = _engine(target, LookupDrafter(LookupSettings(longest=2, shortest=1)), FixedLookahead(2), places=3)
    _, answers = closed_loop(engine, asked, concurrency=3, clock=engine.clock)
    for one, answer in zip(asked, answers, strict=True):
        source = TorchSource.seeded(0)
        alone = decode(
            target, NoDrafter(), one.prompt, request=one.request, lookahead=FixedLookahead(0), generator=source
        )
        assert answer == alone.tokens


# Arrivals


def test_waiting_counts_from_the_moment_of_arrival(target: CausalModel) -> None:
    # One place. 0 comes at 0.5 and writes at 1.5, 2.5; 1 came at 0.6 and writes at 3.5, 4.5; 2 came at 4.2, during
    # the last round of 1: 5.5, 6.5.
    engine = _plain(target, 1)
    trace, _ = timed_load(engine, _asked(2, 2, 2), [0.5, 0.6, 4.2], clock=engine.clock, sleep=engine.sleep)
    assert [one.arrival for one in trace.served] == [0.5, 0.6, 4.2]
    assert [one.start for one in trace.served] == [0.5, 2.5, 4.5]
    assert [one.emissions[0][0] - one.arrival for one in trace.served] == pytest.approx([1.0, 2.9, 1.3])
    assert [one.end - one.arrival for one in trace.served] == pytest.approx([2.0, 3.9, 2.3])
    assert (trace.window, trace.elapsed, trace.rounds) == (6.5, 6.5, 6)


def test_an_idle_engine_sleeps_until_somebody_comes(target: CausalModel) -> None:
    engine = _plain(target, 2)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        engine.sleep(seconds)

    timed_load(engine, _asked(1, 1), [2.0, 9.0], clock=engine.clock, sleep=sleep)
    assert slept == [2.0, 6.0]


def test_gaps_between_arrivals_are_exponential_and_seeded() -> None:
    moments = poisson_arrivals(4000, rate=5.0, seed=3)
    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *moments])]
    # Mean and standard deviation of an exponential law are both 1 / rate; 4,000 draws know them to a few per cent.
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1)
    assert moments == poisson_arrivals(4000, rate=5.0, seed=3) == sorted(moments)
    assert moments != poisson_arrivals(4000, rate=5.0, seed=4)
    slower = poisson_arrivals(4000, rate=2.5, seed=3)
    assert slower == pytest.approx([2 * moment for moment in moments]), "the same pattern, stretched"


# By captured rounds


class _SteppingRounds(GraphedEngine):
    """Moves a clock by a second a step; tokens of a round are there at the end of the next step."""

    now = 0.0

    def step(self) -> None:
        self.now += 1.0
        super().step()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def lean() -> CausalModel:
    model = _model()
    use_lean_layers(model.model)
    return model


def _captured(target: CausalModel, places: int) -> _SteppingRounds:
    return _SteppingRounds(Rounds(target, None, block=0, batch=places, capacity=64))


def test_captured_rounds_replace_those_that_end_by_themselves(lean: CausalModel) -> None:
    # Two run. The rounds of steps 1 and 2 give 0 its tokens, at 2 and 3; its last one is foreseen at 2, so that 2 takes
    # the place in the step that begins there. Likewise 3 that of 1, whose last round is that of step 3. 2 ends at 4.
    trace, answers = closed_loop(engine := _captured(lean, 2), _asked(2, 3, 1, 2), concurrency=2, clock=engine.clock)
    assert [one.start for one in trace.served] == [0.0, 0.0, 2.0, 3.0] == [one.arrival for one in trace.served]
    assert [one.end for one in trace.served] == [3.0, 4.0, 4.0, 6.0]
    assert [[moment for moment, _ in one.emissions] for one in trace.served] == [[2, 3], [2, 3, 4], [4], [5, 6]]
    # From 4 on a place is free that nobody can take; the sixth step only looks at the fifth round.
    assert (trace.window, trace.window_tokens, trace.elapsed, trace.rounds) == (4.0, 6, 6.0, 5)
    assert trace.draft_seconds == 0.0 < trace.pass_seconds
    plain = _plain(lean, 2)
    assert answers == closed_loop(plain, _asked(2, 3, 1, 2), concurrency=2, clock=plain.clock)[1]


def test_waiting_for_a_captured_place_counts_from_the_arrival(lean: CausalModel) -> None:
    engine = _captured(lean, 1)
    trace, _ = timed_load(engine, _asked(2, 2), [0.5, 0.6], clock=engine.clock, sleep=engine.sleep)
    assert [one.arrival for one in trace.served] == [0.5, 0.6]
    assert [one.start for one in trace.served] == [0.5, 2.5]
    assert [one.emissions[0][0] for one in trace.served] == [2.5, 4.5]
    assert (trace.window, trace.elapsed, trace.rounds) == (5.5, 5.5, 4)


def test_captured_rounds_keep_as_many_requests_as_they_have_places(lean: CausalModel) -> None:
    with pytest.raises(ValueError, match="captured rounds of 3 places keep as many requests, not 2"):
        closed_loop(_captured(lean, 3), _asked(1, 1, 1), concurrency=2)


# Seconds inside and outside passes


def test_every_pass_is_timed_and_no_pass_after_the_block(target: CausalModel) -> None:
    with timed_passes(target, clock=itertools.count().__next__) as timer:  # a second between any two readings
        target.logits(torch.tensor([1, 2]), target.new_cache(), num_rows=1)
        target.logits(torch.tensor([1]), target.new_cache(), num_rows=1)
    target.logits(torch.tensor([1]), target.new_cache(), num_rows=1)
    assert (timer.passes, timer.seconds) == (2, 2)


def test_what_is_neither_passes_nor_drafting_is_outside(target: CausalModel) -> None:
    trace = Trace(window=1.0, elapsed=4.0, rounds=2, pass_seconds=2.5, draft_seconds=1.0, served=[])
    assert trace.outside_seconds == 0.5
    trace, _ = closed_loop(_plain(target, 2), _asked(2, 2), concurrency=2)
    assert 0.0 < trace.draft_seconds < trace.pass_seconds < trace.elapsed
    assert 0.0 < trace.outside_seconds < trace.elapsed - trace.pass_seconds


# Drafters that share weights


def test_drafters_share_weights_and_nothing_else(target: CausalModel) -> None:
    network = make_network(Eagle3(block=3, taps=[0, 1], vocabulary=0), target, None, seed=3).double().eval()
    first = ModelDrafter(_model(1))
    make = drafter_maker(first)
    one, other = make(), make()
    assert isinstance(one, ModelDrafter) and isinstance(other, ModelDrafter)
    assert one.model is other.model is first.model
    one.begin(torch.tensor([1, 2, 3]))
    assert (one.cache.length, other.cache.length, first.cache.length) == (2, 0, 0)

    inner = FeatureDrafter(network)
    mixed = drafter_maker(mixed_drafter(LookupDrafter(LookupSettings()), inner, draft_tokens=2))
    outer = mixed()
    assert isinstance(outer, MixedDrafter) and isinstance(outer.draft, FeatureDrafter)
    assert outer.draft.network is network and outer.draft is not inner and outer.lookup is not mixed().lookup
    assert outer.draft_tokens == 2


# transformers' own generate


@pytest.mark.parametrize("stops", [frozenset[int](), frozenset({3, 7})])
def test_generate_answers_as_the_engine_does(target: CausalModel, stops: frozenset[int]) -> None:
    asked = _asked(9, 9, 9, 9, 9, stops=stops)
    _, expected = timed_load(_plain(target, 5), asked, [0.0] * 5)
    trace, answers = plain_generate(target, asked)
    assert answers == expected
    assert len({len(one.prompt) for one in asked}) > 1, "some rows are padded"
    assert [one.tokens for one in trace.served] == [len(answer) for answer in answers]
    assert trace.window == trace.elapsed >= trace.pass_seconds > 0.0
    assert target.model.config._attn_implementation == GROUPED, "our attention is back"


def test_generate_refuses_what_it_cannot_be_compared_on(target: CausalModel) -> None:
    with pytest.raises(ValueError, match="greedy requests that ask for the same"):
        plain_generate(target, _asked(3, 4))


# Figures


def made_run(arm: str, block: int, tokens: int, *, point: Point = LOOP, **served: object) -> LoadRun:
    """A block of ten seconds in which one request wrote so many tokens, at 5 and at 10."""
    one = Served(
        prompt_id="p",
        domain="chat",
        temperature=0.0,
        arrival=1.0,
        start=2.0,
        end=10.0,
        emissions=[(5.0, 1), (10.0, tokens - 1)],
        **{"passes": 2, "proposed": [], "accepted": [], "blocks": {"0": 2}, "digest": "", **served},  # type: ignore[arg-type]
    )
    trace = Trace(window=10.0, elapsed=10.0, rounds=4, pass_seconds=7.0, draft_seconds=1.0, served=[one])
    return LoadRun(arm=arm, point=point, block=block, order=0, precision="fp32", trace=trace)


def _load(**speeds: tuple[int, int]) -> list[LoadRun]:
    """Tokens of each arm in two blocks."""
    return [
        made_run(arm.replace("_", "-"), block, tokens)
        for arm, both in speeds.items()
        for block, tokens in enumerate(both)
    ]


def test_ratios_are_of_sums_and_paired_by_block() -> None:
    figures = load_figures(_load(none=(11, 21), fixed_1=(22, 42), fixed_2=(12, 12), scheduled=(33, 63)))
    best = _figure(figures, "scheduled", LOOP)
    assert best.tokens_per_s.value == pytest.approx(96 / 20)
    # Whatever blocks are drawn, three times as many tokens: the interval is a point.
    assert (best.over_none.low, best.over_none.value, best.over_none.high) == pytest.approx((3.0, 3.0, 3.0))
    assert best.over_fixed is not None and best.over_fixed.value == pytest.approx(1.5)
    assert [f.arm for f in figures if f.best_fixed] == ["fixed-1"]
    assert [f.arm for f in figures] == ["none", "fixed-1", "fixed-2", "scheduled"]


def test_a_figure_has_lengths_latencies_and_what_is_outside() -> None:
    miss = Mismatch(position=1, margin=9.0, near_tie=False)
    run = made_run("none", 0, 5)
    other = made_run("fixed-2", 0, 5, proposed=[2, 1], accepted=[1, 1], blocks={"1": 1, "2": 1}, mismatch=miss)
    figure = _figure(load_figures([run, other]), "fixed-2", LOOP)
    assert (figure.mean_length, figure.tau, figure.alpha) == (1.5, 2.5, 2 / 3)
    assert figure.token_ms == pytest.approx((1250, 1250)), "four tokens in the five seconds of the second round"
    assert figure.first_ms == pytest.approx((4000, 4000)) and figure.total_ms == pytest.approx((9000, 9000))
    assert figure.request_token_ms == pytest.approx((1600, 1600)), "eight seconds from the start, five tokens"
    assert figure.round_ms == 2500
    assert (figure.outside_round_ms, figure.outside_request_ms) == pytest.approx((500, 2000))
    assert (figure.mismatches, figure.unexplained) == (1, 1)
    assert figure.over_none.low is None, "one block says nothing of the spread"


def test_claims_are_read_off_intervals() -> None:
    good = claims(load_figures(_load(none=(10, 20), fixed_1=(11, 22), scheduled=(13, 26))))
    assert (good.loads, good.below_fixed, good.well_above, good.below_none) == ([2], [], [2], [])
    bad = claims(load_figures(_load(none=(10, 20), fixed_1=(11, 22), scheduled=(8, 16))))
    assert (bad.below_fixed, bad.well_above, bad.below_none) == ([2], [], [2])
    noisy = claims(load_figures(_load(none=(10, 20), fixed_1=(11, 22), scheduled=(15, 16))))
    assert (noisy.below_fixed, noisy.well_above) == ([], []), "31 over 33, and once more, once less"
    point = Point(BATCH, 8)
    beside = [made_run(arm, block, n, point=point) for arm, n in (("none", 10), ("generate", 12)) for block in (0, 1)]
    assert claims(load_figures(beside)).under_generate == [8]


def test_a_run_survives_its_line() -> None:
    run = made_run("fixed-2", 3, 5, mismatch=Mismatch(position=1, margin=0.1, near_tie=True))
    assert LoadRun.from_json(run.to_json()) == run
    assert "\n" not in run.to_json()


def test_what_there_is_to_gain_follows_from_the_parts() -> None:
    # Passes cost 1 + width / 10; drafting a token 0.05. One request: length 1 gives 1.8 tokens for 1.2 + 0.05 against
    # 1.1: 1.584; length 2 gives 1.8 + 0.16 for 1.3 + 0.1: 1.54.
    costs = LoadCosts(
        passes={1: {1: 1.1, 101: 11.1}, 40: {40: 5.0, 80: 9.0}}, drafts={1: (0.0, 0.05), 40: (0.0, 2.0)}, spread={}
    )
    chances = [0.8, 0.2]
    assert foretold(chances, costs, concurrency=1, longest=8) == (1, pytest.approx(1.8 * 1.1 / 1.25))
    assert foretold(chances, costs, concurrency=1, longest=0) == (0, 1.0)
    # Forty requests: 1.8 * 5 against 9 + 2 loses.
    assert foretold(chances, costs, concurrency=40, longest=8) == (0, 1.0)


def _figure(figures: list[LoadFigure], arm: str, point: Point) -> LoadFigure:
    return next(figure for figure in figures if (figure.arm, figure.point) == (arm, point))
