"""Requests that join and leave captured rounds get what they would get alone."""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch

from inference.errors import InputError
from inference.feature_networks import FeatureNetwork
from inference.graphed.contexts import StaticContext
from inference.graphed.decode import GraphedDecoder
from inference.graphed.depths import FixedDepth, ScheduledDepth, load_seconds
from inference.graphed.engine import GraphedEngine, GraphedHandle, round_sizes
from inference.graphed.rounds import Rounds
from inference.model import CausalModel
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from tests.inference.families import VOCAB, lean_model
from tests.inference.test_feature_drafts import CONFIGS, REDUCED, network_for
from tests.inference.test_graphed import misfit, plainly, prompt, target_law

GREEDY = SamplingSettings()
KINDS = ("dflash", "dspark", "eagle3", "none")


@pytest.fixture(scope="module")
def target() -> CausalModel:
    return lean_model("llama", max_position_embeddings=256)


class Turns:
    """Every length in turn."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self._turn = lengths, 0

    def depth(self, places: int) -> int:
        self._turn += 1
        return self.lengths[self._turn % len(self.lengths)]

    def observe(self, depth: int, stood: Sequence[int]) -> None:
        assert all(0 <= count <= depth for count in stood)


def network_of(target: CausalModel, kind: str) -> FeatureNetwork | None:
    return None if kind == "none" else network_for(CONFIGS[kind], target, REDUCED)


def rounds_of(target: CausalModel, network: FeatureNetwork | None, places: int, capacity: int = 128) -> Rounds:
    return Rounds(target, network, block=network.block if network else 0, batch=places, capacity=capacity)


def asked(count: int, *, temperature: float = 0.0, tokens: int = 14) -> list[tuple[torch.Tensor, Request]]:
    """Prompts of one to forty tokens, answers of one to `tokens`."""
    draw = random.Random(5)
    settings = SamplingSettings(temperature=temperature)
    return [
        (prompt(draw.choice([1, 2, 9, 40]), seed=n), Request(settings=settings, max_new_tokens=draw.randint(1, tokens)))
        for n in range(count)
    ]


def run(
    engine: GraphedEngine, requests: list[tuple[torch.Tensor, Request]], *, at_once: int = 99
) -> list[GraphedHandle]:
    """All requests, some at once and another one every other round."""
    handles = [engine.submit(tokens, request, seed=n) for n, (tokens, request) in enumerate(requests[:at_once])]
    left = list(enumerate(requests))[at_once:]
    turn = 0
    while not engine.idle or left:
        if left and turn % 2:
            number, (tokens, request) = left.pop(0)
            handles.append(engine.submit(tokens, request, seed=number))
        engine.step()
        turn += 1
    return handles


@pytest.mark.parametrize("at_once", [99, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_ordinary_decoders(target: CausalModel, kind: str, at_once: int) -> None:
    network = network_of(target, kind)
    rounds = rounds_of(target, network, 5)
    depths = [None] if network is None else [None, Turns(range(network.block + 1))]
    requests = asked(14)
    wanted = [plainly(target, network, *one).tokens for one in requests]
    for depth in depths:
        engine = GraphedEngine(rounds, depth)
        for _ in range(2):
            assert [handle.result.tokens for handle in run(engine, requests, at_once=at_once)] == wanted


def test_an_answer_ends_at_a_stop_token_and_where_the_place_ends(target: CausalModel) -> None:
    network = network_of(target, "eagle3")
    engine = GraphedEngine(rounds_of(target, network, 2, 128))
    [whole] = run(engine, [(prompt(9), Request(settings=GREEDY, max_new_tokens=30))])
    stop = whole.result.tokens[7]
    ends = Request(settings=GREEDY, max_new_tokens=30, stop_tokens=frozenset({stop}))
    [ended, full] = run(engine, [(prompt(9), ends), (prompt(60), Request(settings=GREEDY, max_new_tokens=500))])
    assert ended.result.tokens == whole.result.tokens[: whole.result.tokens.index(stop) + 1]
    assert len(full.result.tokens) == engine.longest - 60
    with pytest.raises(InputError, match="context holds"):
        engine.submit(prompt(127), ends, seed=0)
    with pytest.raises(ValueError, match="know temperatures"):
        engine.submit(prompt(9), Request(settings=SamplingSettings(temperature=1.0, top_k=3), max_new_tokens=3), seed=0)


@pytest.mark.parametrize("kind", ["dspark", "eagle3", "none"])
def test_a_seed_gives_the_answer_it_gives_alone_in_as_many_rounds(target: CausalModel, kind: str) -> None:
    network = network_of(target, kind)
    assert unlike_alone(target, network, GraphedEngine(rounds_of(target, network, 4))) == 0


def unlike_alone(target: CausalModel, network: FeatureNetwork | None, engine: GraphedEngine) -> int:
    """Requests that the engine answers otherwise than captured rounds of each alone, by tokens or by rounds.

    Every other request is greedy, which changes nothing for the others."""
    requests = [
        one for pair in zip(asked(8, temperature=0.8), asked(8), strict=True) for one in pair
    ]  # more than there are places, so that these are used again
    alone = GraphedDecoder(rounds_of(target, network, 1))
    unlike = 0
    for number, ((tokens, request), handle) in enumerate(zip(requests, run(engine, requests), strict=True)):
        wanted = alone.decode(tokens, request=request, seed=number)
        unlike += (handle.result.tokens, handle.result.passes) != (wanted.tokens, wanted.passes)
    return unlike


def test_more_rounds_than_the_tape_has(target: CausalModel) -> None:
    request = Request(settings=SamplingSettings(temperature=0.8), max_new_tokens=150)
    alone = GraphedDecoder(rounds_of(target, None, 1, 256))
    engine = GraphedEngine(rounds_of(target, None, 2, 256))
    # Begun at different columns of it.
    handles = [engine.submit(prompt(5, seed=n), request, seed=n) for n in range(3)]
    while not engine.idle:
        engine.step()
    for number, handle in enumerate(handles):
        assert handle.result.tokens == alone.decode(prompt(5, seed=number), request=request, seed=number).tokens


Spoil = Callable[[pytest.MonkeyPatch, GraphedEngine], None]


def _other_rows_numbers(patch: pytest.MonkeyPatch, engine: GraphedEngine) -> None:
    draw = engine._draw

    def shifted(running) -> None:  # type: ignore[no-untyped-def]
        draw(running)
        engine._tape.copy_(engine._tape.roll(1, dims=0))

    patch.setattr(engine, "_draw", shifted)


def _numbers_used_again(patch: pytest.MonkeyPatch, engine: GraphedEngine) -> None:
    draw = engine._draw

    def same(running) -> None:  # type: ignore[no-untyped-def]
        draw(running)
        engine._tape.copy_(engine._tape[:, :1].expand_as(engine._tape).clone())

    patch.setattr(engine, "_draw", same)


def _draft_context_of_the_request_before(patch: pytest.MonkeyPatch, engine: GraphedEngine) -> None:
    patch.setattr(StaticContext, "starting", lambda self, rows, held: None)


def _lengths_of_the_request_before(patch: pytest.MonkeyPatch, engine: GraphedEngine) -> None:
    rounds = engine.rounds
    begin = rounds.begin_all

    def kept(places, prompts) -> None:  # type: ignore[no-untyped-def]
        before = rounds.lengths.clone()
        begin(places, prompts)
        rounds.lengths.copy_(torch.maximum(before, rounds.lengths))

    patch.setattr(rounds, "begin_all", kept)


def _one_token_less(patch: pytest.MonkeyPatch, engine: GraphedEngine) -> None:
    take = engine._take

    def fewer(flight) -> None:  # type: ignore[no-untyped-def]
        flight.host[:, -1].sub_(1).clamp_(min=1)
        take(flight)

    patch.setattr(engine, "_take", fewer)


def _one_token_more(patch: pytest.MonkeyPatch, engine: GraphedEngine) -> None:
    take = engine._take

    def more(flight) -> None:  # type: ignore[no-untyped-def]
        flight.host[:, -1].add_(1)
        take(flight)

    patch.setattr(engine, "_take", more)


def _rows_mixed_up(patch: pytest.MonkeyPatch, engine: GraphedEngine) -> None:
    take = engine._take

    def rolled(flight) -> None:  # type: ignore[no-untyped-def]
        flight.host.copy_(flight.host.roll(1, dims=0))
        take(flight)

    patch.setattr(engine, "_take", rolled)


def _looked_at_too_late(patch: pytest.MonkeyPatch, engine: GraphedEngine) -> None:
    host = engine._hosts[0]
    patch.setattr(engine, "_hosts", [host, host])


@pytest.mark.parametrize(
    "spoil",
    [
        _other_rows_numbers,
        _numbers_used_again,
        _draft_context_of_the_request_before,
        _lengths_of_the_request_before,
        _one_token_less,
        _one_token_more,
        _rows_mixed_up,
        _looked_at_too_late,
    ],
)
def test_mutants_are_seen(target: CausalModel, monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> None:
    network = network_of(target, "dspark")
    engine = GraphedEngine(rounds_of(target, network, 4))
    spoil(monkeypatch, engine)
    assert unlike_alone(target, network, engine) > 0


def first_tokens(engine: GraphedEngine, requests: int, temperature: float) -> Counter[tuple[int, ...]]:
    """How often each answer of two tokens comes out; every request has a seed of its own."""
    request = Request(settings=SamplingSettings(temperature=temperature), max_new_tokens=2)
    handles = [engine.submit(prompt(4, seed=8), request, seed=n) for n in range(requests)]
    while not engine.idle:
        engine.step()
    return Counter(tuple(handle.result.tokens) for handle in handles)


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_sampled_answers_follow_the_targets_law_at_any_depth(
    target: CausalModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(target, kind)
    assert network is not None
    law = target_law(target, 0.4)
    # Odd many lengths: a request, of one round or two, is in rounds of any two of them.
    rounds = rounds_of(target, network, 300, 64)
    engine = GraphedEngine(rounds, Turns([0, 2, 1, network.block, 1]))
    assert misfit(first_tokens(engine, 4000, 0.4), law) < 4.0

    def of_another_depth(places: int, block: int) -> torch.Tensor:
        # As if the longest block were as long as this one: numbers that have drawn its tokens accept them.
        return rounds.uniforms[:places, :block]

    monkeypatch.setattr(rounds, "_accepting", of_another_depth)
    assert misfit(first_tokens(engine, 4000, 0.4), law) > 8.0


@pytest.mark.parametrize(
    "settings", [SamplingSettings(temperature=0.7, top_k=3), SamplingSettings(temperature=0.7, top_p=0.6)]
)
def test_truncated_laws(target: CausalModel, settings: SamplingSettings) -> None:
    network = network_of(target, "eagle3")
    assert network is not None
    rounds = Rounds(
        target, network, block=network.block, batch=200, capacity=64, top_k=settings.top_k, top_p=settings.top_p
    )
    engine = GraphedEngine(rounds)
    request = Request(settings=settings, max_new_tokens=1)
    handles = [engine.submit(prompt(4, seed=8), request, seed=n) for n in range(2000)]
    while not engine.idle:
        engine.step()
    from inference.sampling import token_probs

    tokens = prompt(4, seed=8)
    row = target.logits(tokens, target.new_cache(), num_rows=1)
    [chances] = token_probs(row, context=tokens, block=tokens[:0], settings=settings).tolist()
    counts = Counter(tuple(handle.result.tokens) for handle in handles)
    law = {(token,): chance for token, chance in enumerate(chances)}
    assert set(counts) <= {answer for answer, chance in law.items() if chance > 0}
    assert misfit(counts, law) < 4.0


def test_free_places_neither_grow_nor_touch_the_others(target: CausalModel) -> None:
    network = network_of(target, "eagle3")
    rounds = rounds_of(target, network, 4, 64)
    request = Request(settings=GREEDY, max_new_tokens=20)

    def answers() -> list[list[int]]:
        engine = GraphedEngine(rounds)
        found = []
        # One of four places is free in each of many rounds, more than any place has room for.
        for start in range(0, 24, 3):
            found += [h.result.tokens for h in run(engine, [(prompt(6, seed=start + n), request) for n in range(3)])]
        return found

    wanted = [plainly(target, network, prompt(6, seed=n), request).tokens for n in range(24)]
    assert answers() == wanted
    assert rounds.lengths.tolist()[3] == 0


def test_ballast_that_grows_is_seen(target: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = rounds_of(target, network_of(target, "eagle3"), 4, 64)
    monkeypatch.setattr(rounds, "_reset", lambda place, *, active: None)
    engine = GraphedEngine(rounds)
    engine.rounds.active.fill_(1)
    run(engine, [(prompt(6), Request(settings=GREEDY, max_new_tokens=20))] * 3)
    assert rounds.lengths.tolist()[3] > 0


def test_few_running_requests_are_moved_together(target: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(target, "eagle3")
    rounds = rounds_of(target, network, 9)
    sizes: list[int] = []
    once = rounds.round

    def noted(**options: int) -> None:
        sizes.append(options["places"])
        once(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(rounds, "round", noted)
    engine = GraphedEngine(rounds)
    assert engine.sizes == [1, 2, 4, 8, 9]
    # The last one outlives all others.
    lengths = [3, 3, 3, 3, 8, 8, 12, 12, 40]
    requests = [(prompt(7, seed=n), Request(settings=GREEDY, max_new_tokens=t)) for n, t in enumerate(lengths)]
    handles = run(engine, requests)
    for (tokens, request), handle in zip(requests, handles, strict=True):
        assert handle.result.tokens == plainly(target, network, tokens, request).tokens
    assert sizes[0] == 9 and sizes == sorted(sizes, reverse=True) and sizes[-1] == 1 and len(set(sizes)) >= 4


def test_prompts_read_together_are_read_as_alone(target: CausalModel) -> None:
    network = network_of(target, "dspark")
    assert network is not None
    # Two pieces for the longest: 96 positions at a time.
    rounds = rounds_of(target, network, 8, 192)
    alone = rounds_of(target, network, 8, 192)
    prompts = [prompt(length, seed=length).tolist() for length in (1, 5, 70, 60, 3, 180, 170, 64)]
    places = [3, 0, 7, 1, 2, 6, 5, 4]
    rounds.begin_all(places, prompts)
    for place, tokens in zip(places, prompts, strict=True):
        alone.begin(place, torch.tensor(tokens))
    assert rounds.lengths.tolist() == alone.lengths.tolist() and rounds.anchors.tolist() == alone.anchors.tolist()
    for _ in range(3):
        for one in (rounds, alone):
            one.round(shown=192, sampled=False)
        assert rounds.emitted.tolist() == alone.emitted.tolist()


def test_the_depth_follows_acceptance_and_cost() -> None:
    cheap, dear = {0: 1.0, 1: 1.1, 2: 1.2}, {0: 1.0, 1: 1.9, 2: 2.9}
    # 1 + .8 + .64 tokens in 1.2 s, against 1.8 in 1.1 s; and 1.8 tokens in 1.9 s against one in one second.
    schedule = ScheduledDepth({1: cheap, 8: dear}, [0.8])
    assert schedule.depth(1) == 2 and schedule.depth(8) == 0 and schedule.depth(5) == 0
    for _ in range(200):
        schedule.observe(2, [0, 0, 0, 0])
    assert schedule.conditional[0] < 0.05 and schedule.depth(1) == 0
    # What is not proposed is not seen: it is tried now and then, more and more seldom.
    tries = [schedule.depth(1) for _ in range(300)]
    assert set(tries) == {0, 1} and 3 <= sum(tries) <= 8
    for _ in range(400):
        schedule.observe(1, [1, 1, 1, 1])
    assert schedule.depth(1) >= 1


def test_a_schedule_by_measured_seconds_keeps_the_tokens(target: CausalModel) -> None:
    network = network_of(target, "eagle3")
    assert network is not None
    rounds = rounds_of(target, network, 4)
    lengths = range(network.block + 1)
    seconds = load_seconds(rounds, places=[1, 4], lengths=lengths, context=20, sampled=False)
    assert set(seconds) == {1, 4} and all(value > 0 for row in seconds.values() for value in row.values())
    engine = GraphedEngine(rounds, ScheduledDepth(seconds))
    engine.prepare(sampled=False, sizes=[4])
    requests = asked(8)
    handles = run(engine, requests)
    assert [h.result.tokens for h in handles] == [plainly(target, network, *one).tokens for one in requests]
    # Every round is told with the depth it had.
    for handle in handles:
        assert sum(handle.result.blocks.values()) == handle.result.passes
        assert all(0 <= a <= p for a, p in zip(handle.result.accepted, handle.result.proposed, strict=True))


def test_abandoned_requests_leave_nothing(target: CausalModel) -> None:
    engine = GraphedEngine(rounds_of(target, None, 2))
    for n in range(4):
        engine.submit(prompt(6, seed=n), Request(settings=GREEDY, max_new_tokens=20), seed=0)
    for _ in range(3):
        engine.step()
    engine.abandon()
    assert engine.idle
    requests = asked(5)
    assert [h.result.tokens for h in run(engine, requests)] == [plainly(target, None, *one).tokens for one in requests]


def test_requests_start_with_a_place_and_seconds_are_of_what_the_device_did(target: CausalModel) -> None:
    engine = GraphedEngine(rounds_of(target, None, 2))
    handles = [engine.submit(prompt(6, seed=n), Request(settings=GREEDY, max_new_tokens=3), seed=0) for n in range(3)]
    began = time.perf_counter()
    engine.step()
    assert [handle.started for handle in handles] == [True, True, False]
    assert engine.device_seconds == 0.0, "no round was looked at"
    while not engine.idle:
        engine.step()
    assert all(handle.started for handle in handles)
    assert 0.0 < engine.device_seconds < time.perf_counter() - began


def test_rounds_have_powers_of_two_of_places_and_all_of_them(target: CausalModel) -> None:
    for most, sizes in {1: [1], 2: [1, 2], 3: [1, 2, 3], 8: [1, 2, 4, 8], 12: [1, 2, 4, 8, 12]}.items():
        assert round_sizes(most) == sizes
    assert GraphedEngine(rounds_of(target, None, 3)).sizes == [1, 2, 3]


def test_tokens_are_told_as_they_come(target: CausalModel) -> None:
    engine = GraphedEngine(rounds_of(target, None, 2), FixedDepth(0))
    told: list[int] = []
    handle = engine.submit(prompt(5), Request(settings=GREEDY, max_new_tokens=6), seed=0, on_tokens=told.extend)
    while not engine.idle:
        engine.step()
    assert told == handle.result.tokens and VOCAB > max(told)


def test_what_was_prepared_is_not_captured_again(target: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(target, "eagle3")
    rounds = rounds_of(target, network, 4, 192)
    captured: list[object] = []

    def noted(work: Callable[[], None], *, compiled: bool = False) -> Callable[[], None]:
        captured.append(work)
        return work

    monkeypatch.setattr(rounds.programs, "capture", noted)
    engine = GraphedEngine(rounds, Turns([0, 2]), max_requests=3)
    engine.prepare(sampled=False, longest_prompt=130)
    before = len(captured)
    requests = [
        (prompt(length, seed=length), Request(settings=GREEDY, max_new_tokens=20))
        for length in (1, 2, 60, 66, 97, 129, 130, 130, 4, 70)
    ]
    handles = run(engine, requests)
    assert len(captured) == before > 0
    assert [h.result.tokens for h in handles] == [plainly(target, network, *one).tokens for one in requests]
    with pytest.raises(ValueError, match="use 1 to 4"):
        GraphedEngine(rounds, max_requests=5)
