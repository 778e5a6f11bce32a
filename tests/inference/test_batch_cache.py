"""Slots hold what their requests wrote: through growth, rollback, moves, compaction; and zeros where nobody wrote."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from inference.batch import Placement, SlotCache
from tests.inference.families import family_model

CPU = torch.device("cpu")


def written(
    cache: SlotCache, blocks: Sequence[Sequence[float]], *, active: Sequence[int] | None = None
) -> list[Tensor]:
    """One pass over a cache of one layer and one head of size 1; keys are the numbers, values their negatives."""
    states = torch.tensor([number for block in blocks for number in block], dtype=torch.float32)[None, None, :, None]
    with torch.inference_mode(), cache.placed([len(b) for b in blocks], active=active, device=CPU):
        keys, values = cache.update(states, -states, 0)
    assert torch.equal(keys, -values)
    return [*keys[:, 0, :, 0]]


def new_cache(requests: int, *, max_slots: int = 8, max_tokens: int = 2048) -> SlotCache:
    cache = SlotCache(1, max_slots=max_slots, max_tokens=max_tokens)
    for slot in range(requests):
        assert cache.join() == slot
    return cache


def held(cache: SlotCache) -> list[list[float]]:
    """What is valid in each active slot."""
    keys = cache.slot_layers[0].buffers[0]
    return [keys[slot, 0, :length, 0].tolist() for slot, length in enumerate(cache.lengths)]


def test_blocks_of_different_widths_go_behind_what_their_slots_hold() -> None:
    cache = new_cache(3)
    rows = written(cache, [[1], [2, 3, 4], [5, 6]])
    assert [row.tolist() for row in rows] == [[1, 0, 0], [2, 3, 4], [5, 6, 0]]
    written(cache, [[7, 8], [9], [10]])
    assert cache.lengths == [3, 4, 3]
    assert held(cache) == [[1, 7, 8], [2, 3, 4, 9], [5, 6, 10]]


def test_a_fork_begins_with_what_another_slot_holds_and_goes_its_own_way() -> None:
    cache = new_cache(2)
    written(cache, [[1, 2, 3], [4]])
    assert cache.fork(0, 2) == 2
    assert cache.lengths == [3, 1, 2]
    written(cache, [[5], [6], [7, 8]])
    assert held(cache) == [[1, 2, 3, 5], [4, 6], [1, 2, 7, 8]]
    # In the place of a longer one nothing of that one is left behind it.
    cache.leave(2)
    assert cache.fork(1, 1) == 2
    rows = written(cache, [[9], [10], [11]])
    assert [row.tolist() for row in rows] == [[1, 2, 3, 5, 9], [4, 6, 10, 0, 0], [4, 11, 0, 0, 0]]


def test_forks_grow_the_buffers() -> None:
    cache = new_cache(1, max_slots=40)
    written(cache, [[1, 2]])
    for _ in range(39):
        cache.fork(0, 2)
    assert held(cache) == [[1, 2]] * 40
    with pytest.raises(ValueError, match="all 40 slots are taken"):
        cache.fork(0, 1)


@pytest.mark.parametrize(("source", "length"), [(2, 1), (-1, 1), (0, 3)])
def test_a_fork_of_what_is_not_there_is_refused(source: int, length: int) -> None:
    cache = new_cache(2)
    written(cache, [[1, 2], [3]])
    with pytest.raises(ValueError, match="no active slot"):
        cache.fork(source, length)
    assert len(cache.lengths) == 2


def test_slots_that_follow_each_other_are_a_view_and_others_a_copy() -> None:
    cache = new_cache(4)
    written(cache, [[1], [2], [3], [4]])
    start = cache.slot_layers[0].buffers[0].data_ptr()
    assert written(cache, [[5]] * 4)[0].data_ptr() == start
    capacity = cache.slot_layers[0].buffers[0].shape[2]
    rows = written(cache, [[6], [7]], active=[1, 2])
    assert rows[0].data_ptr() == start + 4 * capacity  # one slot of floats on
    rows = written(cache, [[8], [9]], active=[3, 0])
    assert [row.tolist() for row in rows] == [[4, 5, 8], [1, 5, 9]]
    assert held(cache) == [[1, 5, 9], [2, 5, 6], [3, 5, 7], [4, 5, 8]]


def test_a_rollback_moves_numbers_alone_and_the_next_pass_zeroes_what_it_left() -> None:
    cache = new_cache(2)
    written(cache, [[1, 2, 3, 4], [5, 6, 7, 8]])
    cache.rollback([1, 4])
    assert cache.slot_layers[0].buffers[0][0, 0, :4, 0].tolist() == [1, 2, 3, 4]
    rows = written(cache, [[9], [10]])
    assert [row.tolist() for row in rows] == [[1, 9, 0, 0, 0], [5, 6, 7, 8, 10]]


def test_only_backwards_and_all_slots_at_once() -> None:
    cache = new_cache(2)
    written(cache, [[1, 2], [3]])
    for lengths in ([3, 1], [2]):
        with pytest.raises(ValueError, match=r"cannot roll back \[2, 1\] positions"):
            cache.rollback(lengths)
    assert cache.lengths == [2, 1]


def test_the_last_slot_moves_into_the_hole() -> None:
    cache = new_cache(3)
    written(cache, [[1, 2, 3, 4], [5], [6, 7]])
    assert cache.leave(0) == 2
    assert held(cache) == [[6, 7], [5]]
    assert cache.leave(1) is None
    assert cache.lengths == [2]
    # The hole's former request is longer than the one that moved: its rest is zeroed, as is a new request's slot.
    cache.join()
    rows = written(cache, [[8], [9, 10, 11, 12]])
    assert [row.tolist() for row in rows] == [[6, 7, 8, 0], [9, 10, 11, 12]]
    with pytest.raises(ValueError, match="slot 2 is not among the 2 active ones"):
        cache.leave(2)


def test_states_of_several_requests_move_at_once() -> None:
    cache = new_cache(3)
    written(cache, [[1, 2, 3, 4], [5, 6, 7], [8, 9]])
    cache.move([0, 1], [3, 2], [1, 0])
    cache.rollback([2, 1, 2])
    assert held(cache) == [[1, 4], [7], [8, 9]]
    cache.move([], [], [])
    assert held(cache) == [[1, 4], [7], [8, 9]]


def test_buffers_grow_by_doubling_in_slots_and_positions_up_to_their_most() -> None:
    cache = new_cache(1, max_slots=5, max_tokens=600)
    known: list[list[float]] = [[]]
    shapes, numbers = [], iter(range(10_000))
    assert cache.nbytes() == 0
    for joins, width in ((0, 10), (1, 1), (1, 1), (0, 250), (1, 300), (1, 1)):
        for _ in range(joins):
            cache.join()
        requests = len(cache.lengths)
        before = [*known, *[[]] * joins]
        blocks = [[next(numbers) for _ in range(width if slot == 0 else 1)] for slot in range(requests)]
        written(cache, blocks)
        known = held(cache)
        assert known == [[*old, *new] for old, new in zip(before, blocks, strict=True)]
        shapes.append(tuple(cache.slot_layers[0].buffers[0].shape[::2]))
    assert shapes == [(1, 256), (2, 256), (4, 256), (4, 512), (4, 600), (5, 600)]
    # Keys and values, five slots, 600 positions, four bytes.
    assert cache.nbytes() == 2 * 5 * 600 * 4


def test_no_more_than_the_most_is_taken() -> None:
    cache = new_cache(2, max_slots=2, max_tokens=3)
    with pytest.raises(ValueError, match="all 2 slots are taken"):
        cache.join()
    with pytest.raises(ValueError, match="4 positions of a request do not fit in 3"):
        written(cache, [[1], [1, 2, 3, 4]])
    assert cache.lengths == [0, 0]


def test_blocks_and_slots_that_do_not_agree_are_refused() -> None:
    cache = new_cache(2)
    for widths, active, message in (
        ([1], None, "2 slots cannot take blocks of"),
        ([1, 0], None, "2 slots cannot take blocks of"),
        ([1, 1], [0, 0], "are not 2 of the 2 active ones"),
        ([1], [2], "are not 1 of the 2 active ones"),
        ([], [], "0 slots cannot take blocks of"),
    ):
        with pytest.raises(ValueError, match=message), cache.placed(widths, active=active, device=CPU):
            pass


def test_a_slot_cache_is_for_ragged_passes_alone() -> None:
    states = torch.zeros(1, 1, 1, 1)
    with pytest.raises(AssertionError, match="a ragged pass alone"):
        new_cache(1).update(states, states, 0)


def test_a_pass_that_failed_half_way_counts_as_written() -> None:
    cache = new_cache(1)
    states = torch.tensor([1.0, 2.0, 3.0])[None, None, :, None]
    with pytest.raises(RuntimeError, match="stop"), cache.placed([3], active=None, device=CPU):
        cache.update(states, states, 0)
        raise RuntimeError("stop")
    assert cache.lengths == [0]
    written(cache, [[4]])
    assert cache.slot_layers[0].buffers[0][0, 0, :4, 0].tolist() == [4, 0, 0, 0]


def test_indices_are_those_of_a_loop_over_blocks() -> None:
    cache = new_cache(3)
    written(cache, [[0] * 5, [0] * 2, [0] * 9])
    cache.rollback([1, 2, 3])
    with cache.placed([2, 1, 3], active=[2, 0, 1], device=CPU) as placement:
        assert isinstance(placement, Placement)
        assert placement.block.tolist() == [0, 0, 1, 2, 2, 2]
        assert placement.rows.tolist() == [2, 2, 0, 1, 1, 1]
        assert placement.columns.tolist() == [3, 4, 1, 2, 3, 4]
        stale = [*zip(placement.stale_rows.tolist(), placement.stale_columns.tolist(), strict=True)]
        assert stale == [(2, 5), (2, 6), (2, 7), (2, 8), (0, 2), (0, 3), (0, 4)]
        assert placement.longest == 5


def test_any_history_leaves_what_a_list_per_request_would_hold_and_zeros_behind_it() -> None:
    rng, cache, lists = random.Random(0), new_cache(0, max_slots=6, max_tokens=600), list[list[float]]()
    for _ in range(300):
        while len(lists) < 6 and (not lists or rng.random() < 0.4):
            cache.join()
            lists.append([])
        if rng.random() < 0.2:
            slot = rng.randrange(len(lists))
            moved = cache.leave(slot)
            last = lists.pop()
            assert moved == (None if slot == len(lists) else len(lists))
            if moved is not None:
                lists[slot] = last
        if not lists:
            continue
        active = rng.sample(range(len(lists)), rng.randint(1, len(lists)))
        blocks = [[rng.random() + 1 for _ in range(rng.choice((1, 3, 30)))] for _ in active]
        written(cache, blocks, active=active)
        for slot, block in zip(active, blocks, strict=True):
            lists[slot] += torch.tensor(block).tolist()
        keys = cache.slot_layers[0].buffers[0][:, 0, :, 0]
        for slot in active:
            assert keys[slot].tolist() == lists[slot] + [0.0] * (keys.shape[1] - len(lists[slot]))
        assert held(cache) == lists
        for slot, numbers in enumerate(lists):
            keep = rng.randint(0, len(numbers)) if len(numbers) > 500 else len(numbers) - rng.randint(0, 2)
            lists[slot] = numbers[: max(0, keep)]
        cache.rollback([len(numbers) for numbers in lists])


def test_the_cache_of_a_model_has_its_layers_and_its_context() -> None:
    model = family_model("llama")
    cache = SlotCache.for_config(model.model.config, max_slots=3)
    assert len(cache.slot_layers) == 2
    assert cache.get_max_length() == model.context_limit
