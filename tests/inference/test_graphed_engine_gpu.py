"""On a GPU: captured rounds of many requests give what each gets alone, and the host waits for no more than a round."""

from collections.abc import Iterator

import pytest
import torch

from inference.batch.load import Asked
from inference.driving import closed_loop
from inference.generation import generate_batch
from inference.graphed.decode import GraphedDecoder
from inference.graphed.depths import ScheduledDepth, load_seconds
from inference.graphed.engine import GraphedEngine
from inference.graphed.responses import CapturedAnswers
from inference.graphed.rounds import Rounds
from inference.model import CausalModel
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from tests.inference.test_feature_drafts import CONFIGS, network_for
from tests.inference.test_graphed import plainly, prompt
from tests.inference.test_graphed_engine import Turns, run
from tests.inference.test_graphed_gpu import family_on_cpu, model
from tests.inference.test_graphed_responses import answer_captured

pytestmark = pytest.mark.gpu
GREEDY = SamplingSettings()
LENGTHS = (20, 1, 2, 70, 130, 9, 33, 64, 65, 5, 128)


@pytest.fixture(scope="module")
def exact() -> Iterator[CausalModel]:
    torch.backends.cuda.matmul.allow_tf32 = False
    yield model(torch.float32, "fp32")


def rounds_of(target: CausalModel, kind: str, places: int) -> Rounds:
    network = None if kind == "none" else network_for(CONFIGS[kind], family_on_cpu()).float().cuda()
    if network is not None:
        network.bind(target)
    return Rounds(target, network, block=0 if network is None else network.block, batch=places, capacity=256)


def asked(temperature: float = 0.0) -> list[tuple[torch.Tensor, Request]]:
    settings = SamplingSettings(temperature=temperature)
    return [
        (prompt(length, seed=n).cuda(), Request(settings=settings, max_new_tokens=8 + 3 * n))
        for n, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("at_once", [99, 3])
@pytest.mark.parametrize("kind", ["none", "eagle3", "dspark"])
def test_greedy_tokens_are_the_ordinary_decoders(exact: CausalModel, kind: str, at_once: int) -> None:
    rounds = rounds_of(exact, kind, 5)
    wanted = [plainly(exact, rounds.network, *one).tokens for one in asked()]
    for depths in (None, Turns(range(rounds.block + 1))):
        engine = GraphedEngine(rounds, depths)
        for _ in range(2):
            assert [handle.result.tokens for handle in run(engine, asked(), at_once=at_once)] == wanted


@pytest.mark.parametrize("kind", ["none", "eagle3"])
def test_a_closed_loop_has_the_same_tokens_and_the_devices_seconds(exact: CausalModel, kind: str) -> None:
    rounds = rounds_of(exact, kind, 4)
    requests = [
        Asked(prompt_id=str(n), domain="any", prompt=tokens, request=request, seed=n)
        for n, (tokens, request) in enumerate(asked())
    ]
    engine = GraphedEngine(rounds)
    engine.prepare(sampled=False, longest_prompt=max(LENGTHS))
    trace, answers = closed_loop(engine, requests, concurrency=4)
    assert answers == [plainly(exact, rounds.network, *one).tokens for one in asked()]
    assert 0.0 < trace.pass_seconds < trace.elapsed and trace.window <= trace.elapsed
    assert all(one.arrival == one.start < one.end for one in trace.served)


def test_a_seed_gives_the_answer_it_gives_alone(exact: CausalModel) -> None:
    alone = GraphedDecoder(rounds_of(exact, "eagle3", 1))
    handles = run(GraphedEngine(rounds_of(exact, "eagle3", 4)), asked(0.8))
    wanted = [alone.decode(tokens, request=request, seed=n).tokens for n, (tokens, request) in enumerate(asked(0.8))]
    same = sum(handle.result.tokens == tokens for handle, tokens in zip(handles, wanted, strict=True))
    # Products of other shapes round otherwise, which a draw close to a bound may show.
    assert same >= len(wanted) - 1


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nothing_but_the_emitted_tokens_is_waited_for(exact: CausalModel, temperature: float) -> None:
    rounds = rounds_of(exact, "eagle3", 4)
    lengths = range(rounds.block + 1)
    seconds = load_seconds(rounds, places=[4], lengths=lengths, context=64, sampled=temperature > 0)
    engine = GraphedEngine(rounds, ScheduledDepth(seconds))
    engine.prepare(sampled=temperature > 0, longest_prompt=max(LENGTHS))
    handles = [engine.submit(tokens, request, seed=n) for n, (tokens, request) in enumerate(asked(temperature))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        while not engine.idle:
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(h.result.tokens) == 8 + 3 * n for n, h in enumerate(handles))


def test_answers_are_those_of_a_batch(exact: CausalModel) -> None:
    prompts = [prompt(length, seed=n).tolist() for n, length in enumerate(LENGTHS)]
    free = generate_batch(exact, prompts, settings=GREEDY, max_new_tokens=40, stop_tokens=frozenset(), seed=0)
    stops = frozenset({free[2].tokens[3], free[4].tokens[9], free[6].tokens[0]})
    kept = {"settings": GREEDY, "stop_tokens": stops, "seed": 0, "keep_states": True, "keep_prompt_states": True}
    wanted = generate_batch(exact, prompts, max_new_tokens=40, taps=[0, 1], **kept)  # type: ignore[arg-type]
    given = answer_captured(exact, prompts, max_new_tokens=40, taps=[0, 1], max_requests=4, **kept)  # type: ignore[arg-type]
    assert [r.tokens for r in given] == [r.tokens for r in wanted]
    for one, other in zip(given, wanted, strict=True):
        for name, tolerance in (("states", 1e-3), ("prompt_states", 1e-3), ("features", 2e-2)):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert mine.device.type == "cpu" and not mine.is_pinned()
            torch.testing.assert_close(mine, theirs.cpu(), rtol=tolerance, atol=tolerance)


def test_many_sampled_answers_in_half_precision() -> None:
    target = model(torch.bfloat16, "bf16")
    answers = CapturedAnswers(
        target,
        longest=200,
        settings=SamplingSettings(temperature=1.0),
        max_requests=64,
        keep_states=True,
        taps=[0, 1],
    )
    answers.prepare(longest_prompt=130)
    prompts = [prompt(1 + n % 130, seed=n).tolist() for n in range(400)]
    first = answers.answer(prompts, max_new_tokens=50, stop_tokens=frozenset({0, 1}), seed=0)
    for tokens, response in zip(prompts, first, strict=True):
        assert response.states is not None and response.features is not None
        assert response.states.shape[0] == len(response.tokens) <= 50
        assert response.features.shape[0] == len(tokens) + len(response.tokens)
        assert not bool(response.features[-1].any()) and bool(response.features[:-1].any(dim=1).all())
        # The state that stands for a token lets it be drawn.
        rows = target.head(response.states.cuda()).float().softmax(-1)
        chances = rows[torch.arange(len(response.tokens)), torch.tensor(response.tokens)]
        assert bool((chances > 0).all())
