"""Loading a model folder: what is refused, what cutting layers does, and that the head gives the model's own logits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.errors import InputError
from inference.layers import decoder_layers, evenly_kept_layers, keep_layers
from inference.loading import check_model_folder, load_causal_model
from inference.model import CausalModel, load_tokenizer
from tests.inference.families import VOCAB, family_model
from tests.pipelines.tiny import write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("whole"))


def _load(folder: Path) -> CausalModel:
    return load_causal_model(folder, precision="fp32", device=CPU)


def _without_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _with_config(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "config.json").write_text(text, encoding="utf-8")

    return damage


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(length: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:length])

    return damage


def _scrambled_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(bytes(content))


def _list_as_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")


def _entry_without_offsets(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32"}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def _edit(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan


def _infinity(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = torch.inf


def _missing_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.2.mlp.up_proj.weight"]


def _wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(7)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (_without_folder, "no such model folder"),
    "no configuration": (_without_config, "no config.json here"),
    "configuration is no JSON": (_with_config("{"), "config.json is off"),
    "configuration is a list": (_with_config("[]"), "config.json is off"),
    "configuration is binary": (_with_config("\x00\x01"), "config.json is off"),
    "configuration without a type": (_with_config("{}"), "config.json is off"),
    "configuration of an unknown type": (_with_config('{"model_type": "wizard"}'), "config.json is off"),
    "pickled weights only": (_without_weights, "no safetensors weights here"),
    "empty weights": (_cut(0), "model.safetensors"),
    "cut in the prefix": (_cut(5), "model.safetensors"),
    "cut in the header": (_cut(200), "truncated weights: 200 bytes"),
    "cut by one byte": (_cut(-1), "truncated weights"),
    "scrambled header": (_scrambled_header, "not a safetensors file"),
    "header is a list": (_list_as_header, "not a safetensors file"),
    "header without offsets": (_entry_without_offsets, "not a safetensors file"),
    "NaN": (_edit(_nan), "NaN or infinite weights in model.layers.1.mlp.up_proj.weight"),
    "infinity": (_edit(_infinity), "NaN or infinite weights in model.norm.weight"),
    "a tensor is missing": (
        _edit(_missing_tensor),
        "the weights lack 1 tensors, for example model.layers.2.mlp.up_proj.weight",
    ),
    "a tensor of another shape": (_edit(_wrong_shape), "cannot load the model"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(whole: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        _load(folder)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line


def test_a_whole_folder_passes(whole: Path) -> None:
    check_model_folder(whole)
    model = _load(whole)
    assert (model.folder, model.precision, model.device) == (whole, "fp32", CPU)
    assert not model.model.training


def test_a_folder_without_a_tokenizer_is_refused(whole: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(whole / name, tmp_path / name)
    with pytest.raises(InputError, match="cannot load a tokenizer") as caught:
        _ = _load(tmp_path).tokenizer
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "{}", "null", '{"model": {"type": "wizard"}}'])
def test_a_malformed_tokenizer_is_refused(whole: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="cannot load a tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_model_made_in_memory_has_no_tokenizer() -> None:
    with pytest.raises(InputError, match="this model has no folder and so no tokenizer"):
        _ = family_model("llama").tokenizer


@pytest.mark.parametrize(
    ("layers", "kept", "expected"),
    [
        (30, 4, [0, 10, 19, 29]),
        (12, 2, [0, 11]),
        (12, 1, [0]),
        (5, 5, [0, 1, 2, 3, 4]),
        (7, 3, [0, 3, 6]),
    ],
)
def test_kept_layers_are_even_and_hold_first_and_last(layers: int, kept: int, expected: list[int]) -> None:
    assert evenly_kept_layers(layers, kept) == expected


def test_kept_layers_are_distinct_for_every_choice() -> None:
    for layers in range(1, 33):
        for kept in range(1, layers + 1):
            chosen = evenly_kept_layers(layers, kept)
            assert chosen == sorted(set(chosen)) and len(chosen) == kept


@pytest.mark.parametrize("kept", [0, 5])
def test_more_or_fewer_layers_than_there_are_cannot_be_kept(kept: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {kept} of 4 layers"):
        evenly_kept_layers(4, kept)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "phi"])
def test_a_model_cut_to_some_layers_is_the_model_with_the_others_skipped(name: str) -> None:
    types: dict[str, Any] = (
        {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "gemma3_text" else {}
    )
    model, reference = (family_model(name, num_hidden_layers=4, **types) for _ in range(2))
    # The reference runs all four layers, with the outputs of two put aside.
    for index in (1, 3):
        decoder_layers(reference.model)[index].register_forward_hook(
            lambda module, inputs, output: inputs[0] if torch.is_tensor(output) else (inputs[0], *output[1:])
        )
    keep_layers(model.model, [0, 2])
    tokens = torch.arange(20)
    expected = reference.logits(tokens, reference.new_cache(), num_rows=20)
    cache = model.new_cache()
    first = model.logits(tokens[:12], cache, num_rows=12)
    second = model.logits(tokens[12:], cache, num_rows=8)
    torch.testing.assert_close(torch.cat([first, second]), expected)
    assert model.model.config.num_hidden_layers == 2


def test_a_cut_model_keeps_the_kinds_of_its_layers_when_saved(tmp_path: Path) -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = family_model("gemma3_text", num_hidden_layers=4, layer_types=types)
    keep_layers(model.model, [1, 2])
    assert model.model.config.layer_types == ["sliding_attention", "full_attention"]
    model.model.float().save_pretrained(tmp_path)
    tokens = torch.arange(20)
    again = _load(tmp_path)
    torch.testing.assert_close(
        again.logits(tokens, again.new_cache(), num_rows=20), model.logits(tokens, model.new_cache(), num_rows=20)
    )


@pytest.mark.parametrize(
    ("kept", "message"), [([0, 2], "cannot keep layer 2 of 2"), ([-1], "layer -1 of 2"), ([], "no layer")]
)
def test_layers_the_model_does_not_have_cannot_be_kept(kept: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        keep_layers(family_model("llama").model, kept)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "gemma3_text", "gemma2", "granite", "cohere", "gpt_neox", "phi", "gpt2"]
)
def test_the_head_gives_the_models_own_logits(name: str) -> None:
    model = family_model(name)
    tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), model.captured_states() as captured:
        logits = model.model(input_ids=tokens, use_cache=False).logits
    with torch.inference_mode():
        torch.testing.assert_close(model.head(model.states(tokens)), logits)
        torch.testing.assert_close(model.head(captured[0]), logits)


def test_captured_states_stop_with_the_block() -> None:
    model = family_model("llama")
    with model.captured_states() as captured:
        model.logits(torch.arange(4), model.new_cache(), num_rows=2)
    model.logits(torch.arange(4), model.new_cache(), num_rows=2)
    # Every position fed, also those that never reach the head.
    assert [tuple(states.shape) for states in captured] == [(1, 4, 32)]


def test_states_ignore_padding_on_the_right() -> None:
    model = family_model("llama")
    tokens = torch.tensor([[5, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.inference_mode():
        torch.testing.assert_close(model.states(tokens, mask=mask)[:, :3], model.states(tokens[:, :3]))


def test_only_the_asked_rows_come_back() -> None:
    model, tokens = family_model("llama"), torch.arange(9)
    rows = model.logits(tokens, model.new_cache(), num_rows=9)
    torch.testing.assert_close(model.logits(tokens, model.new_cache(), num_rows=2), rows[-2:])
