"""The pre-score against decoding itself: at temperature 0 the very rounds of a request, above it their exact mean given
what the request wrote; and mutants that must not agree."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from inference.attention import use_grouped_attention
from inference.decoder import decode
from inference.drafters import Drafter, Proposal
from inference.drafters import feature as feature_module
from inference.drafters import mixed as mixed_module
from inference.drafters.feature import FeatureDrafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.mixed import mixed_drafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_drafts.dflash import Config as DFlash
from inference.feature_drafts.dspark import Config as DSpark
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_drafts.medusa import Config as Medusa
from inference.feature_networks import make_network
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.model import CausalModel
from inference.prescore import rows as rows_module
from inference.prescore.rehearsal import Expected, FixedResponse, Rehearses, Table, table_of_rows
from inference.prescore.responses import fixed_response, fixed_responses
from inference.prescore.rows import judged
from inference.randomness import TorchSource
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt
from tests.inference.law import MemoModel, Path, tiny_model

VOCAB, SEED = 6, 7
BLOCK = 4
PROMPT = torch.tensor([0, 1, 4, 1, 0, 1])
GREEDY = SamplingSettings()
NONE: frozenset[int] = frozenset()
SETTINGS = {
    "T=0.5": SamplingSettings(temperature=0.5),
    "T=1": SamplingSettings(temperature=1.0),
    "T=1 top-k": SamplingSettings(temperature=1.0, top_k=3),
    "T=1 top-p": SamplingSettings(temperature=1.0, top_p=0.8),
    "T=1 penalty": SamplingSettings(temperature=1.0, repetition_penalty=1.3),
}
CONFIGS: dict[str, FeatureDraftConfig] = {
    "dflash": DFlash(block=BLOCK, taps=[0, 1], vocabulary=0),
    "dspark": DSpark(block=BLOCK, taps=[1, 0], vocabulary=0, markov_rank=4),
    "dspark rnn": DSpark(block=BLOCK, taps=[1], vocabulary=0, markov_rank=4, markov_head="rnn"),
    "eagle3": Eagle3(block=BLOCK, taps=[0, 1], vocabulary=0),
    "medusa": Medusa(block=BLOCK, taps=[1], vocabulary=0),
}
KINDS = ("none", "lookup", "pretrained", "student", *CONFIGS, "reduced", "mixed", "mixed short", "mixed eagle3")


@functools.cache
def target_model() -> CausalModel:
    """Takes siblings, keeps features, and is in fp64."""
    # Of the first thirty seeds, the one with the most varied answer.
    model = tiny_model(SEED, vocab=VOCAB)
    use_grouped_attention(model.model)
    return model


def _feature(kind: str, *, vocabulary: torch.Tensor | None = None) -> FeatureDrafter:
    """A network that starts from the target's layers, moved a little: some of what it proposes stands."""
    return FeatureDrafter(_moved(make_network(CONFIGS[kind], target_model(), vocabulary, seed=3).double(), by=0.2))


def _moved(network: Any, *, by: float) -> Any:
    """The same with noise on what is trained."""
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(11)
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(by * torch.randn_like(parameter))
    return network.eval()


@functools.cache
def drafter_of(kind: str) -> Drafter:
    """A drafter of every kind, with proposals that are at times right and at times wrong."""
    lookup = LookupDrafter(LookupSettings(longest=2, shortest=1))
    if kind == "none":
        return NoDrafter()
    if kind == "lookup":
        return lookup
    if kind == "pretrained":
        return ModelDrafter(tiny_model(1, vocab=VOCAB, layers=1))
    if kind == "student":
        return ModelDrafter(CausalModel(_moved(tiny_model(SEED, vocab=VOCAB).model, by=0.3)))
    if kind == "reduced":
        return _feature("eagle3", vocabulary=torch.tensor([0, 2, 3, 5]))
    if kind.startswith("mixed"):
        inner = _feature("eagle3") if kind == "mixed eagle3" else drafter_of("student")
        return mixed_drafter(lookup, inner, draft_tokens=1 if kind == "mixed short" else 0)
    return _feature(kind)


