"""Parameter groups, option checks, and what the 8-bit optimizer says before training starts."""

import builtins
import logging
from typing import Any

import pytest
import torch
from torch import nn

from inference.plugins import plugins
from train.errors import TrainingError
from train.optimizers import adamw, adamw8bit
from train.optimizers._groups import parameter_groups


class Block(nn.Module):
    """One of each: embedding, matrix, bias, norm, a two-dimensional norm weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear, self.norm = nn.Embedding(4, 3), nn.Linear(3, 2), nn.LayerNorm(3)
        self.group_norm = nn.ParameterDict({"weight": nn.Parameter(torch.ones(2, 2))})


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    block = Block()
    names = {id(p): name for name, p in block.named_parameters()}
    decayed, rest = parameter_groups(block.named_parameters(), weight_decay=0.1)
    assert [names[id(p)] for p in decayed["params"]] == ["embedding.weight", "linear.weight"]
    assert {names[id(p)] for p in rest["params"]} == {
        "linear.bias", "norm.weight", "norm.bias", "group_norm.weight",
    }  # fmt: skip
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_empty_groups_are_left_out() -> None:
    assert len(parameter_groups([("w", nn.Parameter(torch.ones(2, 2)))], weight_decay=0.1)) == 1


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_decay_shrinks_matrices_and_leaves_biases_when_the_gradient_is_zero(kind: str) -> None:
    linear = nn.Linear(128, 64)
    before = linear.weight.detach().clone(), linear.bias.detach().clone()
    config = plugins("train.optimizers")[kind].Config(lr=0.1, weight_decay=0.5)
    optimizer = config.build(linear.named_parameters())
    linear.weight.grad, linear.bias.grad = torch.zeros_like(linear.weight), torch.zeros_like(linear.bias)
    optimizer.step()
    # decoupled decay: w <- w (1 - lr * decay) = 0.95 w
    torch.testing.assert_close(linear.weight.detach(), 0.95 * before[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(linear.bias.detach(), before[1], rtol=0, atol=0)


def test_every_optimizer_of_ours_is_tried_here() -> None:
    assert set(plugins("train.optimizers")) == {"adamw", "adamw8bit"}


def test_eight_bit_step_is_tried_before_training_and_touches_no_random_state(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(torch.zeros(64, 64))
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        adamw8bit.Config().build([("w", parameter)])
    assert torch.equal(torch.get_rng_state(), state)
    assert any("took a trial step on cpu" in message for message in caplog.messages)


def test_eight_bit_refusal_of_the_device_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.update_step", refuse)
    with pytest.raises(TrainingError, match=r"cannot take an 8-bit step: .*no kernel.*device cpu.*optimizer=adamw"):
        adamw8bit.Config().build([("w", nn.Parameter(torch.zeros(64, 64)))])


def test_eight_bit_step_that_does_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.update_step", lambda *_: None)
    with pytest.raises(TrainingError, match="left the weights as they were"):
        adamw8bit.Config().build([("w", nn.Parameter(torch.zeros(64, 64)))])


def test_missing_bitsandbytes_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TrainingError, match=r"needs the package bitsandbytes.*optimizer=adamw"):
        adamw8bit.Config().build([("w", nn.Parameter(torch.zeros(64, 64)))])


@pytest.mark.parametrize("make", [adamw.Config, adamw8bit.Config])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0: choose a number above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"eps": 0.0}, "eps is 0.0"),
    ],
)
def test_bad_options_are_named_with_a_remedy(make: Any, changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)
