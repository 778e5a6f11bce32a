"""Batched generation gives what one prompt alone would give, whatever shares its batch."""

import pytest
import torch

from inference.errors import InputError
from inference.generation import Response, generate_batch
from inference.model import CausalModel
from inference.sampling_settings import SamplingSettings
from tests.inference.families import CONTEXT, VOCAB, family_model, greedy_reference

GREEDY, SAMPLED = SamplingSettings(), SamplingSettings(temperature=1.0)
NONE: frozenset[int] = frozenset()


def _prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def _generate(
    model: CausalModel,
    prompts: list[list[int]],
    *,
    settings: SamplingSettings = GREEDY,
    tokens: int = 12,
    stop: frozenset[int] = NONE,
    seed: int = 0,
    keep_states: bool = False,
) -> list[Response]:
    return generate_batch(
        model,
        prompts,
        settings=settings,
        max_new_tokens=tokens,
        stop_tokens=stop,
        seed=seed,
        keep_states=keep_states,
    )


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "phi", "gpt2"])
def test_a_batch_gives_what_a_plain_loop_gives_for_each_prompt(name: str) -> None:
    model, prompts = family_model(name), _prompts(3, 15, 1, 9)
    expected = [greedy_reference(model, torch.tensor(p), 12) for p in prompts]
    assert [r.tokens for r in _generate(model, prompts)] == expected


def test_the_states_of_prompts_are_those_of_each_prompt_alone() -> None:
    model, prompts = family_model("llama"), _prompts(3, 15, 1, 9)
    responses = generate_batch(
        model, prompts, settings=SAMPLED, max_new_tokens=5, stop_tokens=NONE, seed=0, keep_prompt_states=True
    )
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.inference_mode():
            alone = model.states(torch.tensor([prompt]))[0, :-1]
        assert response.states is None and response.prompt_states is not None
        torch.testing.assert_close(response.prompt_states, alone, rtol=1e-9, atol=1e-9)
    assert all(r.prompt_states is None for r in _generate(model, prompts, keep_states=True))


def test_rows_that_end_early_change_nothing_for_the_others() -> None:
    model, prompts = family_model("llama"), _prompts(3, 15, 1, 9, 5, 2, 7, 4)
    whole = [greedy_reference(model, torch.tensor(p), 30) for p in prompts]
    # Stop tokens so frequent that rows leave one by one and the batch shrinks several times.
    stop = frozenset({row[4 + 3 * i] for i, row in enumerate(whole[:6])})
    responses = _generate(model, prompts, tokens=30, stop=stop, keep_states=True)
    lengths = set()
    for row, response in zip(whole, responses, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
        assert response.tokens == row[:end]
        assert response.stopped == (row[end - 1] in stop)
        assert response.states is not None and response.states.shape == (end, 32)
        lengths.add(end)
    assert len(lengths) > 2


def test_kept_states_predict_the_tokens() -> None:
    model, prompts = family_model("gemma3_text"), _prompts(3, 12, 6)
    stop = frozenset({greedy_reference(model, torch.tensor(prompts[0]), 4)[-1]})
    for prompt, response in zip(prompts, _generate(model, prompts, stop=stop, keep_states=True), strict=True):
        assert response.states is not None
        sequence = torch.tensor([[*prompt, *response.tokens]])
        with torch.inference_mode():
            assert model.head(response.states).argmax(-1).tolist() == response.tokens
            forced = model.states(sequence)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(response.states, forced, rtol=1e-9, atol=1e-9)


def test_states_are_kept_only_when_asked() -> None:
    assert all(r.states is None for r in _generate(family_model("llama"), _prompts(3, 4)))


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    model, prompts = family_model("llama"), _prompts(3, 8)
    first, again, other = (
        [r.tokens for r in _generate(model, prompts, settings=SAMPLED, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_rows_of_a_batch_draw_for_themselves() -> None:
    # The same prompt eight times is eight samples, not one.
    responses = _generate(family_model("llama", initializer_range=0.1), _prompts(5) * 8, settings=SAMPLED)
    assert len({tuple(r.tokens) for r in responses}) == 8


def test_top_k_and_top_p_hold_for_every_token() -> None:
    model, prompts = family_model("llama"), _prompts(4, 6)
    settings = SamplingSettings(temperature=2.0, top_k=2)
    for prompt, response in zip(prompts, _generate(model, prompts, settings=settings), strict=True):
        sequence = torch.tensor([[*prompt, *response.tokens]])
        with torch.inference_mode():
            rows = model.model(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 : -1]
        for token, row in zip(response.tokens, rows, strict=True):
            assert token in row.topk(2).indices.tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_row_stops_at_its_own_context_limit(name: str) -> None:
    model, prompts = family_model(name), _prompts(CONTEXT - 3, 10, CONTEXT - 1)
    responses = _generate(model, prompts, tokens=20)
    # A neighbour near its limit does not shorten the others.
    assert [len(r.tokens) for r in responses] == [3, 20, 1]
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.tokens == greedy_reference(model, torch.tensor(prompt), len(response.tokens))


def test_a_repetition_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match="batched generation has no repetition penalty; set repetition_penalty=1"):
        _generate(family_model("llama"), _prompts(3), settings=SamplingSettings(repetition_penalty=1.1))


@pytest.mark.parametrize(("lengths", "message"), [((3, CONTEXT), "the context holds"), ((3, 0), "no tokens")])
def test_prompts_that_cannot_be_answered_are_refused(lengths: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _generate(family_model("llama"), _prompts(*lengths))