def respond(
    settings: SamplingSettings = GREEDY,
    *,
    prompt: torch.Tensor = PROMPT,
    tokens: int = 40,
    stops: frozenset[int] = NONE,
    taps: Sequence[int] = (0, 1),
) -> FixedResponse:
    """One response of the target."""
    [response] = fixed_responses(
        target_model(),
        [ScorePrompt("p", "chat", prompt)],
        settings=settings,
        max_new_tokens=tokens,
        stop_tokens=stops,
        seed=0,
        taps=taps,
    )
    return response


def rehearsed(
    drafter: Drafter, response: FixedResponse, tokens: int, *, siblings: Sequence[int] = (), longest: int = 6
) -> Expected:
    """What the pre-score expects."""
    assert isinstance(drafter, Rehearses)
    rehearsal = drafter.rehearse(response, longest=longest)
    assert rehearsal is not None
    return rehearsal.expected(tokens, siblings=siblings)


def decoded(
    drafter: Drafter,
    *,
    prompt: torch.Tensor = PROMPT,
    tokens: int = 40,
    stops: frozenset[int] = NONE,
    block: int,
    siblings: Sequence[int] = (),
) -> Decoded:
    """What greedy decoding does."""
    return decode(
        target_model(),
        drafter,
        prompt,
        request=Request(settings=GREEDY, max_new_tokens=tokens, stop_tokens=stops),
        lookahead=FixedLookahead(block, siblings=siblings),
        generator=TorchSource.seeded(0),
    )


def assert_same(expected: Expected, result: Decoded) -> None:
    """Passes, rounds by length, and so tau."""
    assert expected.tokens == len(result.tokens)
    assert expected.passes == result.passes
    assert expected.rounds == result.blocks


# Temperature 0


