"""The roll-back cache is transformers' own cache with another memory layout: same logits, whatever is rolled back."""

import random

import pytest
import torch
from transformers import DynamicCache

from inference.cache import RollbackCache, RollbackLayer
from inference.model import CausalModel
from tests.inference.families import CONTEXT, FAMILIES, VOCAB, family_model


def _plain_logits(model: CausalModel, tokens: list[int], *, known: int) -> torch.Tensor:
    """Rows after the first `known` tokens, through a new dynamic cache of transformers' own; `[new, V]`."""
    cache = DynamicCache(config=model.model.config)
    with torch.inference_mode():
        if known:
            model.model(input_ids=torch.tensor([tokens[:known]]), past_key_values=cache, use_cache=True)
        output = model.model(input_ids=torch.tensor([tokens[known:]]), past_key_values=cache, use_cache=True)
    rows: torch.Tensor = output.logits[0]
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_the_dynamic_caches_through_appends_and_rollbacks(name: str) -> None:
    model, rng = family_model(name), random.Random(name)
    cache, held = model.new_cache(), list[int]()
    for _ in range(25):
        if len(held) > CONTEXT - 10:
            del held[rng.randint(0, 20) :]
        elif held and rng.random() < 0.5:
            del held[len(held) - rng.randint(0, min(7, len(held))) :]
        cache.rollback(len(held))
        known = len(held)
        held += [rng.randrange(VOCAB) for _ in range(rng.choice((1, 1, 4, 9)))]
        rows = model.logits(torch.tensor(held[known:]), cache, num_rows=len(held) - known)
        assert cache.length == len(held)
        torch.testing.assert_close(rows, _plain_logits(model, held, known=known), rtol=1e-9, atol=1e-9)


def test_rolled_back_positions_leave_no_trace() -> None:
    model = family_model("gemma3_text")
    tokens = torch.arange(20)
    cache = model.new_cache()
    model.logits(tokens[:12], cache, num_rows=1)
    first = model.logits(tokens[12:16], cache, num_rows=4)
    cache.rollback(12)
    model.logits(torch.full((6,), 40), cache, num_rows=1)
    cache.rollback(12)
    assert torch.equal(first, model.logits(tokens[12:16], cache, num_rows=4))


def _states(*values: float) -> torch.Tensor:
    """Keys of two rows, one head of size 1, one position a value; the second row is the negative of the first."""
    row = torch.tensor(values, dtype=torch.float32)[None, :, None]
    return torch.stack([row, -row])


def test_a_buffer_grows_and_keeps_what_it_holds() -> None:
    layer = RollbackLayer()
    numbers = torch.arange(600.0)
    for start in range(0, 600, 50):
        keys, values = layer.update(_states(*numbers[start : start + 50]), 2 * _states(*numbers[start : start + 50]))
    assert torch.equal(keys, _states(*numbers))
    assert torch.equal(values, 2 * _states(*numbers))
    # 256 positions, then 512, then 1024 of them, twice two rows of four bytes.
    assert layer.nbytes() == 1024 * 2 * 2 * 4


def test_one_long_write_takes_exactly_its_room() -> None:
    layer = RollbackLayer()
    layer.update(_states(*range(700)), _states(*range(700)))
    assert layer.nbytes() == 700 * 2 * 2 * 4


def test_rollback_does_not_free_and_appending_does_not_grow() -> None:
    layer = RollbackLayer()
    layer.update(_states(*range(200)), _states(*range(200)))
    before = layer.nbytes()
    for _ in range(20):
        layer.rollback(150)
        layer.update(_states(*range(50)), _states(*range(50)))
    assert layer.nbytes() == before
    assert layer.get_seq_length() == 200


def test_an_unused_cache_holds_nothing() -> None:
    cache = RollbackCache(3)
    assert (cache.length, cache.nbytes()) == (0, 0)
    cache.rollback(0)


def test_rolling_forward_is_refused() -> None:
    cache = RollbackCache(1)
    cache.update(_states(1, 2, 3), _states(1, 2, 3), 0)
    with pytest.raises(ValueError, match="cannot roll forward from 3 to 4 positions"):
        cache.rollback(4)


def test_bytes_are_those_of_all_layers() -> None:
    cache = RollbackCache(2)
    for layer in range(2):
        cache.update(_states(1), _states(1), layer)
    # Room for 256 positions: 2 layers, keys and values, 2 rows, 4 bytes.
    assert cache.nbytes() == 2 * 2 * 256 * 2 * 4


def test_rows_of_a_batch_can_be_dropped_and_reordered() -> None:
    layer = RollbackLayer()
    layer.update(_states(1, 2), _states(1, 2))
    layer.batch_select_indices(torch.tensor([1]))
    keys, _ = layer.update(torch.tensor([[[[9.0]]]]), torch.tensor([[[[9.0]]]]))
    assert keys[:, 0, :, 0].tolist() == [[-1.0, -2.0, 9.0]]


def test_batch_selection_keeps_the_logits_of_the_rows_that_stay() -> None:
    model = family_model("llama")
    tokens = torch.randint(VOCAB, (3, 10), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache()
    with torch.inference_mode():
        model.model(input_ids=tokens[:, :8], past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([2, 0]))
        rows = model.model(input_ids=tokens[[2, 0], 8:], past_key_values=cache, use_cache=True).logits
        whole = model.model(input_ids=tokens[[2, 0]], use_cache=False).logits[:, 8:]
    torch.testing.assert_close(rows, whole, rtol=1e-9, atol=1e-9)
