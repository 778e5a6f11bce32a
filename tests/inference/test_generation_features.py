"""Features of batched generation are those of each finished sequence alone, whatever shared its batch."""

import pytest
import torch
from torch import Tensor

from inference.cache import RollbackCache
from inference.generation import Response, generate_batch
from inference.model import CausalModel
from inference.sampling_settings import SamplingSettings
from inference.taps import EMBEDDING
from tests.inference.families import CONTEXT, VOCAB, family_model
from tests.inference.test_feature_drafts import features_of

NONE: frozenset[int] = frozenset()
SAMPLED = SamplingSettings(temperature=1.0)
HIDDEN = 32


def _prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def _generate(
    model: CausalModel,
    prompts: list[list[int]],
    *,
    taps: list[int],
    settings: SamplingSettings = SAMPLED,
    tokens: int = 12,
    stop: frozenset[int] = NONE,
    keep_states: bool = False,
) -> list[Response]:
    return generate_batch(
        model,
        prompts,
        settings=settings,
        max_new_tokens=tokens,
        stop_tokens=stop,
        seed=3,
        keep_states=keep_states,
        taps=taps,
    )


def _check(model: CausalModel, prompt: list[int], response: Response, *, taps: list[int]) -> None:
    """One row per token, the last of them zero, the others those of one pass over the finished sequence."""
    sequence = torch.tensor([*prompt, *response.tokens])
    features = response.features
    assert features is not None and features.dtype == torch.bfloat16
    assert features.shape == (sequence.shape[0], len(taps) * HIDDEN)
    assert not bool(features[-1].any())
    expected = features_of(model, sequence, taps)[:-1]
    # Kept in bf16, 8 bits.
    torch.testing.assert_close(features[:-1].double(), expected, rtol=2**-8, atol=1e-9)


@pytest.fixture
def compactions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows left after each compaction of the batch."""
    sizes: list[int] = []
    select = RollbackCache.batch_select_indices

    def counted(self: RollbackCache, indices: Tensor) -> None:
        sizes.append(indices.shape[0])
        select(self, indices)

    monkeypatch.setattr(RollbackCache, "batch_select_indices", counted)
    return sizes


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "phi", "gpt2"])
@pytest.mark.parametrize("taps", [[0, 1], [1, EMBEDDING]])
def test_features_of_a_ragged_batch_are_those_of_each_sequence_alone(name: str, taps: list[int]) -> None:
    model, prompts = family_model(name), _prompts(3, 15, 1, 9)
    responses = _generate(model, prompts, taps=taps)
    assert all(len(response.tokens) == 12 for response in responses)
    for prompt, response in zip(prompts, responses, strict=True):
        _check(model, prompt, response, taps=taps)


def test_rows_that_stop_early_keep_their_own_features_while_the_batch_shrinks(compactions: list[int]) -> None:
    model, prompts = family_model("llama"), _prompts(3, 15, 1, 9, 5, 2, 7, 4)
    whole = [response.tokens for response in _generate(model, prompts, taps=[], tokens=30)]
    # Stop tokens so frequent that rows leave one by one: some wait as ballast, and the batch shrinks more than once.
    stop = frozenset({row[4 + 3 * index] for index, row in enumerate(whole[:6])})
    responses = _generate(model, prompts, taps=[0, 1], tokens=30, stop=stop)
    assert len(compactions) > 1
    assert len({len(response.tokens) for response in responses}) > len(compactions) + 1
    assert any(response.stopped for response in responses)
    for prompt, response in zip(prompts, responses, strict=True):
        _check(model, prompt, response, taps=[0, 1])


def test_a_row_that_goes_on_alone_after_the_others_left_keeps_its_features(compactions: list[int]) -> None:
    model, prompts = family_model("llama"), _prompts(CONTEXT - 2, 4, CONTEXT - 1)
    responses = _generate(model, prompts, taps=[1], tokens=20)
    assert [len(response.tokens) for response in responses] == [2, 20, 1]
    assert compactions[-1] == 1
    for prompt, response in zip(prompts, responses, strict=True):
        _check(model, prompt, response, taps=[1])


def test_an_answer_of_one_token_has_the_features_of_its_prompt() -> None:
    model, prompts = family_model("llama"), _prompts(4, 1, 6)
    for stop in (NONE, frozenset(range(VOCAB))):
        responses = _generate(model, prompts, taps=[0], tokens=1 if not stop else 9, stop=stop)
        assert all(len(response.tokens) == 1 for response in responses)
        for prompt, response in zip(prompts, responses, strict=True):
            _check(model, prompt, response, taps=[0])


@pytest.mark.parametrize("settings", [SamplingSettings(), SAMPLED], ids=["greedy", "sampled"])
def test_features_change_neither_tokens_nor_states(settings: SamplingSettings) -> None:
    model, prompts = family_model("llama"), _prompts(3, 8, 5)
    plain, tapped = (_generate(model, prompts, taps=taps, settings=settings, keep_states=True) for taps in ([], [0, 1]))
    for without, response in zip(plain, tapped, strict=True):
        assert without.features is None
        assert without.tokens == response.tokens
        assert without.states is not None and response.states is not None
        assert torch.equal(without.states, response.states)


def test_no_hook_outlives_the_batch() -> None:
    model = family_model("llama")
    _generate(model, _prompts(3), taps=[0, EMBEDDING], tokens=2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


@pytest.mark.parametrize("rest", [(1, 1), (1, 9, 4), (6, 6), (2, 17, 3, 8)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gemma3_text"])
def test_what_prompts_begin_with_is_read_once_and_changes_nothing(name: str, rest: tuple[int, ...]) -> None:
    model = family_model(name)
    [begun] = _prompts(11)
    prompts = [[*begun, *own] for own in _prompts(*rest)]
    taps = [EMBEDDING, 0, 1]
    widths: list[tuple[int, int]] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, inputs, named: widths.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    responses = generate_batch(
        model,
        prompts,
        settings=SamplingSettings(),
        max_new_tokens=8,
        stop_tokens=NONE,
        seed=3,
        keep_states=True,
        keep_prompt_states=True,
        taps=taps,
    )
    handle.remove()
    if name == "gemma3_text":
        # Its windows count columns, padding among them.
        assert widths[0] == (len(rest), len(begun) + max(rest))
    else:
        assert widths[0][0] == 1 and widths[0][1] >= len(begun)
    for prompt, response in zip(prompts, responses, strict=True):
        [alone] = generate_batch(
            model,
            [prompt],
            settings=SamplingSettings(),
            max_new_tokens=8,
            stop_tokens=NONE,
            seed=3,
            keep_states=True,
            keep_prompt_states=True,
        )
        assert response.tokens == alone.tokens
        torch.testing.assert_close(response.states, alone.states, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(response.prompt_states, alone.prompt_states, rtol=1e-6, atol=1e-6)
        _check(model, prompt, response, taps=taps)


def test_equal_prompts_share_all_but_their_last_token() -> None:
    model = family_model("llama")
    [prompt] = _prompts(14)
    pair = _generate(model, [prompt, prompt], taps=[1], settings=SamplingSettings())
    [alone] = _generate(model, [prompt], taps=[1], settings=SamplingSettings())
    assert pair[0].tokens == pair[1].tokens == alone.tokens
    for response in pair:
        _check(model, prompt, response, taps=[1])
