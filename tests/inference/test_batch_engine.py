"""The batch engine: whatever comes and goes beside it, a request gets the tokens it would get alone."""

import random
from collections.abc import Callable

import pytest
import torch

from inference.attention import use_grouped_attention
from inference.batch import BatchEngine, Handle, Outcome, QueueFull, SlotCache
from inference.batch import engine as module
from inference.costs import RoundCosts
from inference.decoder import decode
from inference.drafters import Drafter, Proposal
from inference.drafters.feature import FeatureDrafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.mixed import mixed_drafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.feature_drafts.dspark import Config as DSpark
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import FeatureNetwork, make_network
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
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from tests.inference.families import family_model
from tests.inference.law import tiny_model

VOCAB = 12
MEASURED = Measured(RoundCosts({1: 1.0, 2: 1.3, 3: 1.5, 4: 1.6}), (0.5, 0.5, 0.5))


def _model(seed: int) -> CausalModel:
    model = tiny_model(seed, vocab=VOCAB, spread=3.0)
    model.context_limit = 48
    use_grouped_attention(model.model)
    return model


@pytest.fixture(scope="module")
def target() -> CausalModel:
    return _model(0)


def _network(kind: str, target: CausalModel) -> FeatureNetwork:
    config = {"eagle3": Eagle3, "dspark": DSpark}[kind](block=3, taps=[0, 1], vocabulary=0)
    network = make_network(config, target, None, seed=3).double()
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(11)
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def _lookup() -> LookupDrafter:
    return LookupDrafter(LookupSettings(longest=2, shortest=1))


@pytest.fixture(scope="module")
def makers(target: CausalModel) -> dict[str, Callable[[], Drafter]]:
    """Drafters for one request each; weights are shared."""
    draft = _model(0)
    with torch.no_grad(), torch.random.fork_rng([]):
        # Near enough to be accepted often, far enough to be rejected often.
        torch.manual_seed(5)
        for parameter in draft.model.parameters():
            parameter.add_(0.25 * parameter.std() * torch.randn_like(parameter) if parameter.dim() == 2 else 0.0)
    networks = {kind: _network(kind, target) for kind in ("eagle3", "dspark")}
    return {
        "none": NoDrafter,
        "lookup": _lookup,
        "model": lambda: ModelDrafter(draft),
        "eagle3": lambda: FeatureDrafter(networks["eagle3"]),
        "dspark": lambda: FeatureDrafter(networks["dspark"]),
        "mixed": lambda: mixed_drafter(_lookup(), FeatureDrafter(networks["eagle3"])),
    }


POLICIES: dict[str, Callable[[], Lookahead]] = {
    "fixed": lambda: FixedLookahead(3),
    "siblings": lambda: FixedLookahead(3, siblings=(2, 1)),
    "confidence": lambda: ConfidenceLookahead(3, threshold=0.3),
    "entropy": lambda: EntropyLookahead(3, threshold=0.4, gamma=0.2),
    "ewma": lambda: EwmaLookahead(3, MEASURED, rate=0.3, probe_rounds=3),
    "scheduled": lambda: ScheduledLookahead(3, MEASURED, patience_rounds=2),
    "scheduled, delayed": lambda: DelayedLookahead(3, MEASURED, delay_rounds=2),
    "estimator": lambda: EstimatorLookahead(
        3, MEASURED, estimator=MarginEstimator(window=40, refit_every=10, least=10), patience_rounds=2
    ),
}


