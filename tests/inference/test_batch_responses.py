"""Answers to many prompts are those of each prompt alone, whoever ran beside it and whoever had its slot before."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.attention import use_grouped_attention
from inference.batch.cache import SlotCache
from inference.batch.responses import Wanted, answer_all
from inference.errors import InputError
from inference.generation import Response, generate_batch
from inference.model import CausalModel
from inference.sampling_settings import SamplingSettings
from inference.taps import EMBEDDING
from tests.inference.families import CONTEXT, VOCAB, family_model, greedy_reference
from tests.inference.test_feature_drafts import features_of

GREEDY, SAMPLED = SamplingSettings(), SamplingSettings(temperature=1.0)
NONE: frozenset[int] = frozenset()
HIDDEN = 32


def grouped_model(name: str, **changes: Any) -> CausalModel:
    model = family_model(name, **changes)
    use_grouped_attention(model.model)
    return model


def _prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def _wanted(
    *,
    settings: SamplingSettings = GREEDY,
    tokens: int = 12,
    stop: frozenset[int] = NONE,
    keep: bool = False,
    taps: Sequence[int] = (),
) -> Wanted:
    return Wanted(
        settings=settings,
        max_new_tokens=tokens,
        stop_tokens=stop,
        keep_states=keep,
        keep_prompt_states=keep,
        taps=tuple(taps),
    )


def _check(model: CausalModel, prompt: list[int], response: Response, *, taps: list[int]) -> None:
    """States and features are those of one pass over the finished sequence; the last token was never fed."""
    sequence = torch.tensor([*prompt, *response.tokens])
    with torch.inference_mode():
        states = model.states(sequence[None])[0]
    assert response.states is not None and response.prompt_states is not None and response.features is not None
    torch.testing.assert_close(response.prompt_states, states[: len(prompt) - 1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(response.states, states[len(prompt) - 1 : -1], rtol=1e-8, atol=1e-8)
    assert response.features.dtype == torch.bfloat16
    assert response.features.shape == (sequence.shape[0], len(taps) * HIDDEN)
    assert not bool(response.features[-1].any())
    expected = features_of(model, sequence, taps)[:-1]
    # Kept in bf16, 8 bits.
    torch.testing.assert_close(response.features[:-1].double(), expected, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("max_running", [1, 2, 3, 9])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_neox", "phi", "gpt2"])
def test_every_answer_is_that_of_its_prompt_alone(name: str, max_running: int) -> None:
    model, prompts = grouped_model(name), _prompts(3, 15, 1, 9, 4)
    taps = [0, 1, EMBEDDING]
    responses = answer_all(model, prompts, _wanted(keep=True, taps=taps), max_running=max_running, seed=0)
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.tokens == greedy_reference(model, torch.tensor(prompt), 12)
        assert not response.stopped
        _check(model, prompt, response, taps=taps)


@pytest.mark.parametrize("max_running", [2, 3, 8])
def test_answers_that_end_early_make_room_and_change_nothing_for_the_others(max_running: int) -> None:
    model, prompts = grouped_model("llama"), _prompts(3, 15, 1, 9, 5, 2, 7, 4)
    whole = [greedy_reference(model, torch.tensor(p), 30) for p in prompts]
    # Stop tokens so frequent that answers leave one by one.
    stop = frozenset({row[4 + 3 * i] for i, row in enumerate(whole[:6])})
    responses = answer_all(
        model, prompts, _wanted(tokens=30, stop=stop, keep=True, taps=[1]), max_running=max_running, seed=0
    )
    lengths = set()
    for prompt, row, response in zip(prompts, whole, responses, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
        assert response.tokens == row[:end]
        assert response.stopped == (row[end - 1] in stop)
        _check(model, prompt, response, taps=[1])
        lengths.add(end)
    assert len(lengths) > 2


@pytest.mark.parametrize("rest", [(1, 1), (1, 9, 4), (6, 6), (2, 17, 3, 8, 5, 5)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gemma3_text"])
def test_what_prompts_begin_with_is_read_once_and_changes_nothing(name: str, rest: tuple[int, ...]) -> None:
    model = grouped_model(name)
    [begun] = _prompts(11)
    prompts = [[*begun, *own] for own in _prompts(*rest)]
    fed: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, inputs, named: fed.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    taps = [EMBEDDING, 0, 1]
    responses = answer_all(model, prompts, _wanted(tokens=8, keep=True, taps=taps), max_running=3, seed=3)
    handle.remove()
    shared = fed[0]
    assert len(begun) <= shared < min(map(len, prompts))
    assert sum(fed) == shared + sum(len(prompt) - shared + 8 - 1 for prompt in prompts)
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.tokens == greedy_reference(model, torch.tensor(prompt), 8)
        _check(model, prompt, response, taps=taps)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_answer_stops_at_its_own_context_limit(name: str) -> None:
    model, prompts = grouped_model(name), _prompts(CONTEXT - 3, 10, CONTEXT - 1)
    responses = answer_all(model, prompts, _wanted(tokens=20), max_running=3, seed=0)
    assert [len(r.tokens) for r in responses] == [3, 20, 1]
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.tokens == greedy_reference(model, torch.tensor(prompt), len(response.tokens))


def test_prompts_wait_until_a_pass_of_them_is_worth_while() -> None:
    model, prompts = grouped_model("llama"), _prompts(*[4] * 40)
    passes: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, inputs, named: passes.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    answer_all(model, prompts, _wanted(tokens=3), max_running=16, seed=0)
    handle.remove()
    assert passes == [64, 16, 16, 64, 16, 16, 32, 8, 8]


def test_draws_follow_the_law_of_the_target_for_every_place() -> None:
    model = grouped_model("llama", initializer_range=0.3)
    prompt, count = _prompts(5)[0], 4000
    other = _prompts(9)[0]
    responses = answer_all(model, [prompt, other] * count, _wanted(settings=SAMPLED, tokens=2), max_running=64, seed=1)
    for asked, answers in ((prompt, responses[0::2]), (other, responses[1::2])):
        with torch.inference_mode():
            first = torch.softmax(model.model(input_ids=torch.tensor([asked])).logits[0, -1].double(), -1)
        _close(Counter(r.tokens[0] for r in answers), first, count)
        likeliest = int(first.argmax())
        after = [r.tokens[1] for r in answers if r.tokens[0] == likeliest]
        with torch.inference_mode():
            second = torch.softmax(
                model.model(input_ids=torch.tensor([[*asked, likeliest]])).logits[0, -1].double(), -1
            )
        _close(Counter(after), second, len(after))


def _close(seen: Counter[int], law: Tensor, count: int) -> None:
    """No token's share is off by more than five standard errors."""
    for token, chance in enumerate(law.tolist()):
        error = math.sqrt(chance * (1 - chance) / count)
        assert abs(seen[token] / count - chance) <= 5 * error + 2 / count


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    model, prompts = grouped_model("llama"), _prompts(3, 8, 5)
    first, again, other = (
        [r.tokens for r in answer_all(model, prompts, _wanted(settings=SAMPLED), max_running=2, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_what_is_kept_changes_no_token(settings: SamplingSettings) -> None:
    model, prompts = grouped_model("llama"), _prompts(3, 8, 5)
    bare, kept = (
        answer_all(
            model, prompts, _wanted(settings=settings, keep=keep, taps=[1] if keep else []), max_running=2, seed=0
        )
        for keep in (False, True)
    )
    assert [r.tokens for r in bare] == [r.tokens for r in kept]
    assert all(r.states is None and r.prompt_states is None and r.features is None for r in bare)


def test_no_hook_outlives_the_answers() -> None:
    model = grouped_model("llama")
    answer_all(model, _prompts(3), _wanted(tokens=2, taps=[0, EMBEDDING]), max_running=1, seed=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


def test_a_family_whose_requests_cannot_share_a_pass_is_answered_in_padded_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(self: SlotCache, *given: object, **named: object) -> None:
        raise InputError("this target's attention has softcap")

    model, prompts = grouped_model("llama"), _prompts(3, 15, 1, 9, 4)
    monkeypatch.setattr(SlotCache, "placed", refused)
    responses = answer_all(model, prompts, _wanted(keep=True, taps=[1]), max_running=2, seed=5)
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.tokens == greedy_reference(model, torch.tensor(prompt), 12)
        _check(model, prompt, response, taps=[1])


def test_greedy_answers_are_those_of_padded_batches() -> None:
    model, prompts = grouped_model("llama"), _prompts(3, 15, 1, 9)
    padded = generate_batch(family_model("llama"), prompts, settings=GREEDY, max_new_tokens=9, stop_tokens=NONE, seed=0)
    assert [r.tokens for r in answer_all(model, prompts, _wanted(tokens=9), max_running=4, seed=0)] == [
        r.tokens for r in padded
    ]


def test_no_prompts_no_answers() -> None:
    assert answer_all(grouped_model("llama"), [], _wanted(), max_running=4, seed=0) == []


@pytest.mark.parametrize(("lengths", "message"), [((3, CONTEXT), "the context holds"), ((3, 0), "no tokens")])
def test_prompts_that_cannot_be_answered_are_refused(lengths: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        answer_all(grouped_model("llama"), _prompts(*lengths), _wanted(), max_running=2, seed=0)


def test_what_is_not_supported_is_refused() -> None:
    model, prompts = grouped_model("llama"), _prompts(3)
    with pytest.raises(ValueError, match="set repetition_penalty=1"):
        answer_all(model, prompts, _wanted(settings=SamplingSettings(repetition_penalty=1.1)), max_running=1, seed=0)
    with pytest.raises(ValueError, match="max_running is 0"):
        answer_all(model, prompts, _wanted(), max_running=0, seed=0)
