"""Attention of groups without copies gives transformers' own numbers, and stands aside where it has nothing to add."""

from pathlib import Path

import pytest
import torch

from inference.attention import GROUPED, grouped_attention, use_grouped_attention
from inference.errors import InputError
from inference.loading import load_causal_model
from tests.inference.families import VOCAB, family_model

TOKENS = torch.randint(VOCAB, (20,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3_text", "gpt_neox", "phi", "gpt2"])
def test_the_logits_are_those_of_sdpa(name: str) -> None:
    model = family_model(name)
    model.model.set_attn_implementation("sdpa")
    rows = []
    for switched in (False, True):
        if switched:
            use_grouped_attention(model.model)
            assert model.model.config._attn_implementation == GROUPED
        cache = model.new_cache()
        rows.append([model.logits(part, cache, num_rows=part.shape[0]) for part in TOKENS.split([11, 4, 1, 4])])
    for plain, grouped in zip(*rows, strict=True):
        torch.testing.assert_close(grouped, plain, rtol=1e-12, atol=1e-12)


def test_a_padded_batch_is_masked_as_by_sdpa() -> None:
    model = family_model("llama")
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    states = []
    for implementation in ("sdpa", GROUPED):
        model.model.set_attn_implementation(implementation)
        states.append(model.states(TOKENS.reshape(2, 10), mask=mask)[mask.bool()])
    torch.testing.assert_close(states[1], states[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", ["causal", "additive", "none"])
@pytest.mark.parametrize("count", [1, 3, 16, 17])
@pytest.mark.parametrize("batch", [1, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_way_to_attend_gives_the_same_numbers(dtype: torch.dtype, batch: int, count: int, masked: str) -> None:
    source = torch.Generator().manual_seed(0)
    # As a cache hands them out: views of longer buffers.
    key, value = (torch.randn(batch, 2, 64, 8, generator=source).to(dtype)[:, :, :29] for _ in range(2))
    query = torch.randn(batch, count, 6, 8, generator=source).to(dtype).transpose(1, 2)
    seen = torch.ones(batch, 1, count, 29, dtype=torch.bool).tril(29 - count)
    seen[-1, :, :, :3] = False
    mask = None if masked == "none" else seen
    if masked == "additive":
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    if masked == "none" and count > 1:
        pytest.skip("without a mask several queries attend causally, which transformers' own function sees to")
    layer = torch.nn.Identity()
    layer.num_key_value_groups = 3
    got, _ = grouped_attention(layer, query, key, value, mask, scaling=0.3)
    scores = query.double() @ key.double().repeat_interleave(3, 1).transpose(2, 3) * 0.3
    if masked != "none":
        scores = scores.masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) @ value.double().repeat_interleave(3, 1)).transpose(1, 2)
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    assert got.shape == (batch, count, 6, 8) and got.is_contiguous()
    torch.testing.assert_close(got.double(), expected, rtol=close, atol=close)


def test_options_that_change_the_products_are_left_to_transformers() -> None:
    query, key = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 5, 8)
    mask = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="softcap"):
        grouped_attention(torch.nn.Identity(), query, key, key, mask, softcap=30.0)


def test_a_loaded_model_uses_it_and_its_configuration_does_not_say_so(tmp_path: Path) -> None:
    family_model("llama").model.save_pretrained(tmp_path)
    for attention, used in (("sdpa", GROUPED), ("eager", "eager")):
        model = load_causal_model(tmp_path, precision="fp32", device=torch.device("cpu"), attention=attention)
        assert model.model.config._attn_implementation == used
        assert GROUPED not in model.model.config.to_json_string()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3_text", "gpt_neox", "phi", "gpt2"])
def test_siblings_see_what_the_token_beside_them_sees(name: str) -> None:
    model = family_model(name)
    model.model.set_attn_implementation("sdpa")
    use_grouped_attention(model.model)
    assert model.takes_siblings
    # Long enough that the windows of those families that have them leave tokens out.
    context, chain, siblings, slots = TOKENS[:11], TOKENS[11:15], TOKENS[15:19], (0, 0, 1, 2)
    cache = model.new_cache()
    model.logits(context[:-1], cache, num_rows=1)
    block = torch.cat([context[-1:], chain[:3], siblings])
    rows = model.logits(block, cache, num_rows=8, slots=slots)

    def whole(*parts: torch.Tensor) -> torch.Tensor:
        return model.logits(torch.cat(parts), model.new_cache(), num_rows=1)[0]

    expected = [whole(context, chain[:k]) for k in range(4)]
    expected += [whole(context, chain[:slot], siblings[i : i + 1]) for i, slot in enumerate(slots)]
    torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-9, atol=1e-9)
    # The third sibling stands after one token of the chain: its states move there, and decoding goes on.
    cache.move(len(context) + 3 + 2, len(context) + 1)
    cache.rollback(len(context) + 2)
    following = model.logits(chain[3:], cache, num_rows=1)[0]
    torch.testing.assert_close(following, whole(context, chain[:1], siblings[2:3], chain[3:]), rtol=1e-9, atol=1e-9)


def test_only_a_model_with_our_masks_is_asked_about_siblings() -> None:
    model = family_model("llama")
    for implementation, takes in (("eager", False), ("sdpa", False), (GROUPED, True)):
        model.model.set_attn_implementation(implementation)
        assert model.takes_siblings is takes
    # Positions are this family's own affair.
    bloom = family_model("bloom")
    bloom.model.set_attn_implementation(GROUPED)
    assert not bloom.takes_siblings
    with pytest.raises(InputError, match="this target cannot be asked about siblings"):
        bloom.logits(TOKENS[:3], bloom.new_cache(), num_rows=3, slots=(0,))
