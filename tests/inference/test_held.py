"""Buffers of keys and values: what is written, kept and moved is what is read, and nothing else changes."""

import torch

from inference.graphed.held import Held

LAYERS, BATCH, CAPACITY, HEADS, DIM = 3, 2, 8, 2, 4


def held() -> Held:
    made = Held(
        LAYERS,
        batch=BATCH,
        capacity=CAPACITY,
        kv_heads=HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    made.states.copy_(torch.randn(made.states.shape, generator=torch.Generator().manual_seed(0)))
    return made


def test_tokens_are_written_into_one_layer_at_their_places() -> None:
    buffers = held()
    before = buffers.states.clone()
    keys, values = (
        torch.full((2, HEADS, 2, DIM), number) + torch.arange(2.0)[:, None, None, None] for number in (10.0, 20.0)
    )
    # Of the first request the tokens at 3 and 4, of the second those at 0 and 1.
    buffers.write(1, keys, values, torch.tensor([3, 4, CAPACITY, CAPACITY + 1]))
    for part, number in ((0, 10.0), (1, 20.0)):
        before[part, 1, 0, 3:5] = number
        before[part, 1, 1, 0:2] = number + 1
    assert torch.equal(buffers.states, before)
    read = buffers.of(1, shown=5)
    assert [tuple(states.shape) for states in read] == [(BATCH, 5, HEADS, DIM)] * 2
    assert torch.equal(read[1], before[1, 1, :, :5])


def test_what_is_kept_is_what_lay_there_before_in_all_layers() -> None:
    buffers = held()
    before = buffers.states.clone()
    # Places that are sources of others, too.
    buffers.keep(torch.tensor([2, 3, CAPACITY + 4]), torch.tensor([3, 5, CAPACITY + 7]))
    wanted = before.clone()
    wanted[:, :, 0, 2], wanted[:, :, 0, 3], wanted[:, :, 1, 4] = (
        before[:, :, 0, 3],
        before[:, :, 0, 5],
        before[:, :, 1, 7],
    )
    assert torch.equal(buffers.states, wanted)


def test_a_request_moves_with_its_first_positions() -> None:
    buffers = held()
    before = buffers.states.clone()
    buffers.move(0, 1, length=5)
    before[:, :, 1, :5] = before[:, :, 0, :5]
    assert torch.equal(buffers.states, before)
    assert buffers.nbytes() == 4 * 2 * LAYERS * BATCH * CAPACITY * HEADS * DIM