class _Asked:
    """One request: everything that decides its tokens."""

    def __init__(self, seed: int, *, temperature: float | None = None) -> None:
        draw = random.Random(seed)
        self.seed = seed
        self.prompt = torch.tensor([draw.randrange(VOCAB) for _ in range(draw.randint(1, 12))])
        settings = SamplingSettings(
            temperature=draw.choice([0.0, 0.7, 1.0]) if temperature is None else temperature,
            top_k=draw.choice([0, 0, 4]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
        )
        stops = frozenset(draw.sample(range(VOCAB), draw.choice([0, 1])))
        self.request = Request(settings=settings, max_new_tokens=draw.randint(1, 14), stop_tokens=stops)

    def alone(self, target: CausalModel, drafter: Drafter, lookahead: Lookahead) -> list[int]:
        return decode(
            target,
            drafter,
            self.prompt,
            request=self.request,
            lookahead=lookahead,
            generator=TorchSource.seeded(self.seed),
        ).tokens

    def submit(self, engine: BatchEngine, **options: object) -> Handle:
        source = TorchSource.seeded(self.seed)
        return engine.submit(self.prompt, self.request, generator=source, **options)  # type: ignore[arg-type]


def _run(engine: BatchEngine, *, most_rounds: int = 500) -> None:
    while not engine.idle:
        engine.step()
        assert engine.cache_tokens <= engine.max_cache_tokens
        most_rounds -= 1
        assert most_rounds, "the engine does not come to an end"


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["none", "lookup", "model", "eagle3", "dspark", "mixed"])
def test_a_request_gets_the_tokens_it_would_get_alone(
    target: CausalModel, makers: dict[str, Callable[[], Drafter]], kind: str, policy: str, size: int
) -> None:
    learns = POLICIES[policy]().learns
    # What a policy that learns proposes depends on its neighbours, and so do the draws of a sampled answer.
    asked = [_Asked(seed, temperature=0.0 if learns else None) for seed in range(7)]
    engine = BatchEngine(target, makers[kind], POLICIES[policy](), max_requests=size)
    handles = [one.submit(engine) for one in asked]
    _run(engine)
    for one, handle in zip(asked, handles, strict=True):
        assert handle.outcome is Outcome.DONE
        assert handle.result.tokens == one.alone(target, makers[kind](), POLICIES[policy]())


def test_drafts_are_accepted_in_the_batch(target: CausalModel, makers: dict[str, Callable[[], Drafter]]) -> None:
    """Otherwise equality above would say little."""
    engine = BatchEngine(target, makers["model"], FixedLookahead(3, siblings=(2,)), max_requests=3)
    handles = [_Asked(seed).submit(engine) for seed in range(12)]
    _run(engine)
    assert sum(sum(handle.result.accepted) for handle in handles) > 20
    assert sum(sum(map(sum, handle.result.siblings)) for handle in handles) > 2
    assert any(handle.result.tau > 2.0 for handle in handles)
    assert any(0 < sum(handle.result.accepted) < sum(handle.result.proposed) for handle in handles)


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "gpt_neox", "gpt2"])
def test_other_families_get_their_own_tokens_too(name: str) -> None:
    model = family_model(name)
    use_grouped_attention(model.model)
    asked = [_Asked(seed) for seed in range(5)]
    engine = BatchEngine(model, _lookup, FixedLookahead(3), max_requests=3)
    handles = [one.submit(engine) for one in asked]
    _run(engine)
    for one, handle in zip(asked, handles, strict=True):
        assert handle.result.tokens == one.alone(model, _lookup(), FixedLookahead(3))


# Many schedules


class _Pool:
    """Requests whose answers alone are known."""

    def __init__(self, target: CausalModel, make: Callable[[], Drafter], policy: Callable[[], Lookahead]) -> None:
        self.asked = [_Asked(seed) for seed in range(60)]
        self.alone = [one.alone(target, make(), policy()) for one in self.asked]


