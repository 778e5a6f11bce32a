"""Requests that share a pass under one scheduler: what it admits, and that every output keeps the target's law."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

from inference.attention import use_grouped_attention
from inference.batch import BatchEngine, Handle, Outcome
from inference.batch.costs import LoadCosts, measure_load_costs
from inference.batch.drafting import DraftGroup, draft_group
from inference.batch.sharing import Noting, PassSharing
from inference.costs import RoundCosts
from inference.decoder import decode
from inference.drafters import Drafter
from inference.drafters.feature import FeatureDrafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.mixed import mixed_drafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_drafts.dspark import Config as DSpark
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import make_network
from inference.lookahead import Measured, Signals, Visible
from inference.lookahead.fixed import FixedLookahead
from inference.lookahead.scheduled import DelayedLookahead, ScheduledLookahead
from inference.lookup_settings import LookupSettings
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from tests.inference.law import Law, MemoModel, Path, distance, target_law, tiny_model

SOLO = Measured(RoundCosts({1: 1.0, 2: 1.2, 3: 1.3}), (0.6, 0.5))
# A token more costs a tenth of a request's own pass, and drafting next to nothing.
CHEAP = LoadCosts(
    passes={1: {1: 1.0, 3: 1.2, 5: 1.4}, 4: {4: 2.0, 12: 2.8, 20: 3.6}},
    drafts={1: (0.01, 0.01), 4: (0.01, 0.02)},
    spread={1: {}, 4: {}},
)
DEAR = LoadCosts(passes={1: {1: 1.0, 2: 2.0}, 4: {4: 4.0, 8: 8.0}}, drafts={1: (0.5, 0.5), 4: (2.0, 2.0)}, spread={})
SCHEDULERS: dict[str, Callable[[], ScheduledLookahead | DelayedLookahead]] = {
    "early stop": lambda: ScheduledLookahead(2, SOLO, patience_rounds=2),
    "whole": lambda: DelayedLookahead(2, SOLO, delay_rounds=2),
}


def _noted(*confidences: float) -> Noting:
    noting = Noting(len(confidences), reads=frozenset({"confidence"}))
    for position in range(1, len(confidences) + 1):
        signals = tuple(Signals(confidence=c) for c in confidences[:position])
        assert noting.keeps(Visible(position, signals))
    return noting


# Costs


def test_costs_between_what_was_measured_are_linear() -> None:
    assert CHEAP.pass_seconds(1, 2) == pytest.approx(1.1)
    assert CHEAP.pass_seconds(4, 8) == pytest.approx(2.4)
    # Two requests of two tokens: a third of the way from 1.1 to 2.4.
    assert CHEAP.pass_seconds(2, 4) == pytest.approx(1.1 + (2.4 - 1.1) / 3)
    # Eight requests, one token each: as far beyond four as the line through one and four goes.
    assert CHEAP.pass_seconds(8, 8) == pytest.approx(2.0 + (2.0 - 1.0) / 3 * 4)
    assert CHEAP.draft_seconds(4, 0) == 0.0
    assert CHEAP.draft_seconds(4, 2) == pytest.approx(0.05)


def test_costs_come_back_from_their_file_form() -> None:
    assert LoadCosts.from_json(CHEAP.to_json(), where="here") == CHEAP


@pytest.mark.parametrize("kind", ["none", "model", "eagle3", "mixed"])
def test_costs_are_measured_for_every_kind_of_draft(
    target: CausalModel, makers: dict[str, Callable[[], Drafter]], kind: str
) -> None:
    def group(count: int) -> DraftGroup:
        return draft_group(makers[kind], max_requests=count, max_tokens=target.context_limit)

    costs = measure_load_costs(target, group, requests=[1, 3], longest=2)
    assert {requests: list(row) for requests, row in costs.passes.items()} == {1: [1, 2, 3, 5], 3: [3, 6, 9, 15]}
    for row in costs.passes.values():
        assert list(row.values()) == sorted(row.values()) and min(row.values()) > 0.0
    assert all(block >= 0.0 and token >= 0.0 for block, token in costs.drafts.values())
    header, *rows = costs.table()
    assert header == ["requests", "1", "2", "3", "5", "drafting 1", "one more"] and [row[0] for row in rows] == [
        "1",
        "3",
    ]


@pytest.mark.parametrize("data", [{}, {"passes": {"1": {"1": "x"}}, "drafts": {}, "spread": {}}, {"passes": 3}])
def test_damaged_costs_are_refused(data: object) -> None:
    with pytest.raises(InputError, match=r"the costs under load are off: .*: measure them again"):
        LoadCosts.from_json(data, where="load_costs.json")


# Decisions


def test_positions_of_all_requests_compete_for_the_pass() -> None:
    sharing = PassSharing(ScheduledLookahead(2, SOLO, patience_rounds=0), CHEAP)
    # Two requests: 2 tokens over 4/3; a token adds about 0.1: chances above some 0.15 pay.
    assert sharing.admit([_noted(0.9, 0.9), _noted(0.05, 0.9)], [2, 2]) == [2, 0]
    assert sharing.admit([_noted(0.01, 0.9), _noted(0.5, 0.5)], [2, 2]) == [0, 2]
    assert sharing.admit([_noted(0.9, 0.9), _noted()], [1, 0]) == [1, 0], "what was not drafted cannot be admitted"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_nothing_is_drafted_where_it_does_not_pay_and_it_is_tried_again(name: str) -> None:
    sharing = PassSharing(SCHEDULERS[name](), DEAR)
    depths = [sharing.depth(4) for _ in range(60)]
    assert set(depths) == {0, 1} and 2 <= sum(depths) <= 5
    assert PassSharing(SCHEDULERS[name](), CHEAP).depth(4) == 2


def test_depth_follows_what_survived() -> None:
    sharing = PassSharing(ScheduledLookahead(2, SOLO, patience_rounds=0), CHEAP)
    for _ in range(30):
        sharing.admit([_noted(0.02, 0.02)] * 4, [2] * 4)
    assert [sharing.depth(4) for _ in range(5)] == [0] * 5
    for _ in range(30):
        sharing.admit([_noted(0.9, 0.02)] * 4, [2] * 4)
    assert sharing.depth(3) == 1, "the second token of a block hardly ever stands"


def test_the_bound_knows_rounds_that_are_two_old_at_least() -> None:
    sharing = PassSharing(DelayedLookahead(2, SOLO, delay_rounds=2), CHEAP)
    for _ in range(2):
        sharing.admit([_noted(0.9, 0.9)] * 2, [2, 2])
    before = sharing._best(2)
    # A single round of other chances is the latest one, which does not count yet.
    sharing.admit([_noted(0.5, 0.9)] * 2, [2, 2])
    assert sharing._best(2) == before == (2, pytest.approx(0.81))
    sharing.admit([_noted(0.5, 0.9)] * 2, [2, 2])
    assert sharing._best(2) == (2, pytest.approx(0.45))


# Laws


def _model() -> CausalModel:
    model = tiny_model(0)
    use_grouped_attention(model.model)
    return model


@pytest.fixture(scope="module")
def target() -> CausalModel:
    return _model()


def _feature(config: FeatureDraftConfig, target: CausalModel) -> Callable[[], Drafter]:
    network = make_network(config, target, None, seed=3).double().eval()
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(11)
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return lambda: FeatureDrafter(network)


@pytest.fixture(scope="module")
def makers(target: CausalModel) -> dict[str, Callable[[], Drafter]]:
    small = tiny_model(7, layers=1)
    eagle3 = _feature(Eagle3(block=2, taps=[0, 1], vocabulary=0), target)
    return {
        "none": NoDrafter,
        "eagle3": eagle3,
        "dspark": _feature(DSpark(block=2, taps=[0, 1], vocabulary=0, markov_rank=4), target),
        "model": lambda: ModelDrafter(small),
        "mixed": lambda: mixed_drafter(LookupDrafter(LookupSettings(longest=2, shortest=1)), eagle3()),
    }


def _run(engine: BatchEngine) -> None:
    rounds = 0
    while not engine.idle:
        engine.step()
        rounds += 1
        assert rounds < 500, "the engine does not come to an end"


PROMPTS = (torch.tensor([0, 1, 0, 1]), torch.tensor([2, 1, 2]))


def _joint_law(
    target: CausalModel,
    make: Callable[[], Drafter],
    scheduler: Callable[[], ScheduledLookahead | DelayedLookahead],
    lengths: tuple[int, int],
) -> Law:
    """Law of the outputs of two requests in one engine, by walking every path through both their decisions."""
    law: Law = {}
    waiting: list[tuple[int, ...]] = [()]
    settings = SamplingSettings(temperature=1.0)
    requests = [Request(settings=settings, max_new_tokens=length) for length in lengths]
    while waiting:
        path = Path(waiting.pop())
        engine = BatchEngine(target, make, scheduler(), max_requests=2, costs=CHEAP)
        handles = [
            engine.submit(prompt, request, generator=path) for prompt, request in zip(PROMPTS, requests, strict=True)
        ]
        _run(engine)
        output = tuple(token for handle in handles for token in handle.result.tokens)
        law[output] = law.get(output, 0.0) + path.probability
        waiting += path.others
    return law


def _independent(target: CausalModel, lengths: tuple[int, int]) -> Law:
    settings, memo = SamplingSettings(temperature=1.0), MemoModel(target)
    one, other = (
        target_law(memo, settings, length=length, prompt=prompt)
        for prompt, length in zip(PROMPTS, lengths, strict=True)
    )
    return {a + b: p * q for (a, p), (b, q) in itertools.product(one.items(), other.items())}


@pytest.mark.parametrize(
    ("kind", "name", "lengths"),
    [("eagle3", "early stop", (3, 2)), ("eagle3", "whole", (3, 1)), ("dspark", "early stop", (2, 2))],
)
def test_two_requests_that_share_a_pass_keep_the_targets_law_jointly(
    target: CausalModel, makers: dict[str, Callable[[], Drafter]], kind: str, name: str, lengths: tuple[int, int]
) -> None:
    law = _joint_law(target, makers[kind], SCHEDULERS[name], lengths)
    assert distance(law, _independent(target, lengths)) < 1e-12


def test_mutant_a_search_by_this_rounds_own_confidences_misses_the_law(
    target: CausalModel, makers: dict[str, Callable[[], Drafter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are kept whole where their second position is likely, so whether the first is verified knows its token."""

    def searched(self: PassSharing, noted: Sequence[Noting], lengths: Sequence[int]) -> list[int]:
        rows = [[s.confidence for s in n.signals[:length]] for n, length in zip(noted, lengths, strict=True)]
        return [len(row) if row and row[-1] > 0.55 else 0 for row in rows]

    monkeypatch.setattr(PassSharing, "admit", searched)
    law = _joint_law(target, makers["eagle3"], SCHEDULERS["early stop"], (3, 1))
    assert distance(law, _independent(target, (3, 1))) > 1e-3


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["none", "eagle3", "dspark", "mixed"])
def test_greedy_requests_get_the_tokens_they_would_get_alone(
    target: CausalModel, makers: dict[str, Callable[[], Drafter]], kind: str, name: str, size: int
) -> None:
    request = Request(settings=SamplingSettings(temperature=0.0), max_new_tokens=12)
    prompts = [torch.arange(seed, seed + 2 + seed % 4) % 3 for seed in range(9)]
    engine = BatchEngine(target, makers[kind], SCHEDULERS[name](), max_requests=size, costs=CHEAP)
    handles = [engine.submit(prompt, request, generator=TorchSource.seeded(0)) for prompt in prompts]
    _run(engine)
    for prompt, handle in zip(prompts, handles, strict=True):
        alone = decode(
            target,
            NoDrafter(),
            prompt,
            request=request,
            lookahead=FixedLookahead(0),
            generator=TorchSource.seeded(0),
        )
        assert handle.outcome is Outcome.DONE and handle.result.tokens == alone.tokens
    if kind != "none":
        assert sum(sum(handle.result.proposed) for handle in handles) > 5, "something is proposed"


def test_no_schedule_leaks_a_slot_of_the_draft(target: CausalModel, makers: dict[str, Callable[[], Drafter]]) -> None:
    draw = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=draw))

    engine = BatchEngine(target, makers["eagle3"], SCHEDULERS["early stop"](), max_requests=3, costs=CHEAP)
    for _ in range(40):
        handles: list[Handle] = []
        while len(handles) < 5 or not engine.idle:
            if len(handles) < 5:
                request = Request(settings=SamplingSettings(temperature=0.7), max_new_tokens=number(1, 9))
                prompt = torch.randint(3, (number(1, 7),), generator=draw)
                handles.append(engine.submit(prompt, request, generator=TorchSource.seeded(len(handles))))
            if number(0, 12) == 0:
                engine.cancel(handles[number(0, len(handles))])
            engine.step()
        assert engine._cache.lengths == [] and engine._drafts._contexts.held == []  # type: ignore[attr-defined]
        assert all(handle.ended for handle in handles)
