"""The public EAGLE-3 step, as it stands for what others run: what each unrolled step sees and is taught."""

import pytest
import torch

from pipelines.bench.public_eagle3 import STEP_DECAY, PublicEagle3, public_loss
from pipelines.bench.synthetic import VOCABULARY, tiny_model

LENGTH = 10
TAPS = [0, 1]


@pytest.fixture
def network() -> PublicEagle3:
    torch.manual_seed(0)
    embedding = tiny_model().model.get_input_embeddings()
    embedding.requires_grad_(False)
    return PublicEagle3(embedding, taps=len(TAPS), shape=(2, 1, 16, 64), vocabulary=VOCABULARY, theta=10_000.0)


def unrolled(network: PublicEagle3, tokens: torch.Tensor, hidden: torch.Tensor, steps: int) -> list[torch.Tensor]:
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    states = []
    for step in range(steps):
        hidden = network(tokens.roll(-1 - step, 1), hidden, kept, seen=seen)
        states.append(hidden)
    return states


def loss_of(network: PublicEagle3, mask: torch.Tensor, *, unroll: int) -> tuple[torch.Tensor, float]:
    tokens = torch.arange(LENGTH)[None] + 5
    target = tiny_model().model
    return public_loss(
        network,
        target,
        tokens=tokens,
        attention=torch.ones_like(tokens),
        mask=mask,
        taps=TAPS,
        vocabulary=torch.arange(VOCABULARY),
        unroll=unroll,
    )


@torch.no_grad()
def test_the_first_step_is_causal_and_later_ones_see_their_own_position_besides(network: PublicEagle3) -> None:
    tokens, hidden = torch.arange(LENGTH)[None], torch.randn(1, LENGTH, 32)
    changed = hidden.clone()
    changed[0, 6] += 1.0
    for before, after in zip(unrolled(network, tokens, hidden, 3), unrolled(network, tokens, changed, 3), strict=True):
        same = (before == after).all(-1)[0].tolist()
        assert same == [position < 6 for position in range(LENGTH)]


def test_supervised_positions_are_counted_once_for_every_step(network: PublicEagle3) -> None:
    mask = (torch.arange(LENGTH) >= 4)[None]
    # Step s supervises positions t with t + 2 + s among 4..9: 6, 6 and 6 of them, for steps 0, 1, 2 ...
    _, three = loss_of(network, mask, unroll=3)
    assert three == 18
    # ... and from step 3 on the first positions are already past the prompt: 5 are left.
    _, four = loss_of(network, mask, unroll=4)
    assert four == 23


def test_steps_weigh_less_and_less_and_the_target_learns_nothing(network: PublicEagle3) -> None:
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    one, _ = loss_of(network, mask, unroll=1)
    two, _ = loss_of(network, mask, unroll=2)
    # A new network is near uniform at every step, so each costs about log V.
    assert float(two.detach() - one.detach()) == pytest.approx(STEP_DECAY * float(one.detach()), rel=0.1)
    two.backward()
    assert network.embedding.get_parameter("weight").grad is None
    assert network.fc.weight.grad is not None and float(network.fc.weight.grad.abs().sum()) > 0


def test_where_the_targets_choice_is_unknown_nothing_is_learned(network: PublicEagle3) -> None:
    tokens = torch.arange(LENGTH)[None]
    target = tiny_model().model
    with torch.no_grad():
        likeliest = target(input_ids=tokens).logits.argmax(-1)[0, 1:]  # those that step 0 could learn
    others = torch.tensor([token for token in range(VOCABULARY) if token not in likeliest.tolist()])
    torch.manual_seed(0)
    narrow = PublicEagle3(network.embedding, taps=2, shape=(2, 1, 16, 64), vocabulary=len(others), theta=10_000.0)
    _, count = public_loss(
        narrow,
        target,
        tokens=tokens,
        attention=torch.ones_like(tokens),
        mask=torch.ones_like(tokens, dtype=torch.bool),
        taps=TAPS,
        vocabulary=others,
        unroll=2,
    )
    assert count == 0
