"""Every conversation once an epoch, of similar length in a micro-batch, and the same whoever asks, in any order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.order import Order

COUNTS = st.integers(1, 40)
SIZES = st.integers(1, 7)
WINDOWS = st.integers(0, 5)


def _order(count: int, *, size: int, window: int, seed: int = 0) -> Order:
    lengths = np.random.default_rng(count).integers(1, 50, count)
    return Order(lengths, size=size, window=window, seed=seed)


@settings(max_examples=60, deadline=None)
@given(count=COUNTS, size=SIZES, window=WINDOWS, seed=st.integers(0, 5))
def test_every_epoch_holds_everything_once(count: int, size: int, window: int, seed: int) -> None:
    order = _order(count, size=size, window=window, seed=seed)
    # `size` epochs are `count` micro-batches, so the stream comes out even.
    stream = [place for index in range(count) for place in order.micro_batch(index)]
    for epoch in range(size):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(max_examples=60, deadline=None)
@given(count=COUNTS, size=SIZES, window=WINDOWS, ranks=st.integers(1, 4))
def test_no_two_processes_learn_from_the_same_conversation_in_an_epoch(
    count: int, size: int, window: int, ranks: int
) -> None:
    order = _order(count, size=size, window=window)
    whole = count // size
    # Process r takes micro-batches r, r + ranks, ...
    mine = [{p for i in range(rank, whole, ranks) for p in order.micro_batch(i)} for rank in range(ranks)]
    assert sum(len(places) for places in mine) == whole * size == len(set().union(*mine))


def test_what_is_asked_for_again_in_another_order_is_the_same() -> None:
    indices = [11, 0, 3, 29, 3, 17]
    expected = [_order(23, size=4, window=3).micro_batch(index) for index in range(30)]
    order = _order(23, size=4, window=3)
    assert [order.micro_batch(index) for index in indices] == [expected[index] for index in indices]
    assert [_order(23, size=4, window=3, seed=1).micro_batch(index) for index in range(30)] != expected


def test_a_window_is_cut_into_micro_batches_of_similar_length_and_these_are_shuffled() -> None:
    # Lengths 0 to 63 in any order, all in one window: by length, each four of them are four numbers in a row.
    lengths = np.random.default_rng(0).permutation(64)
    order = Order(lengths, size=4, window=16, seed=0)
    found = [sorted(lengths[order.micro_batch(index)].tolist()) for index in range(16)]
    assert sorted(found) == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(16)]
    assert found != sorted(found)


def test_a_window_holds_what_was_drawn_for_it() -> None:
    plain, sorted_ = (_order(48, size=4, window=window) for window in (0, 3))
    for start in range(0, 12, 3):
        drawn, found = ([p for i in range(start, start + 3) for p in o.micro_batch(i)] for o in (plain, sorted_))
        assert drawn != found and sorted(drawn) == sorted(found)


def test_what_lies_across_the_end_of_an_epoch_is_as_drawn() -> None:
    # 10 conversations by four: micro-batches 2 (places 8 to 11) and 7 (28 to 31) lie across an end.
    plain, sorted_ = (_order(10, size=4, window=window) for window in (0, 9))
    for index in (2, 7):
        assert plain.micro_batch(index) == sorted_.micro_batch(index)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_without_a_window_an_epoch_is_a_seeded_permutation(epoch: int) -> None:
    order = _order(9, size=3, window=0, seed=2)
    drawn = torch.randperm(9, generator=torch.Generator().manual_seed(2 * 100_003 + epoch)).tolist()
    assert [p for i in range(3 * epoch, 3 * epoch + 3) for p in order.micro_batch(i)] == drawn


def test_sorting_saves_padding() -> None:
    lengths = np.random.default_rng(1).lognormal(5.0, 0.6, 512).astype(np.int64).clip(8, 512)

    def padding(window: int) -> float:
        order = Order(lengths, size=4, window=window, seed=0)
        widths = [lengths[order.micro_batch(index)].max() for index in range(128)]
        return 1.0 - float(lengths.sum()) / (4.0 * float(np.sum(widths)))

    assert padding(0) > 0.3
    assert padding(16) < 0.07
