"""Whatever answers lists of prompts, greedy answers and what is kept along with them are the same."""

import pytest
import torch

from inference import answers
from inference.answers import Answering
from inference.attention import use_grouped_attention
from inference.batch.responses import Wanted
from inference.generation import Response
from inference.lean import use_lean_layers
from inference.model import CausalModel
from inference.sampling_settings import SamplingSettings
from tests.inference.families import CONTEXT, VOCAB, family_model

GREEDY = SamplingSettings()


def target(*, lean: bool = True, context: int = 600) -> CausalModel:
    model = family_model("llama", max_position_embeddings=context)
    use_grouped_attention(model.model)
    if lean:
        use_lean_layers(model.model)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def wanted(settings: SamplingSettings = GREEDY) -> Wanted:
    return Wanted(
        settings=settings,
        max_new_tokens=9,
        stop_tokens=frozenset({3}),
        keep_states=True,
        keep_prompt_states=True,
        taps=(0, 1),
    )


def check_same(one: list[Response], other: list[Response]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.tokens, a.stopped) == (b.tokens, b.stopped)
        for mine, own in ((a.states, b.states), (a.prompt_states, b.prompt_states)):
            torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)
        assert a.features is not None and b.features is not None
        torch.testing.assert_close(a.features.float(), b.features.float(), rtol=2**-7, atol=1e-6)


def test_captured_rounds_and_slots_answer_alike_list_after_list() -> None:
    model = target()
    captured, slots = (Answering(model, wanted(), max_running=4, captured=way) for way in (True, False))
    for lengths in ((3, 15, 2, 9, 6, 7), (5, 4), (300, 2, 8), (20,)):
        asked = prompts(*lengths)
        check_same(captured.answer(asked, seed=1), slots.answer(asked, seed=1))


@pytest.mark.parametrize("way", ["captured", "slots", "padded"])
def test_each_prompt_may_have_a_temperature_of_its_own(way: str) -> None:
    model = family_model("llama") if way == "padded" else target()
    asked, cold = prompts(3, 15, 2, 9, 6, 7), [0, 3, 4]
    sampled = Answering(model, wanted(SamplingSettings(temperature=1.0)), max_running=4, captured=way == "captured")
    greedy = Answering(model, wanted(), max_running=4, captured=False).answer(asked, seed=0)
    temperatures = [1e-6 if index in cold else 50.0 for index in range(len(asked))]
    for seed in range(1, 4):
        responses = sampled.answer(asked, seed=seed, temperatures=temperatures)
        same = [index for index, own in enumerate(greedy) if responses[index].tokens == own.tokens]
        assert same == cold


def test_places_grow_with_the_longest_request_and_serve_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(answers.CapturedAnswers):
        def __init__(self, model: CausalModel, *, longest: int, **named: object) -> None:
            made.append(longest)
            super().__init__(model, longest=longest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(answers, "CapturedAnswers", Counted)
    answering = Answering(target(), wanted(), max_running=2, captured=True)
    for lengths in ((3, 15), (200,), (300, 2), (4,), (590,)):
        answering.answer(prompts(*lengths), seed=0)
    assert made == [256, 512, 600]  # no more than the context
    prepared = Answering(target(), wanted(), max_running=2, captured=True)
    prepared.prepare(longest_prompt=400)
    prepared.answer(prompts(3, 400, 20), seed=0)
    assert made[3:] == [512]


def test_a_target_that_cannot_be_captured_is_answered_in_slots() -> None:
    asked = prompts(3, 15, 2)
    plain = Answering(target(lean=False), wanted(), max_running=2, captured=True)
    slots = Answering(target(), wanted(), max_running=2, captured=False)
    for _ in range(2):
        check_same(plain.answer(asked, seed=1), slots.answer(asked, seed=1))


def test_on_a_cpu_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "CapturedAnswers", None)
    assert len(Answering(target(), wanted(), max_running=2).answer(prompts(3, 4), seed=0)) == 2


@pytest.mark.parametrize(("free", "places"), [(2**40, 96), (2**20, 6), (1, 1)])
def test_places_fit_into_what_is_free(free: int, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = target()
    answering = Answering(model, wanted(), max_running=96, captured=True)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    assert answering._room(64) == places


def test_no_prompts_no_answers() -> None:
    assert Answering(target(context=CONTEXT), wanted(), max_running=2, captured=True).answer([], seed=0) == []
