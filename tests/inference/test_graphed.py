"""Rounds of fixed shapes give the tokens, the passes and the law of the ordinary decoder."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from inference.decoder import decode
from inference.drafters.feature import FeatureDrafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.feature_networks import FeatureNetwork, Step
from inference.graphed.decode import GraphedDecoder
from inference.graphed.rounds import Rounds
from inference.lookahead import RecordingLookahead, Signals
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from tests.inference.families import VOCAB, lean_model
from tests.inference.test_feature_drafts import CONFIGS, REDUCED, network_for

KINDS = ("dflash", "dspark", "dspark-rnn", "eagle3")


@pytest.fixture(scope="module")
def target() -> CausalModel:
    return lean_model("llama", max_position_embeddings=256)


def prompt(length: int, *, seed: int = 3) -> torch.Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def plainly(target: CausalModel, network: FeatureNetwork | None, tokens: torch.Tensor, request: Request) -> Decoded:
    """The ordinary decoder's answer with blocks of the network's length."""
    return decode(
        target,
        NoDrafter() if network is None else FeatureDrafter(network),
        tokens,
        request=request,
        lookahead=FixedLookahead(0 if network is None else network.block),
        generator=TorchSource.seeded(0),
    )


@pytest.mark.parametrize("length", [1, 2, 17, 70])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_greedy_tokens_and_passes_are_the_ordinary_decoders(
    target: CausalModel, kind: str, reduced: bool, length: int
) -> None:
    network = None if kind == "none" else network_for(CONFIGS[kind], target, REDUCED if reduced else None)
    rounds = Rounds(target, network, block=0 if network is None else network.block, capacity=256)
    request = Request(settings=SamplingSettings(), max_new_tokens=24)
    decoder = GraphedDecoder(rounds)
    # Twice: a place must not remember the request before.
    for seed in (3, 4):
        tokens = prompt(length, seed=seed)
        wanted = plainly(target, network, tokens, request)
        given = decoder.decode(tokens, request=request, seed=0)
        assert given.tokens == wanted.tokens
        if length > 1:
            # The ordinary decoder proposes no more than the budget leaves room for.
            assert abs(given.passes - wanted.passes) <= 1


def test_an_answer_ends_at_a_stop_token_and_at_the_capacity(target: CausalModel) -> None:
    network = network_for(CONFIGS["eagle3"], target)
    decoder = GraphedDecoder(Rounds(target, network, block=network.block, capacity=128))
    whole = decoder.decode(prompt(9), request=Request(settings=SamplingSettings(), max_new_tokens=30), seed=0)
    stop = whole.tokens[7]
    ended = decoder.decode(
        prompt(9),
        request=Request(settings=SamplingSettings(), max_new_tokens=30, stop_tokens=frozenset({stop})),
        seed=0,
    )
    assert ended.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    full = decoder.decode(prompt(60), request=Request(settings=SamplingSettings(), max_new_tokens=500), seed=0)
    assert len(full.tokens) == min(target.context_limit, 128 - network.block) - 60
    with pytest.raises(InputError, match="context holds"):
        decoder.decode(prompt(127), request=Request(settings=SamplingSettings(), max_new_tokens=5), seed=0)


def test_requests_of_a_batch_do_not_touch_each_other(target: CausalModel) -> None:
    network = network_for(CONFIGS["eagle3"], target)
    rounds = Rounds(target, network, block=network.block, batch=3, capacity=256)
    prompts = [prompt(5, seed=1), prompt(40, seed=2), prompt(23, seed=5)]
    for row, tokens in enumerate(prompts):
        rounds.begin(row, tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(8):
        rounds.round(shown=256, sampled=False)
        for row, numbers in enumerate(rounds.emitted.tolist()):
            answers[row] += numbers[: numbers[-1]]
    for tokens, answer in zip(prompts, answers, strict=True):
        wanted = plainly(target, network, tokens, Request(settings=SamplingSettings(), max_new_tokens=len(answer)))
        assert answer == wanted.tokens


def test_preparing_leaves_no_trace(target: CausalModel) -> None:
    network = network_for(CONFIGS["eagle3"], target)
    decoder = GraphedDecoder(Rounds(target, network, block=network.block, capacity=256))
    request = Request(settings=SamplingSettings(), max_new_tokens=16)
    wanted = decoder.decode(prompt(20), request=request, seed=0).tokens
    for sampled in (False, True):
        decoder.rounds.prepare(sampled=sampled)
    assert decoder.decode(prompt(20), request=request, seed=0).tokens == wanted


def uniform(rounds: Rounds, generator: torch.Generator) -> None:
    """What a sampled round of a chain draws by."""
    rounds.uniforms.copy_(torch.rand(rounds.uniforms.shape, dtype=torch.float64, generator=generator))


def first_tokens(
    rounds: Rounds,
    places: int,
    temperature: float,
    draws: int,
    *,
    redraw: Callable[[Rounds, torch.Generator], None] = uniform,
) -> Counter[tuple[int, ...]]:
    """How often each answer of two tokens comes out, over many places of one batch."""
    rounds.temperatures.fill_(temperature)
    counts: Counter[tuple[int, ...]] = Counter()
    generator = torch.Generator().manual_seed(9)
    rounds.begin_all(range(places), [prompt(4, seed=8).tolist()] * places)
    assert rounds.context is not None
    state = [(t, t.clone()) for t in (rounds.anchors, rounds.lengths, rounds.context.held, rounds.context.last)]
    for _ in range(draws):
        for tensor, before in state:
            tensor.copy_(before)
        answers: list[list[int]] = [[] for _ in range(places)]
        while min(len(answer) for answer in answers) < 2:
            redraw(rounds, generator)
            rounds.round(shown=64, sampled=True)
            for row, numbers in enumerate(rounds.emitted.tolist()):
                answers[row] += numbers[: numbers[-1]]
        counts.update(tuple(answer[:2]) for answer in answers)
    return counts


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_sampled_answers_follow_the_targets_law(target: CausalModel, kind: str, reduced: bool) -> None:
    network = network_for(CONFIGS[kind], target, REDUCED if reduced else None)
    places, draws, temperature = 400, 10, 0.4
    rounds = Rounds(target, network, block=network.block, batch=places, capacity=64)
    counts = first_tokens(rounds, places, temperature, draws)
    law = target_law(target, temperature)
    assert misfit(counts, law) < 4.0
    # A mutant that keeps what should be rejected is far from the law.
    rounds_accept = rounds._accept_sampled

    def keeps_more(tokens: torch.Tensor, rows: list[torch.Tensor], logits: torch.Tensor):  # type: ignore[no-untyped-def]
        emitted, stood = rounds_accept(tokens, rows, logits)
        kept = torch.maximum(stood, torch.ones_like(stood))
        return torch.where(torch.arange(emitted.shape[1]) < 1, tokens[:, :1], emitted), kept

    rounds._accept_sampled = keeps_more  # type: ignore[method-assign]
    assert misfit(first_tokens(rounds, places, temperature, draws), law) > 8.0


def target_law(target: CausalModel, temperature: float) -> dict[tuple[int, ...], float]:
    """Chances of all answers of two tokens."""
    start = prompt(4, seed=8)
    first = torch.softmax(target.logits(start, target.new_cache(), num_rows=1)[0].double() / temperature, -1)
    law = {}
    for token in range(VOCAB):
        cache = target.new_cache()
        row = target.logits(torch.cat([start, torch.tensor([token])]), cache, num_rows=1)[0].double()
        for following, chance in enumerate(torch.softmax(row / temperature, -1).tolist()):
            law[token, following] = float(first[token]) * chance
    return law


def misfit(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic over answers expected at least five times, the rest as one, in its own deviations."""
    total = counts.total()
    common = [answer for answer, chance in law.items() if chance * total >= 5]
    seen = [counts[answer] for answer in common]
    expected = [law[answer] * total for answer in common]
    seen.append(total - sum(seen))
    expected.append(max(1e-9, total - sum(expected)))
    statistic = sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True))
    freedom = len(seen) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


