"""A feature network on disk: `config.json` (flat keys of DSpark checkpoints, our `kind` beside them) and
`model.safetensors` with the trained tensors. What they compute is the business of the kinds.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from inference.errors import InputError, first_line
from inference.feature_drafts import TRAINING, FeatureDraftConfig
from inference.feature_networks import FeatureNetwork
from inference.feature_networks._layers import DraftShape
from inference.model import CausalModel
from inference.plugins import plugin
from inference.precision import apply_precision, storage_dtype

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def save_network(network: FeatureNetwork, folder: Path, *, target_folder: Path | None = None) -> None:
    """Write `config.json` and `model.safetensors` (bf16; token ids as int64).

    Args:
        network: to be written.
        folder: made where it is missing.
        target_folder: the target's files, whose tokens are noted for `misfit`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = network.own_tensors()
    tensors = {
        name: tensor.detach().to(torch.bfloat16 if tensor.is_floating_point() else tensor.dtype).cpu().contiguous()
        for name, tensor in own.items()
    }
    if network.vocabulary is not None:
        ids = network.vocabulary.cpu()
        known = torch.zeros(network.shape.vocab, dtype=torch.bool)
        known[ids] = True
        # Field's convention: target id = draft id + d2t[draft id].
        tensors |= {"d2t": ids - torch.arange(ids.shape[0]), "t2d": known}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    shape, config = network.shape, network.config
    text = {
        "kind": config.kind,
        "settings": asdict(config),
        "shape": asdict(shape),
        "target_layer_ids": network.taps,
        "num_target_layers": shape.target_layers,
        "vocab_size": shape.vocab,
        "draft_vocab_size": shape.vocab if network.vocabulary is None else network.vocabulary.shape[0],
        "block_size": network.block,
        "dtype": "bfloat16",
        "vocabulary_sha256": vocabulary_digest(target_folder) if target_folder else "",
    }
    (folder / CONFIG_FILE).write_text(json.dumps(text, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_network(folder: Path, target: CausalModel, *, precision: str, trained_on: bool = False) -> FeatureNetwork:
    """Read a network and bind it to its target.

    Args:
        folder: written by `save_network`.
        target: the target it was made for.
        precision: see `inference.precision`.
        trained_on: leave its parameters in training.

    Raises:
        InputError: files missing, truncated or of another shape than the target's.
    """
    try:
        text = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
        config: FeatureDraftConfig = plugin("inference.feature_drafts", str(text["kind"])).Config(**text["settings"])
        shape, taps = DraftShape(**text["shape"]), [int(tap) for tap in text["target_layer_ids"]]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"unreadable draft: {first_line(error)}", where=str(folder), mend="build the draft again"
        ) from None
    wanted = DraftShape.of(target.model.config)
    if shape != wanted:
        raise InputError(
            f"the draft was made for a target of shape {shape}, this one has {wanted}",
            where=str(folder),
            mend="use the draft's own target, or build a draft for this one",
        )
    vocabulary = None
    if "d2t" in tensors:
        vocabulary = tensors.pop("d2t") + torch.arange(int(text["draft_vocab_size"]))
        tensors.pop("t2d", None)
    network = config.build(shape, taps, vocabulary)
    try:
        missing, unexpected = network.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
        wrong = [*unexpected, *(name for name in missing if name in network.own_tensors())]
        if wrong:
            raise RuntimeError(f"{wrong[0]} is missing or not of this kind")
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the draft's tensors do not fit: {reason}", where=str(folder), mend="build it again"
        ) from None
    for name, tensor in network.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"NaN or infinite weights in {name}", where=str(folder), mend="build the draft again")
    network.to(target.device)
    if not trained_on:
        network.eval().requires_grad_(False)
    network.bind(target)
    put_into(network, precision)
    return network


def put_into(network: FeatureNetwork, precision: str) -> None:
    """Put a network that was loaded in fp32 into an arithmetic, in place."""
    if storage_dtype(precision) != torch.float32:
        network.to(storage_dtype(precision))
    apply_precision(network, precision)


def go_on_from(folder: Path, target: CausalModel, config: FeatureDraftConfig) -> FeatureNetwork:
    """A network to train on, in fp32: what it is comes from its folder, how it is trained from `config`.

    Args:
        folder: written by `save_network`.
        target: the teacher.
        config: settings of the training to come.

    Raises:
        InputError: the folder cannot be read, does not fit the target, or holds a draft of another kind.
    """
    network = load_network(folder, target, precision="fp32", trained_on=True)
    if network.config.kind != config.kind:
        raise InputError(
            f"training of {config.kind} cannot start from a draft of kind {network.config.kind}",
            where="start_from",
            mend=f"name a draft of kind {config.kind}",
        )
    # The target may have been trained since: its head is what the draft borrows.
    network.bind(target, copy_head=True)
    network.config = replace(network.config, **{name: getattr(config, name) for name in TRAINING})
    return network


def taps_of(folder: Path) -> list[int]:
    """The target layers that a saved network reads; none where the folder cannot be read."""
    try:
        text = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return [int(tap) for tap in text["target_layer_ids"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # who loads it says what is wrong


def misfit(folder: Path, target_folder: Path) -> str:
    """Why a draft's folder was made for another kind of target than this; empty when nothing speaks against it.

    The target's own weights may be others: they decide how well a draft fits, not whether.
    """
    try:
        text = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        shape, vocabulary = text["shape"], text.get("vocabulary_sha256")
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # not one that reads features
    if shape != asdict(DraftShape.of(AutoConfig.from_pretrained(target_folder))):
        return "it was made for a target of another shape"
    if vocabulary and vocabulary != vocabulary_digest(target_folder):
        return "it was made for a target with other tokens"
    return ""


def vocabulary_digest(folder: Path) -> str:
    """sha256 of a model folder's tokens and their ids; empty where its tokenizer says them in another form."""
    try:
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        tokens = sorted(model["vocab"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return ""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
