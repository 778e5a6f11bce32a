"""Rounds of fixed shapes give the tokens, the passes and the law of the ordinary decoder."""

from collections import Counter

import pytest
import torch

from inference.attention import use_grouped_attention
from inference.decoder import decode
from inference.drafters.feature import FeatureDrafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.feature_networks import FeatureNetwork
from inference.graphed.decode import GraphedDecoder
from inference.graphed.rounds import Rounds
from inference.lean import use_lean_layers
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from tests.inference.families import VOCAB, family_model
from tests.inference.test_feature_drafts import CONFIGS, REDUCED, network_for

KINDS = ("dflash", "dspark", "dspark-rnn", "eagle3")


@pytest.fixture(scope="module")
def target() -> CausalModel:
    model = family_model("llama", max_position_embeddings=256)
    use_grouped_attention(model.model)
    use_lean_layers(model.model)
    return model


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


def first_tokens(rounds: Rounds, places: int, temperature: float, draws: int) -> Counter[tuple[int, ...]]:
    """How often each answer of two tokens comes out, over many places of one batch."""
    rounds.temperatures.fill_(temperature)
    counts: Counter[tuple[int, ...]] = Counter()
    generator = torch.Generator().manual_seed(9)
    for row in range(places):
        rounds.begin(row, prompt(4, seed=8))
    assert rounds.context is not None
    state = [(t, t.clone()) for t in (rounds.anchors, rounds.lengths, rounds.context.held, rounds.context.last)]
    for _ in range(draws):
        for tensor, before in state:
            tensor.copy_(before)
        answers: list[list[int]] = [[] for _ in range(places)]
        while min(len(answer) for answer in answers) < 2:
            rounds.uniforms.copy_(torch.rand(rounds.uniforms.shape, dtype=torch.float64, generator=generator))
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