@pytest.mark.parametrize("siblings", [(), (1,), (0, 2), (2, 1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rounds_are_those_of_decoding(kind: str, siblings: tuple[int, ...]) -> None:
    drafter, response = drafter_of(kind), respond()
    for block in (1, 2, 4, 6):
        beside = siblings[:block]
        assert_same(
            rehearsed(drafter, response, block, siblings=beside), decoded(drafter, block=block, siblings=beside)
        )


def test_the_drafts_of_these_tests_are_right_at_times_and_siblings_stand() -> None:
    for kind in KINDS[1:]:
        chain = decoded(drafter_of(kind), block=4)
        assert 1.0 < chain.tau < 4.5, kind
        if kind not in ("lookup",):
            assert sum(map(sum, decoded(drafter_of(kind), block=2, siblings=(2, 2)).siblings)), kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_and_the_context_end_blocks_as_in_decoding(kind: str) -> None:
    drafter = drafter_of(kind)
    # The context holds 64 tokens.
    long = torch.arange(57) % VOCAB
    for prompt, tokens in ((PROMPT, 1), (PROMPT, 2), (PROMPT, 7), (long, 40)):
        response = respond(prompt=prompt, tokens=tokens)
        assert response.num_tokens == min(tokens, 64 - prompt.shape[0])
        for block in (1, 3, 6):
            assert_same(
                rehearsed(drafter, response, block, siblings=(1,)),
                decoded(drafter, prompt=prompt, tokens=tokens, block=block, siblings=(1,)),
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_token_ends_the_walk_wherever_it_stands_in_a_block(kind: str) -> None:
    answer, drafter, stopped = respond().answer.tolist(), drafter_of(kind), 0
    for stop in range(VOCAB):
        stops = frozenset({stop})
        response = respond(stops=stops)
        stopped += response.num_tokens < len(answer)
        for block in (1, 3, 6):
            assert_same(
                rehearsed(drafter, response, block, siblings=(1, 1)[:block]),
                decoded(drafter, stops=stops, block=block, siblings=(1, 1)[:block]),
            )
    assert stopped == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_one_token(kind: str) -> None:
    prompt = PROMPT[:1]
    response, drafter = respond(prompt=prompt, tokens=20), drafter_of(kind)
    for block in (1, 4):
        assert_same(rehearsed(drafter, response, block), decoded(drafter, prompt=prompt, tokens=20, block=block))


@pytest.mark.parametrize("room", [3, 6, 7, 20, 33])
def test_a_draft_with_less_context_than_its_target_falls_silent_where_it_does_in_decoding(room: int) -> None:
    model = tiny_model(SEED, vocab=VOCAB)
    model.context_limit = room
    drafter, response = ModelDrafter(model), respond()
    for block in (1, 4):
        result = decoded(drafter, block=block)
        assert_same(rehearsed(drafter, response, block), result)
        assert (room < PROMPT.shape[0]) == (set(result.blocks) == {0})


def test_responses_longer_than_a_pass_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from inference.drafters import model as model_module

    whole = {kind: rehearsed(drafter_of(kind), respond(), 4) for kind in KINDS}
    monkeypatch.setattr(feature_module, "_ANCHORS", 7)
    monkeypatch.setattr(model_module, "_ROWS", 5)
    assert whole == {kind: rehearsed(drafter_of(kind), respond(), 4) for kind in KINDS}


def test_a_repetition_penalty_counts_what_the_response_itself_repeats() -> None:
    settings = SamplingSettings(repetition_penalty=1.6)
    response = respond(settings)
    assert response.answer.tolist() != respond().answer.tolist()
    for kind in KINDS:
        for block in (1, 4):
            result = decode(
                target_model(),
                drafter_of(kind),
                PROMPT,
                request=Request(settings=settings, max_new_tokens=40),
                lookahead=FixedLookahead(block, siblings=(1,)),
                generator=TorchSource.seeded(0),
            )
            assert result.tokens == response.answer.tolist()
            assert_same(rehearsed(drafter_of(kind), response, block, siblings=(1,)), result)


# Above temperature 0


def means_of_decoding(
    target: CausalModel, drafter: Drafter, settings: SamplingSettings, *, block: int, tokens: int
) -> dict[tuple[int, ...], tuple[float, Expected]]:
    """For every output its chance, and passes and rounds by length given that output, over all paths of `decode`."""
    sums: dict[tuple[int, ...], list[Any]] = {}
    waiting: list[tuple[int, ...]] = [()]
    request = Request(settings=settings, max_new_tokens=tokens)
    while waiting:
        path = Path(waiting.pop())
        result = decode(target, drafter, LAW_PROMPT, request=request, lookahead=FixedLookahead(block), generator=path)
        chance, passes, rounds = sums.setdefault(tuple(result.tokens), [0.0, 0.0, {}])
        for length, count in result.blocks.items():
            rounds[length] = rounds.get(length, 0.0) + path.probability * count
        sums[tuple(result.tokens)] = [chance + path.probability, passes + path.probability * result.passes, rounds]
        waiting += path.others
    return {
        output: (chance, Expected(len(output), passes / chance, {n: c / chance for n, c in sorted(rounds.items())}))
        for output, (chance, passes, rounds) in sums.items()
    }


LAW_VOCAB, LAW_PROMPT, LAW_TOKENS = 3, torch.tensor([0, 1, 0, 1]), 3
LAW_CONFIGS = {kind: replace(config, block=2) for kind, config in CONFIGS.items()}


def law_drafter(kind: str) -> Drafter:
    """Over three words, as far from the target's law as random weights are."""
    lookup = LookupDrafter(LookupSettings(longest=2, shortest=1))
    if kind == "none":
        return NoDrafter()
    if kind == "lookup":
        return lookup
    if kind in ("pretrained", "mixed"):
        draft = ModelDrafter(tiny_model(7, layers=1))
        return mixed_drafter(lookup, draft) if kind == "mixed" else draft
    vocabulary = torch.tensor([0, 2]) if kind == "reduced" else None
    config = LAW_CONFIGS["dspark" if kind == "reduced" else kind]
    return FeatureDrafter(_moved(make_network(config, tiny_model(0), vocabulary, seed=3).double(), by=1.0))


def law_response(output: Sequence[int], settings: SamplingSettings) -> FixedResponse:
    """An output as if the target had written it."""
    return fixed_response(
        tiny_model(0),
        ScorePrompt("p", "chat", LAW_PROMPT),
        output,
        settings=settings,
        max_new_tokens=LAW_TOKENS,
        taps=(0, 1),
    )


def largest_difference(kind: str, settings: SamplingSettings, *, block: int = 2) -> float:
    """Between the mean passes given an output by the pre-score and by every path of decoding, over all outputs."""
    drafter = law_drafter(kind)
    means = means_of_decoding(MemoModel(tiny_model(0)), drafter, settings, block=block, tokens=LAW_TOKENS)
    assert len(means) > 2 and sum(chance for chance, _ in means.values()) == pytest.approx(1.0)
    differences = []
    for output, (_, mean) in means.items():
        expected = rehearsed(drafter, law_response(output, settings), block, longest=3)
        differences.append(abs(expected.passes - mean.passes))
        differences += [
            abs(expected.rounds.get(n, 0.0) - mean.rounds.get(n, 0.0)) for n in {*expected.rounds, *mean.rounds}
        ]
    return max(differences)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, settings) for kind in ("lookup", "pretrained", "eagle3", "reduced") for settings in SETTINGS),
        *((kind, "T=1") for kind in ("none", "dflash", "dspark", "dspark rnn", "medusa")),
    ],
)
def test_expected_rounds_are_the_mean_over_all_random_outcomes_given_the_output(kind: str, settings: str) -> None:
    assert largest_difference(kind, SETTINGS[settings]) < 1e-9