def _schedule(seed: int, engine: BatchEngine, pool: _Pool) -> None:
    """Random arrivals and cancellations; checks every request and that nothing is left behind."""
    draw = random.Random(seed)
    coming = [draw.randrange(len(pool.asked)) for _ in range(draw.randint(1, 7))]
    handles: list[tuple[int, Handle]] = []
    while coming or not engine.idle:
        while coming and draw.random() < 0.6:
            index = coming.pop()
            handles.append((index, pool.asked[index].submit(engine)))
        if handles and draw.random() < 0.08:
            engine.cancel(draw.choice(handles)[1])
        engine.step()
        assert engine.cache_tokens <= engine.max_cache_tokens
        assert engine.num_running <= engine.max_requests
    assert engine.num_running == 0 and engine._cache.lengths == []
    for index, handle in handles:
        expected = pool.alone[index]
        if handle.outcome is Outcome.CANCELLED:
            assert handle.result.tokens == expected[: len(handle.result.tokens)]
        else:
            assert handle.outcome is Outcome.DONE and handle.result.tokens == expected


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("model", "siblings"), ("eagle3", "scheduled"), ("dspark", "confidence"), ("mixed", "ewma"), ("lookup", "fixed")],
)
def test_no_schedule_of_a_hundred_leaks_a_slot_or_changes_an_answer(
    target: CausalModel, makers: dict[str, Callable[[], Drafter]], kind: str, policy: str
) -> None:
    pool = _Pool(target, makers[kind], POLICIES[policy])
    for size in (1, 2, 3, 5):
        # One engine serves all schedules of a size, so that what a request leaves behind would show in the next.
        bound = None if size % 2 else 60 * size
        engine = BatchEngine(target, makers[kind], POLICIES[policy](), max_requests=size, max_cache_tokens=bound)
        for seed in range(25):
            _schedule(100 * size + seed, engine, pool)


# Admission and endings


def test_running_requests_never_need_more_cache_than_there_is(target: CausalModel) -> None:
    asked = [_Asked(seed) for seed in range(12)]
    most = max(one.prompt.shape[0] + one.request.max_new_tokens for one in asked) + 3
    engine = BatchEngine(target, _lookup, FixedLookahead(3), max_requests=8, max_cache_tokens=2 * most)
    handles = [one.submit(engine) for one in asked]
    seen = set()
    while not engine.idle:
        engine.step()
        seen.add(engine.num_running)
        assert engine.cache_tokens <= 2 * most
        assert max(engine._cache.lengths, default=0) * engine.num_running <= 2 * most
    assert max(seen) >= 2, "two of the longest fit at once"
    assert all(handle.outcome is Outcome.DONE for handle in handles)


def test_requests_start_in_the_order_in_which_they_came(target: CausalModel) -> None:
    engine = BatchEngine(target, NoDrafter, FixedLookahead(0), max_requests=1)
    handles = [_Asked(seed).submit(engine) for seed in range(4)]
    ended: list[Handle] = []
    while not engine.idle:
        engine.step()
        ended += [handle for handle in handles if handle.ended and handle not in ended]
    assert ended == handles


def test_a_full_queue_says_so(target: CausalModel) -> None:
    engine = BatchEngine(target, NoDrafter, FixedLookahead(0), max_requests=1, max_waiting=2)
    for seed in range(2):
        _Asked(seed).submit(engine)
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        _Asked(2).submit(engine)
    engine.step()
    assert not _Asked(3).submit(engine).ended, "one has left the queue"


def test_a_request_that_can_never_run_is_refused_at_once(target: CausalModel) -> None:
    engine = BatchEngine(target, NoDrafter, FixedLookahead(2), max_requests=2, max_cache_tokens=16)
    prompt, source = torch.zeros(10, dtype=torch.long), TorchSource.seeded(0)
    request = Request(settings=SamplingSettings(), max_new_tokens=5)
    with pytest.raises(InputError, match="the request needs 17 cache positions, there are 16"):
        engine.submit(prompt, request, generator=source)
    with pytest.raises(InputError, match="the prompt has no tokens"):
        engine.submit(prompt[:0], request, generator=source)
    with pytest.raises(InputError, match="the prompt has 60 tokens, the context holds 48"):
        engine.submit(torch.zeros(60, dtype=torch.long), request, generator=source)
    assert engine.idle


