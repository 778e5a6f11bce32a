"""Packed arithmetics give the plain model's numbers, share what was shared, and are counted in bytes."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from inference.loading import load_causal_model
from inference.precision import (
    PRECISIONS,
    BlockedLinear,
    PackedHalfLinear,
    RowsLinear,
    apply_precision,
    available_precisions,
    model_nbytes,
    storage_dtype,
)
from tests.inference.families import family_model
from tests.pipelines.tiny import write_model

CPU = torch.device("cpu")
PACKED = [p for p in ("fp32_packed", "fp16_packed", "bf16_packed", "packed_by_rows") if p in available_precisions(CPU)]
# fp16 keeps 11 bits of a weight; bf16 products are compared with those of plain bf16 weights, of 8 bits.
CLOSE = {"fp32_packed": 1e-5, "fp16_packed": 2e-3, "bf16_packed": 2e-2, "packed_by_rows": 2e-2}

# Of a weight; those by rows are held in both arithmetics.
BYTES = {"fp32_packed": 4, "fp16_packed": 2, "bf16_packed": 2, "packed_by_rows": 4}


def _linear(*, bias: bool) -> torch.nn.Linear:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return torch.nn.Linear(48, 40, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 33, 48)])
def test_a_packed_product_equals_the_plain_one(precision: str, bias: bool, shape: tuple[int, ...]) -> None:
    linear = _linear(bias=bias).to(storage_dtype(precision))
    packer = {"fp16_packed": PackedHalfLinear, "packed_by_rows": RowsLinear}.get(precision, BlockedLinear)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(storage_dtype(precision))
    with torch.inference_mode():
        expected, got = linear(x), packer(linear)(x)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=CLOSE[precision])


@pytest.mark.skipif("packed_by_rows" not in PACKED, reason="the processor has no bf16 products")
def test_few_rows_go_through_one_product_and_many_through_the_other() -> None:
    linear = _linear(bias=True)
    by_rows, half = RowsLinear(linear), PackedHalfLinear(linear)
    halved = torch.nn.Linear(48, 40).bfloat16()
    halved.load_state_dict(linear.state_dict())
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(by_rows(x[:8]), half(x[:8]))
        assert torch.equal(by_rows(x), BlockedLinear(halved)(x.bfloat16()).float())
        assert by_rows(x[None]).shape == (1, 9, 40)


def _tiny(*, tied: bool, precision: str = "fp32") -> PreTrainedModel:
    # Small weights: what is compared is rounding, and large logits would only scale it.
    model: PreTrainedModel = family_model("llama", initializer_range=0.05, tie_word_embeddings=tied).model
    return model.to(storage_dtype(precision))  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", PACKED)
def test_a_packed_model_gives_the_plain_models_logits(precision: str, tied: bool) -> None:
    tokens = torch.arange(10)[None]
    with torch.inference_mode():
        expected = _tiny(tied=tied, precision=precision)(input_ids=tokens).logits
        packed = _tiny(tied=tied, precision=precision)
        apply_precision(packed, precision)
        got = packed(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, rtol=0.0, atol=CLOSE[precision])


@pytest.mark.parametrize("precision", PACKED)
def test_linear_layers_that_share_a_weight_are_packed_once(precision: str) -> None:
    first, second, third = (_linear(bias=False).to(storage_dtype(precision)) for _ in range(3))
    second.weight = first.weight
    model = torch.nn.Sequential(first, second, third)
    apply_precision(model, precision)
    assert model[0] is model[1] and model[0] is not model[2]
    size = BYTES[precision]
    assert model_nbytes(model) == 2 * 48 * 40 * size


def _attention(precision: str) -> torch.nn.Module:
    """Queries, keys and values, as a layer of a model has them."""
    parts = torch.nn.Module()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        for name, width in (("v_proj", 16), ("q_proj", 40), ("k_proj", 16)):
            setattr(parts, name, torch.nn.Linear(48, width).to(storage_dtype(precision)))
    return parts


@pytest.mark.parametrize("precision", PACKED)
def test_layers_that_read_one_tensor_are_one_product(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = _attention(precision), _attention(precision)
    apply_precision(packed, precision)
    calls: list[int] = []
    shared = packed.q_proj.shared
    multiply = shared._multiply
    monkeypatch.setattr(shared, "_multiply", lambda x: calls.append(x.shape[0]) or multiply(x))
    source = torch.Generator().manual_seed(1)
    one, other = (torch.randn(n, 48, generator=source).to(storage_dtype(precision)) for n in (3, 5))
    size = BYTES[precision]
    # FBGEMM's biases lie in the packed weights, uncounted.
    biases = {"fp16_packed": 0, "packed_by_rows": 72 * 2}.get(precision, 72 * size)
    assert model_nbytes(packed) == 72 * 48 * size + biases

    def check(name: str, x: torch.Tensor) -> None:
        with torch.inference_mode():
            expected, got = plain.get_submodule(name)(x), packed.get_submodule(name)(x)
        torch.testing.assert_close(got, expected, rtol=0.0, atol=CLOSE[precision])

    for name in ("q_proj", "k_proj", "v_proj"):
        check(name, one)
    assert calls == [3], "one product for all three"
    # Whatever the order, what is asked anew or of another tensor is computed anew.
    for name, x in (("k_proj", one), ("k_proj", one), ("q_proj", other), ("v_proj", one), ("q_proj", one)):
        check(name, x)
    assert calls == [3, 3, 3, 5, 3]
    check("k_proj", one.clone())
    assert calls[-1] == 3 and len(calls) == 6


def test_bytes_of_a_plain_model_count_tied_weights_once() -> None:
    vocabulary = 48 * 32 * 4
    assert model_nbytes(_tiny(tied=False)) - model_nbytes(_tiny(tied=True)) == vocabulary


@pytest.mark.parametrize("precision", PACKED)
def test_bytes_of_a_packed_model_are_its_weights(precision: str) -> None:
    plain = _tiny(tied=False, precision=precision)
    linear = sum(4 * m.weight.numel() for m in plain.modules() if isinstance(m, torch.nn.Linear))
    before = model_nbytes(plain)
    apply_precision(plain, precision)
    assert before - model_nbytes(plain) == (linear // 2 if precision == "fp16_packed" else 0)


@pytest.mark.parametrize("precision", available_precisions(CPU))
def test_a_folder_loads_in_every_arithmetic_on_offer(tmp_path: Path, precision: str) -> None:
    folder = write_model(tmp_path / "model", layers=1)
    plain = load_causal_model(folder, precision="fp32", device=CPU)
    model = load_causal_model(folder, precision=precision, device=CPU)
    tokens = torch.arange(40, 52)
    expected, got = (m.logits(tokens, m.new_cache(), num_rows=12).float() for m in (plain, model))
    # bf16 keeps 8 bits: agreement is judged against the spread of the logits.
    coarse = storage_dtype(precision) == torch.bfloat16 or precision == "packed_by_rows"
    assert float((got - expected).abs().max() / expected.std()) < (0.2 if coarse else 0.02)
    # The head maps the very states it is given, whatever they were packed into.
    states = model.states(tokens[None])[0]
    torch.testing.assert_close(model.head(states).float(), got, rtol=0.0, atol=0.1 if coarse else 1e-4)


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match=f"unknown precision 'fp8'; choose one of {', '.join(PRECISIONS)}"):
        apply_precision(_tiny(tied=True), "fp8")


def test_every_precision_on_offer_has_a_storage_dtype() -> None:
    assert set(available_precisions(CPU)) <= set(PRECISIONS)
    assert available_precisions(torch.device("cuda")) == ["fp32", "bf16", "fp16"]
    assert storage_dtype("bf16") == storage_dtype("bf16_packed") == torch.bfloat16
    assert storage_dtype("fp16") == torch.float16
    assert {storage_dtype(p) for p in ("fp32", "fp32_packed", "fp16_packed")} == {torch.float32}


@pytest.mark.parametrize("instructions", [True, False])
def test_packed_bf16_is_on_offer_only_with_bf16_products(instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions)
    assert ("bf16_packed" in available_precisions(CPU)) == instructions