@pytest.mark.parametrize("block", [1, 3])
def test_other_block_lengths_follow_from_the_same_table(block: int) -> None:
    assert largest_difference("pretrained", SETTINGS["T=1"], block=block) < 1e-9


def test_walks_of_mixed_drafts_are_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three tokens take one to three passes, so a walk's deviation is at most 1: 4000 are within 0.07 (4 sigma).
    monkeypatch.setattr(mixed_module, "WALKS", 4000)
    drafter, settings = law_drafter("mixed"), SETTINGS["T=1"]
    means = means_of_decoding(MemoModel(tiny_model(0)), drafter, settings, block=2, tokens=LAW_TOKENS)
    likeliest = sorted(means, key=lambda output: -means[output][0])[:3]
    for output in likeliest:
        expected = rehearsed(drafter, law_response(output, settings), 2)
        assert expected.passes == pytest.approx(means[output][1].passes, abs=0.07)


def test_a_mixed_drafts_walks_are_seeded() -> None:
    response = respond(SETTINGS["T=1"])
    assert rehearsed(drafter_of("mixed"), response, 4) == rehearsed(drafter_of("mixed"), response, 4)


def test_the_mean_over_responses_is_that_of_decoding() -> None:
    """With y left to chance as well: tau of many sampled requests."""
    drafter, settings = drafter_of("student"), SETTINGS["T=1"]
    prompts = [ScorePrompt(f"{n}", "chat", torch.cat([PROMPT, torch.tensor([n % VOCAB])])) for n in range(80)]
    responses = fixed_responses(target_model(), prompts, settings=settings, max_new_tokens=16, stop_tokens=NONE, seed=1)
    expected = [rehearsed(drafter, response, 3) for response in responses]
    request = Request(settings=settings, max_new_tokens=16)
    passes = sum(
        decode(
            target_model(),
            drafter,
            prompt.tokens,
            request=request,
            lookahead=FixedLookahead(3),
            generator=TorchSource.seeded(n),
        ).passes
        for n, prompt in enumerate(prompts)
    )
    # A request's passes deviate by less than a quarter: 80 on each side are within 0.12 (3 sigma) of each other.
    assert sum(e.passes for e in expected) / passes == pytest.approx(1.0, abs=0.12)


