"""Lean layers give what the family's own give, are refused where they would not, and leave training alone."""

import pytest
import torch

from inference.layers import decoder_layers
from inference.lean import lean_layers, use_lean_layers, use_plain_layers
from inference.model import CausalModel
from tests.inference.families import FAMILIES, VOCAB, family_model

COMMON = ("llama", "qwen2", "qwen3")


def passes(model: CausalModel) -> list[torch.Tensor]:
    """Logits of a prompt, a block behind it, and a block after a rollback."""
    tokens = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(1))
    cache, found = model.new_cache(), []
    for count in (12, 1, 5):
        found.append(model.logits(tokens[cache.length : cache.length + count], cache, num_rows=count))
    cache.rollback(13)
    found.append(model.logits(tokens[20:24], cache, num_rows=4))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_lean_layers_give_what_the_familys_own_give(family: str) -> None:
    model = family_model(family)
    use_plain_layers(model.model)
    wanted = passes(model)
    count = use_lean_layers(model.model)
    assert (count > 0) >= (family in COMMON)
    for given, own in zip(passes(model), wanted, strict=True):
        torch.testing.assert_close(given, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in COMMON if name in FAMILIES])
def test_joined_weights_change_nothing(family: str) -> None:
    model = family_model(family)
    use_lean_layers(model.model)
    wanted = passes(model)
    layers = lean_layers(model.model)
    assert layers is not None
    held = sum(parameter.numel() for parameter in model.model.parameters())
    for layer in layers:
        layer.join_weights()
    assert sum(parameter.numel() for parameter in model.model.parameters()) == held
    # A second time would leave who has captured the products with tensors that nobody holds.
    places = [parameter.data_ptr() for parameter in model.model.parameters()]
    for layer in layers:
        layer.join_weights()
    assert [parameter.data_ptr() for parameter in model.model.parameters()] == places
    for given, own in zip(passes(model), wanted, strict=True):
        torch.testing.assert_close(given, own, rtol=1e-5, atol=1e-5)


def test_a_layer_that_does_more_keeps_its_own_forward() -> None:
    model = family_model("llama")
    use_plain_layers(model.model)
    layer = decoder_layers(model.model)[1]
    plain = layer.forward

    def doubled(*states: torch.Tensor, **options: object) -> torch.Tensor:
        result: torch.Tensor = plain(*states, **options) * 1.01
        return result

    layer.forward = doubled
    assert use_lean_layers(model.model) == len(decoder_layers(model.model)) - 1
    assert layer.forward is doubled
    assert lean_layers(model.model) is None


def test_gradients_take_the_layers_own_forward() -> None:
    model = family_model("llama")
    use_plain_layers(model.model)
    tokens = torch.arange(6)[None]

    def gradients() -> list[torch.Tensor]:
        model.model.zero_grad()
        model.model(input_ids=tokens, labels=tokens).loss.backward()
        return [parameter.grad.clone() for parameter in model.model.parameters() if parameter.grad is not None]

    wanted = gradients()
    assert wanted
    use_lean_layers(model.model)
    for given, own in zip(gradients(), wanted, strict=True):
        assert torch.equal(given, own)


def test_hooks_on_layers_see_the_states() -> None:
    model = family_model("llama")
    use_lean_layers(model.model)
    tokens = torch.arange(5)
    with model.tapped([-1, 0, 1]) as features:
        model.logits(tokens, model.new_cache(), num_rows=1)
        lean = features.take()
    use_plain_layers(model.model)
    with model.tapped([-1, 0, 1]) as features:
        model.logits(tokens, model.new_cache(), num_rows=1)
        torch.testing.assert_close(lean, features.take(), rtol=1e-5, atol=1e-5)


def test_a_part_that_is_replaced_is_used() -> None:
    model = family_model("llama")
    use_lean_layers(model.model)
    before = passes(model)
    attention = decoder_layers(model.model)[0].get_submodule("self_attn")
    own = attention.get_submodule("o_proj")
    silent = torch.nn.Linear(own.in_features, own.out_features, bias=False).double()
    torch.nn.init.zeros_(silent.weight)
    attention.register_module("o_proj", silent)
    assert not torch.allclose(passes(model)[0], before[0])
    attention.register_module("o_proj", own)
    assert torch.equal(passes(model)[0], before[0])
