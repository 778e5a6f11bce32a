"""A model loaded without its layers: embedding, norm and head are the whole one's, and the last layers where wanted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from inference.errors import InputError
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import make_network
from inference.layers import decoder_layers
from inference.loading import load_causal_model, load_ends
from tests.inference.families import FAMILIES, family_config

CPU = torch.device("cpu")


def written(folder: Path, family: str) -> Path:
    """A random target of a family, fp32, without a tokenizer."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(family_config(family)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("last_layers", [0, 1, 2, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_the_whole_models(family: str, last_layers: int, tmp_path: Path) -> None:
    folder = written(tmp_path, family)
    whole = load_causal_model(folder, precision="fp32", device=CPU)
    ends = load_ends(folder, precision="fp32", device=CPU, last_layers=last_layers)
    states = torch.randn(3, whole.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ends.head(states), whole.head(states), rtol=0, atol=0)
        ids = torch.arange(5)
        torch.testing.assert_close(ends.embedding(ids), whole.embedding(ids), rtol=0, atol=0)
    layers, wanted = decoder_layers(ends.model), decoder_layers(whole.model)
    assert len(layers) == len(wanted)  # the configuration says how many there are
    kept = min(last_layers, len(wanted))
    for index, (mine, own) in enumerate(zip(layers, wanted, strict=True)):
        if index < len(wanted) - kept:
            assert not list(mine.parameters())
        else:
            for (name, a), (other, b) in zip(mine.named_parameters(), own.named_parameters(), strict=True):
                assert name == other and torch.equal(a, b)
    assert ends.model.config.to_dict() == whole.model.config.to_dict()


def test_a_draft_started_from_it_is_that_of_the_whole_target(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    whole = load_causal_model(folder, precision="fp32", device=CPU)
    ends = load_ends(folder, precision="fp32", device=CPU, last_layers=Eagle3.layers_read or 0)
    made = [make_network(Eagle3(taps=[0, 1]), target, None, seed=3).state_dict() for target in (whole, ends)]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_weights_in_several_files_are_found(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    whole = load_causal_model(folder, precision="fp32", device=CPU)
    ends = load_ends(folder, precision="fp32", device=CPU, last_layers=1)
    mine, own = (dict(decoder_layers(model.model)[-1].named_parameters()) for model in (ends, whole))
    assert all(torch.equal(mine[name], own[name]) for name in own)


@pytest.mark.parametrize("damage", ["missing", "infinite"])
def test_a_damaged_last_layer_is_refused(damage: str, tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(tensors, reverse=True) if ".layers." in n)
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name].fill_(torch.inf)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = f"no tensor {name}" if damage == "missing" else "NaN or infinite weights"
    with pytest.raises(InputError, match=said):
        load_ends(folder, precision="fp32", device=CPU, last_layers=1)


def test_layers_that_are_not_there_cannot_run(tmp_path: Path) -> None:
    ends = load_ends(written(tmp_path, "llama"), precision="fp32", device=CPU, last_layers=1)
    with pytest.raises(RuntimeError, match="loaded without its layers"), torch.inference_mode():
        ends.states(torch.zeros(1, 3, dtype=torch.long))