def test_siblings_count_for_nothing_above_temperature_0() -> None:
    response, drafter = respond(SETTINGS["T=1"]), drafter_of("student")
    assert rehearsed(drafter, response, 3, siblings=(2, 2)) == rehearsed(drafter, response, 3)


# Mutants


def test_mutant_overlap_of_the_laws_in_place_of_the_written_tokens_chance_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """sum_v min(p, q) is the acceptance before y is known, not given it."""
    settings = SETTINGS["T=1"]
    target = tiny_model(0)

    def overlap(rows: torch.Tensor, response: FixedResponse, *, start: int, **_: Any) -> rows_module.Judged:
        found = judged(rows, response, start=start)
        with torch.inference_mode():
            tokens = response.tokens[None, :-1]
            states = target.states(tokens)[0, response.first - 1 + start : response.first - 1 + start + len(rows)]
            both = torch.minimum(rows.softmax(-1), target.head(states).softmax(-1)).sum(-1)
        return found._replace(chances=both.double())

    from inference.drafters import model as model_module

    assert largest_difference("pretrained", settings) < 1e-9
    monkeypatch.setattr(model_module, "judged", overlap)
    assert largest_difference("pretrained", settings) > 1e-3


def test_mutant_ratio_the_wrong_way_round_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def inverted(rows: torch.Tensor, response: FixedResponse, *, start: int, **_: Any) -> rows_module.Judged:
        assert response.target_probs is not None
        wanted = response.answer[start : start + len(rows), None]
        ratio = response.target_probs[start : start + len(rows)] / rows.softmax(-1).gather(1, wanted)[:, 0]
        return rows_module.Judged(ratio.clamp(max=1.0), None)

    from inference.drafters import model as model_module

    monkeypatch.setattr(model_module, "judged", inverted)
    assert largest_difference("pretrained", SETTINGS["T=1"]) > 1e-3


@pytest.mark.parametrize("kind", ["pretrained", "dspark", "eagle3"])
def test_mutant_rows_of_the_anchor_beside_are_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(rows: torch.Tensor, *args: Any, **named: Any) -> rows_module.Judged:
        return judged(rows.roll(1, 0), *args, **named)

    from inference.drafters import model as model_module

    monkeypatch.setattr(model_module, "judged", shifted)
    monkeypatch.setattr(feature_module, "judged", shifted)
    assert largest_difference(kind, SETTINGS["T=1"]) > 1e-3
    drafter = drafter_of(kind)
    assert rehearsed(drafter, respond(), 3).rounds != decoded(drafter, block=3).blocks


def test_mutant_slots_judged_by_the_token_of_their_anchor_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(rows: torch.Tensor, response: FixedResponse, *, start: int, **named: Any) -> rows_module.Judged:
        return judged(rows, response, start=max(0, start - 1), **named)

    monkeypatch.setattr(feature_module, "judged", first)
    assert largest_difference("dspark", SETTINGS["T=1"]) > 1e-3


# Parts


def test_the_walk_by_hand() -> None:
    # Three tokens, chances by anchor: 0.5, 0.4 | 0.25 | -. Blocks of two, budget of ten.
    table = Table(
        chances=torch.tensor([[0.5, 0.4], [0.25, 0.0], [0.0, 0.0]], dtype=torch.float64), proposed=[2, 2, 2], budget=10
    )
    # From 0: to 1 by 0.5, to 2 by 0.5 x 0.6, to the end by 0.2. From 1: to 2 by 0.75, to the end by 0.25.
    visits = (1.0, 0.5, 0.3 + 0.5 * 0.75)
    expected = table.expected(2)
    assert expected.passes == pytest.approx(sum(visits))
    # Blocks go on past a response that a stop token ended early.
    assert expected.rounds == pytest.approx({2: sum(visits)})
    # Blocks of one: 0.5 to 1 and 0.5 to 2.
    assert table.expected(1).passes == pytest.approx(1.0 + 0.5 + 0.5 + 0.5 * 0.75)
    # Within a budget of three the last token is the target's own.
    assert replace(table, budget=3).expected(2).rounds == pytest.approx({2: 1.0, 1: 0.5, 0: 0.3 + 0.5 * 0.75})