def test_late_requests_are_given_up_wherever_they_are(target: CausalModel) -> None:
    now = [0.0]
    engine = BatchEngine(target, NoDrafter, FixedLookahead(0), max_requests=1, clock=lambda: now[0])
    long = Request(settings=SamplingSettings(), max_new_tokens=30)

    def submit(deadline: float | None) -> Handle:
        source = TorchSource.seeded(0)
        return engine.submit(torch.tensor([1, 2]), long, generator=source, deadline=deadline)

    running, waiting, patient = submit(5.0), submit(2.0), submit(None)
    engine.step()
    now[0] = 3.0
    engine.step()
    assert (running.outcome, waiting.outcome) == (Outcome.RUNNING, Outcome.LATE)
    now[0] = 6.0
    engine.step()
    assert running.outcome is Outcome.LATE and len(running.result.tokens) == 2
    _run(engine)
    assert patient.outcome is Outcome.DONE and len(patient.result.tokens) == 30


def test_cancelling_is_idempotent_and_leaves_what_was_emitted(target: CausalModel) -> None:
    pieces: list[list[int]] = []
    engine = BatchEngine(target, _lookup, FixedLookahead(3), max_requests=2)
    request = Request(settings=SamplingSettings(), max_new_tokens=30)
    handle = engine.submit(torch.tensor([1, 2]), request, generator=TorchSource.seeded(0), on_tokens=pieces.append)
    engine.step()
    engine.cancel(handle)
    engine.cancel(handle)
    assert handle.outcome is Outcome.CANCELLED and engine.idle
    assert handle.result.tokens == [token for piece in pieces for token in piece] and handle.result.tokens
    done = engine.submit(torch.tensor([1, 2]), request, generator=TorchSource.seeded(0))
    _run(engine)
    engine.cancel(done)
    assert done.outcome is Outcome.DONE and done.result.tokens[: len(handle.result.tokens)] == handle.result.tokens


def test_a_target_that_cannot_share_a_pass_is_refused() -> None:
    with pytest.raises(InputError, match="cannot decode several requests in one pass"):
        BatchEngine(family_model("bloom"), NoDrafter, FixedLookahead(0), max_requests=2)


# Mutants


def _answers(target: CausalModel, make: Callable[[], Drafter], lookahead: Lookahead) -> bool:
    """Whether every answer in a batch is that of its request alone."""
    asked = [_Asked(seed) for seed in range(12)]
    engine = BatchEngine(target, make, lookahead, max_requests=4)
    handles = [one.submit(engine) for one in asked]
    _run(engine)
    return [h.result.tokens for h in handles] == [one.alone(target, make(), lookahead) for one in asked]


SIBLINGS = FixedLookahead(3, siblings=(2, 1))


def test_mutant_cache_not_rolled_back_fails(
    target: CausalModel, makers: dict[str, Callable[[], Drafter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _answers(target, makers["model"], SIBLINGS)
    monkeypatch.setattr(SlotCache, "rollback", lambda self, lengths: None)
    with pytest.raises((AssertionError, ValueError)):
        assert _answers(target, makers["model"], SIBLINGS)


def test_mutant_states_of_a_sibling_left_behind_fail(
    target: CausalModel, makers: dict[str, Callable[[], Drafter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlotCache, "move", lambda *_: None)
    assert not _answers(target, makers["model"], SIBLINGS)


def test_mutant_a_slot_whose_states_do_not_move_with_its_request_fails(
    target: CausalModel, makers: dict[str, Callable[[], Drafter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.batch.cache.SlotLayer.copy_slot", lambda *_, **__: None)
    assert not _answers(target, makers["model"], SIBLINGS)


def test_mutant_rows_of_a_neighbour_fail(
    target: CausalModel, makers: dict[str, Callable[[], Drafter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module.ragged_logits

    def rolled(model: CausalModel, tokens: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        return whole(model, tokens, *args, **options).roll(1, 0)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "ragged_logits", rolled)
    assert not _answers(target, makers["model"], SIBLINGS)


def test_mutant_one_source_of_randomness_for_all_fails(
    target: CausalModel, makers: dict[str, Callable[[], Drafter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, propose = TorchSource.seeded(0), ModelDrafter.propose

    def drawn(self: ModelDrafter, context: torch.Tensor, **options: object) -> Proposal:
        return propose(self, context, **{**options, "generator": shared})  # type: ignore[arg-type]

    monkeypatch.setattr(ModelDrafter, "propose", drawn)
    assert not _answers(target, makers["model"], SIBLINGS)
