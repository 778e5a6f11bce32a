"""Every format gives back the draft it was made from, and every way to get one wrong is noticed."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference.errors import InputError
from inference.feature_networks import FeatureNetwork
from inference.model import CausalModel
from pipelines.exports.layouts._shared import CONFIG_FILE, WEIGHTS_FILE
from pipelines.exports.parity import TOLERANCE, block_gap
from pipelines.exports.source import Source
from pipelines.exports.write import layouts_for, write_layout
from tests.inference.families import family_model
from tests.pipelines.exports.conftest import DRAFTS, draft_for, source_of

TOKENS = torch.randint(250, (60,), generator=torch.Generator().manual_seed(3))
CASES = [(name, layout) for name, config in DRAFTS.items() for layout in layouts_for(config.kind)]


def written(source: Source, layout: str, folder: Path) -> Path:
    write_layout(layouts_for(source.kind)[layout], source, folder)
    return folder


def gap(network: FeatureNetwork, target: CausalModel, layout: str, folder: Path) -> float:
    rebuilt = layouts_for(network.config.kind)[layout].read(folder, target)
    return block_gap(network, rebuilt, target, TOKENS % target.vocab_size, where=layout)


@pytest.mark.parametrize("reduced", [False, True], ids=["whole", "reduced"])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_what_is_read_back_computes_what_was_written(
    target: CausalModel, tmp_path: Path, name: str, layout: str, reduced: bool
) -> None:
    network = draft_for(target, name, reduced=reduced)
    folder = written(source_of(network, target), layout, tmp_path / "export")
    assert gap(network, target, layout, folder) <= TOLERANCE


SCALED = [("spare", layout) for layout in layouts_for("dspark")]


@pytest.mark.parametrize(("name", "layout"), SCALED)
def test_an_embedding_scale_comes_along_and_its_loss_is_noticed(tmp_path: Path, name: str, layout: str) -> None:
    # gemma multiplies its embedding by sqrt(32) before the first layer.
    types = ["full_attention"] * 5
    target = family_model("gemma3_text", num_hidden_layers=5, layer_types=types)
    target.model.float()
    network = draft_for(target, name)
    folder = written(source_of(network, target), layout, tmp_path / "export")
    assert gap(network, target, layout, folder) <= TOLERANCE
    unscaled(folder, target)
    with pytest.raises(InputError, match="logits differ"):
        gap(network, target, layout, folder)


@pytest.mark.parametrize("layout", layouts_for("eagle3"))
def test_so_it_does_for_a_draft_that_norms_its_embedding(tmp_path: Path, layout: str) -> None:
    target = family_model("gemma3_text", num_hidden_layers=5, layer_types=["full_attention"] * 5)
    target.model.float()
    network = draft_for(target, "eagle3")
    folder = written(source_of(network, target), layout, tmp_path / "export")
    assert gap(network, target, layout, folder) <= TOLERANCE


def unscaled(folder: Path, target: CausalModel) -> None:
    """The fault: the embedding as the target stores it."""
    edit_tensors(folder, lambda t: t.update({"embed_tokens.weight": target.embedding.get_parameter("weight").detach()}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config)
    file.write_text(json.dumps(config), encoding="utf-8")


LAYER_KEYS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "target_layer_ids")


def off_by(shift: int, config: dict[str, Any]) -> None:
    """The fault: every layer id one higher or lower, wherever the format keeps them."""
    for place in (config, config.get("dflash_config", {}), config.get("eagle_config", {})):
        for key in LAYER_KEYS:
            if key in place:
                place[key] = [layer + shift for layer in place[key]]


def other_layout(config: dict[str, Any]) -> None:
    """The fault: the other of the two block layouts."""
    places = [p for p in (config, config.get("dflash_config", {})) if "sample_from_anchor" in p]
    for place in places or [config["dflash_config"]]:
        place["sample_from_anchor"] = not place.get("sample_from_anchor", False)


def other_layout_of_the_same_length(config: dict[str, Any]) -> None:
    """The same fault where the block is one slot longer or shorter, so that as many tokens are proposed."""
    other_layout(config)
    anchor_first = config.get("sample_from_anchor", config.get("dflash_config", {}).get("sample_from_anchor"))
    config["block_size"] += -1 if anchor_first else 1


def swapped_d2t(tensors: dict[str, Tensor]) -> None:
    """The fault: absolute ids where offsets belong, or the two of two tokens exchanged."""
    ids = torch.arange(tensors["d2t"].shape[0]) + tensors["d2t"]
    ids[[3, 8]] = ids[[8, 3]]
    tensors["d2t"] = ids - torch.arange(ids.shape[0])


def other_mask(config: dict[str, Any]) -> None:
    """The fault: another token stands for what is to come."""
    for place in (config, config.get("dflash_config", {})):
        if "mask_token_id" in place:
            place["mask_token_id"] = 7


BLOCKS = [(name, layout) for name, layout in CASES if name in ("dflash", "dspark", "dflash-token", "dspark-token")]
PLAIN = [(name, layout) for name, layout in CASES if name in ("eagle3", "dflash", "dspark")]


def faulty(target: CausalModel, folder: Path, name: str, layout: str, *, reduced: bool = False) -> FeatureNetwork:
    network = draft_for(target, name, reduced=reduced)
    written(source_of(network, target), layout, folder)
    return network


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize(("name", "layout"), PLAIN)
def test_layer_ids_off_by_one_are_noticed(
    target: CausalModel, tmp_path: Path, name: str, layout: str, shift: int
) -> None:
    network = faulty(target, tmp_path / "export", name, layout)
    edit_config(tmp_path / "export", partial(off_by, shift))
    with pytest.raises(InputError, match="logits differ"):
        gap(network, target, layout, tmp_path / "export")


@pytest.mark.parametrize("place", ["top", "inner"])
def test_layer_ids_off_by_one_in_the_place_of_one_engine_are_noticed(
    target: CausalModel, tmp_path: Path, place: str
) -> None:
    network = faulty(target, tmp_path / "export", "eagle3", "eagle3")
    edit_config(tmp_path / "export", lambda c: off_by(1, c if place == "top" else c["eagle_config"]))
    edit_config(tmp_path / "export", lambda c: off_by(-1, c["eagle_config"]) if place == "top" else None)
    with pytest.raises(InputError, match="one higher than inside eagle_config"):
        gap(network, target, "eagle3", tmp_path / "export")


@pytest.mark.parametrize(("name", "layout"), BLOCKS)
def test_the_wrong_block_layout_is_noticed(target: CausalModel, tmp_path: Path, name: str, layout: str) -> None:
    network = faulty(target, tmp_path / "export", name, layout)
    edit_config(tmp_path / "export", other_layout)
    with pytest.raises(InputError, match="another block layout"):
        gap(network, target, layout, tmp_path / "export")


@pytest.mark.parametrize(("name", "layout"), BLOCKS)
def test_the_wrong_block_layout_of_the_right_length_is_noticed(
    target: CausalModel, tmp_path: Path, name: str, layout: str
) -> None:
    network = faulty(target, tmp_path / "export", name, layout)
    edit_config(tmp_path / "export", other_layout_of_the_same_length)
    with pytest.raises(InputError, match=r"differ"):
        gap(network, target, layout, tmp_path / "export")


@pytest.mark.parametrize(("name", "layout"), BLOCKS)
def test_another_mask_token_is_noticed(target: CausalModel, tmp_path: Path, name: str, layout: str) -> None:
    network = faulty(target, tmp_path / "export", name, layout)
    edit_config(tmp_path / "export", other_mask)
    with pytest.raises(InputError, match="logits differ"):
        gap(network, target, layout, tmp_path / "export")


@pytest.mark.parametrize(("name", "layout"), PLAIN)
def test_a_swapped_d2t_is_noticed(target: CausalModel, tmp_path: Path, name: str, layout: str) -> None:
    network = faulty(target, tmp_path / "export", name, layout, reduced=True)
    edit_tensors(tmp_path / "export", swapped_d2t)
    with pytest.raises(InputError, match="logits differ"):
        gap(network, target, layout, tmp_path / "export")


@pytest.mark.parametrize(("name", "layout"), PLAIN)
def test_absolute_ids_in_d2t_are_noticed(target: CausalModel, tmp_path: Path, name: str, layout: str) -> None:
    network = faulty(target, tmp_path / "export", name, layout, reduced=True)
    ids = network.vocabulary
    edit_tensors(tmp_path / "export", lambda t: t.update({"d2t": ids}))
    with pytest.raises(InputError, match="d2t names tokens"):
        gap(network, target, layout, tmp_path / "export")


@pytest.mark.parametrize(("name", "layout"), PLAIN)
def test_a_renamed_tensor_is_noticed(target: CausalModel, tmp_path: Path, name: str, layout: str) -> None:
    network = faulty(target, tmp_path / "export", name, layout)
    edit_tensors(tmp_path / "export", lambda t: t.update({"fusion.weight": t.pop("fc.weight")}))
    with pytest.raises(InputError, match=r"no tensor fc\.weight"):
        gap(network, target, layout, tmp_path / "export")


@pytest.mark.parametrize(("name", "layout"), PLAIN)
def test_a_tensor_nobody_reads_is_noticed(target: CausalModel, tmp_path: Path, name: str, layout: str) -> None:
    network = faulty(target, tmp_path / "export", name, layout)
    edit_tensors(tmp_path / "export", lambda t: t.update({"extra.weight": torch.ones(2)}))
    with pytest.raises(InputError, match=r"nobody reads: extra\.weight"):
        gap(network, target, layout, tmp_path / "export")


@pytest.mark.parametrize(("name", "layout"), PLAIN)
def test_truncated_weights_are_one_line(target: CausalModel, tmp_path: Path, name: str, layout: str) -> None:
    network = faulty(target, tmp_path / "export", name, layout)
    file = tmp_path / "export" / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="unreadable export"):
        gap(network, target, layout, tmp_path / "export")


@pytest.mark.parametrize("layout", ["eagle3", "eagle3_speculators"])
def test_the_residual_of_another_training_is_refused(target: CausalModel, tmp_path: Path, layout: str) -> None:
    network = faulty(target, tmp_path / "export", "eagle3", layout)
    edit_config(tmp_path / "export", lambda c: c.update(norm_before_residual=True))
    with pytest.raises(InputError, match="before its norm"):
        gap(network, target, layout, tmp_path / "export")


def test_a_lost_rotary_base_is_noticed(target: CausalModel, tmp_path: Path) -> None:
    network = faulty(target, tmp_path / "export", "eagle3", "eagle3")
    edit_config(tmp_path / "export", lambda c: c.update(rope_theta=77.0, rope_parameters=None))
    with pytest.raises(InputError, match="logits differ"):
        gap(network, target, "eagle3", tmp_path / "export")


def test_a_configuration_without_a_key_is_one_line(target: CausalModel, tmp_path: Path) -> None:
    network = faulty(target, tmp_path / "export", "dspark", "dspark")
    edit_config(tmp_path / "export", lambda c: c.pop("markov_rank"))
    with pytest.raises(InputError, match=r"configuration does not fit: KeyError 'markov_rank'"):
        gap(network, target, "dspark", tmp_path / "export")


# What engines are told


def engines(source: Source, layout: str) -> dict[str, str]:
    """Why each engine refuses a draft, by engine; empty where it does not."""
    found = layouts_for(source.kind)[layout].ENGINES
    return {e.name: e.refuses(source) if callable(e.refuses) else e.refuses for e in found}


def test_engines_refuse_what_they_have_no_place_for(target: CausalModel) -> None:
    learned = engines(source_of(draft_for(target, "dspark"), target), "dspark")
    token = engines(source_of(draft_for(target, "dspark-token"), target), "dspark")
    reduced = engines(source_of(draft_for(target, "dspark-token", reduced=True), target), "dspark")
    gated = engines(source_of(draft_for(target, "dspark-gated"), target), "dspark")
    assert "learned mask" in learned["sglang"] and not learned["vllm"] and not learned["llama.cpp"]
    assert token == {"vllm": "", "sglang": "", "llama.cpp": ""}
    assert "table of draft tokens" in reduced["sglang"] and not reduced["vllm"]
    assert "plain sequential head" in gated["vllm"] and "plain sequential head" in gated["llama.cpp"]


def test_a_draft_with_the_targets_tables_does_not_carry_them(target: CausalModel, tmp_path: Path) -> None:
    folder = written(source_of(draft_for(target, "dspark-token"), target), "dspark", tmp_path / "export")
    names = set(load_file(folder / WEIGHTS_FILE))
    assert not names & {"embed_tokens.weight", "lm_head.weight", "d2t", "mask_embedding"}


def test_layer_ids_and_blocks_are_written_by_each_formats_own_count(target: CausalModel, tmp_path: Path) -> None:
    def config(name: str, layout: str) -> dict[str, Any]:
        folder = tmp_path / name / layout
        if not folder.is_dir():
            written(source_of(draft_for(target, name), target), layout, folder)
        found: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return found

    # Taps [1, 2] of DSpark, [1, 3] of DFlash and [1, 2, 3] of EAGLE-3 are decoder indices; aux ids count one higher.
    assert config("dspark", "dspark")["target_layer_ids"] == [1, 2]
    assert config("dspark", "dspark_speculators")["aux_hidden_state_layer_ids"] == [2, 3]
    assert config("dflash", "dflash")["dflash_config"]["target_layer_ids"] == [1, 3]
    assert config("eagle3", "eagle3")["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]
    # Inside eagle_config SGLang adds one itself.
    assert config("eagle3", "eagle3")["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    # Three tokens a round: three slots where the anchor's predicts, four where it does not.
    assert config("dspark", "dspark_specforge")["block_size"] == 3
    assert config("dflash", "dflash_speculators")["block_size"] == 4