def test_a_sibling_writes_one_token_more() -> None:
    ranks = torch.tensor([[1], [2], [0], [-1], [0]])
    table = Table(chances=(ranks == 0).double(), proposed=[1] * 5, budget=10, ranks=ranks)
    # 0: rank 1, so its sibling and the token after it: to 2. There the token stands: to 4, and on to the end.
    assert table.expected(1, siblings=[1]).passes == 3.0
    assert table.expected(1).passes == 4.0  # 0, 1, 2, 4


def test_rows_by_position_give_every_block_its_own() -> None:
    table = table_of_rows(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), None, proposed=[2, 1, 2], budget=9)
    assert table.chances.tolist() == [[0.1, 0.2], [0.2, 0.3], [0.3, 0.0]]


def test_ties_go_to_the_lowest_id_as_in_argmax() -> None:
    response = replace(respond(tokens=3), tokens=torch.tensor([*PROMPT.tolist(), 1, 2, 5]))
    rows = torch.tensor([[0.0, 7.0, 7.0, 1.0, 0.0, 0.0]] * 3)
    assert judged(rows, response, start=0).ranks.tolist() == [0, 1, 5]  # type: ignore[union-attr]
    # Of a vocabulary of 1, 2 and 3, token 5 is not there.
    found = judged(rows[:, 1:4], response, start=0, vocabulary=torch.tensor([1, 2, 3]))
    assert (found.ranks.tolist(), found.chances.tolist()) == ([0, 1, -1], [1.0, 0.0, 0.0])  # type: ignore[union-attr]


def test_a_reduced_vocabulary_needs_no_wide_rows_where_a_temperature_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    processed = rows_module.processed

    def watched(rows: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        widths.append(rows.shape[1])
        return processed(rows, *args, **named)

    response = respond(SETTINGS["T=1"])
    wide = respond(SETTINGS["T=1 top-p"])
    monkeypatch.setattr(rows_module, "processed", watched)
    rehearsed(drafter_of("reduced"), response, 2)
    assert set(widths) == {4}
    widths.clear()
    rehearsed(drafter_of("reduced"), wide, 2)
    assert set(widths) == {VOCAB}


def test_features_are_found_by_layer_in_any_order() -> None:
    response = respond(taps=(0, 1))
    both, swapped = response.features_of((0, 1)), response.features_of((1, 0))
    half = both.shape[1] // 2
    assert torch.equal(both[:, :half], swapped[:, half:]) and torch.equal(both[:, half:], swapped[:, :half])


def test_a_draft_without_a_rehearsal_has_none_behind_look_up_either() -> None:
    class Silent:
        kind = "silent"

        def begin(self, prompt: torch.Tensor) -> None: ...
        def propose(self, context: torch.Tensor, **_: Any) -> Proposal:
            return Proposal(context[:0])

        def rollback(self, num_accepted: int) -> None: ...
        def nbytes(self) -> int:
            return 0

    silent: Any = Silent()
    assert not isinstance(silent, Rehearses)
    mixed = mixed_drafter(LookupDrafter(LookupSettings()), silent)
    assert mixed.rehearse(respond(), longest=2) is None


def test_a_rehearsal_leaves_a_request_under_way_alone() -> None:
    for kind in ("lookup", "student", "eagle3", "mixed"):
        drafter, response = drafter_of(kind), respond()
        before = decoded(drafter, block=3)
        drafter.begin(PROMPT)
        rehearsed(drafter, response, 3)
        assert decoded(drafter, block=3).blocks == before.blocks