# Recorded


def knows_pairs(network: FeatureNetwork, answer: list[int], patch: pytest.MonkeyPatch) -> None:
    """Let a draft lean towards what follows a token in an answer, so that blocks stand in part and as a whole."""
    ids = list(range(VOCAB)) if network.vocabulary is None else network.vocabulary.tolist()
    lean = torch.zeros(VOCAB, len(ids))
    for before, after in itertools.pairwise(answer):
        if after in ids:
            lean[before, ids.index(after)] = 8.0
    step = network.step

    def leaning(block: Any, slot: int, previous: torch.Tensor, *, confidence: bool) -> Step:
        found = step(block, slot, previous, confidence=confidence)
        return Step(found.logits + lean[previous], found.confidence)

    patch.setattr(network, "step", leaning)


def near(given: Sequence[Signals], wanted: Sequence[Signals], *, within: float = 1e-5) -> bool:
    """Whether confidences and margins are the same, position by position."""
    return len(given) == len(wanted) and all(
        (a.confidence, a.margin) == pytest.approx((b.confidence, b.margin), abs=within)
        for a, b in zip(given, wanted, strict=True)
    )


@pytest.mark.parametrize(("block", "reduced"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_recorded_rounds_are_the_ordinary_decoders(
    target: CausalModel, kind: str, reduced: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(settings=SamplingSettings(), max_new_tokens=40)
    answers = [plainly(target, None, prompt(n, seed=n), request).tokens for n in (2, 17, 70)]
    common = [token for token, _ in Counter(itertools.chain(*answers)).most_common(24)]
    network = network_for(CONFIGS[kind], target, torch.tensor(sorted(common)) if reduced else None)
    knows_pairs(network, [*itertools.chain(*answers)], monkeypatch)
    decoder = GraphedDecoder(Rounds(target, network, block=network.block, capacity=256)).of_block(block)
    seen: list[tuple[tuple[Signals, ...], int]] = []
    for length, answer in zip((2, 17, 70), answers, strict=True):
        # Answers end at a stop token, and with blocks of which all stood and only a part had room.
        stopped = dataclasses.replace(request, stop_tokens=frozenset({answer[20]}))
        short = [dataclasses.replace(request, max_new_tokens=tokens) for tokens in range(5, 11)]
        for asked in (request, stopped, *short):
            given, wanted = RecordingLookahead(block), RecordingLookahead(block)
            tokens = prompt(length, seed=length)
            decode(
                target,
                FeatureDrafter(network),
                tokens,
                request=asked,
                lookahead=wanted,
                generator=TorchSource.seeded(0),
            )
            found = decoder.decode(tokens, request=asked, seed=0, recording=given)
            assert found.tokens == decoder.decode(tokens, request=asked, seed=0).tokens
            assert [(len(s), stood) for s, stood in given.rounds] == [(len(s), stood) for s, stood in wanted.rounds]
            assert all(near(a, b) for (a, _), (b, _) in zip(given.rounds, wanted.rounds, strict=True))
            seen += given.rounds
    # What was compared tells positions, rounds and verdicts apart.
    assert {stood for _, stood in seen} == set(range(block + 1))
    assert not any(near(signals[:-1], signals[1:]) for signals, _ in seen if len(signals) > 1)
    assert sum(near(a, b) for (a, _), (b, _) in itertools.pairwise(seen)) < len(seen) / 4


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_sampled_rounds_record_the_rows_that_were_sampled(target: CausalModel, kind: str) -> None:
    """The two draw other numbers, but a row is what the tokens before it make it: few are likely, and all are seen."""
    network = network_for(CONFIGS[kind], target)
    decoder = GraphedDecoder(Rounds(target, network, block=network.block, capacity=256))
    request = Request(settings=SamplingSettings(temperature=0.2), max_new_tokens=4)
    given, wanted = [], []
    for seed in range(60):
        recordings = [RecordingLookahead(network.block) for _ in range(2)]
        answer = decoder.decode(prompt(20), request=request, seed=seed, recording=recordings[0]).tokens
        assert answer == decoder.decode(prompt(20), request=request, seed=seed).tokens, "recording draws nothing"
        source = TorchSource.seeded(seed)
        drafter = FeatureDrafter(network)
        decode(target, drafter, prompt(20), request=request, lookahead=recordings[1], generator=source)
        first, second = (recording.rounds[0][0] for recording in recordings)
        given.append(first)
        wanted.append(second)
    for depth, share in ((1, 1.0), (2, 0.9), (3, 0.6)):
        seen = [any(near(one[:depth], other[:depth]) for other in wanted) for one in given]
        assert sum(seen) >= share * len(seen), depth


def test_what_is_not_recorded_is_not_computed(target: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_for(CONFIGS["dspark"], target)
    decoder = GraphedDecoder(Rounds(target, network, block=network.block, capacity=256))
    wanted: list[bool] = []
    step = network.step

    def watched(block: Any, slot: int, previous: torch.Tensor, *, confidence: bool) -> Step:
        wanted.append(confidence)
        return step(block, slot, previous, confidence=confidence)

    monkeypatch.setattr(network, "step", watched)
    request = Request(settings=SamplingSettings(), max_new_tokens=12)
    decoder.decode(prompt(20), request=request, seed=0)
    assert wanted and not any(wanted) and not decoder.rounds.signals.any()
    names = decoder.rounds.programs.names
    wanted.clear()
    decoder.decode(prompt(20), request=request, seed=0, recording=RecordingLookahead(network.block))
    assert wanted and all(wanted) and decoder.rounds.signals.all()
    assert {name[0] for name in decoder.rounds.programs.names - names} == {"recorded round"}
