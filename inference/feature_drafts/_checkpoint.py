"""A feature network on disk: `config.json` (flat keys of DSpark checkpoints, our `kind` beside them) and
`model.safetensors` with the trained tensors. What they compute is the business of the kinds.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from inference.errors import InputError, first_line
from inference.feature_drafts import FeatureDraftConfig, FeatureNetwork
from inference.feature_drafts._layers import DraftShape
from inference.model import CausalModel
from inference.plugins import plugin
from inference.precision import apply_precision, storage_dtype

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def save_network(network: FeatureNetwork, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (bf16; token ids as int64)."""
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
    }
    (folder / CONFIG_FILE).write_text(json.dumps(text, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_network(folder: Path, target: CausalModel, *, precision: str) -> FeatureNetwork:
    """Read a network and bind it to its target.

    Args:
        folder: written by `save_network`.
        target: the target it was made for.
        precision: see `inference.precision`.

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
    network.to(target.device).eval().requires_grad_(False)
    network.bind(target)
    if storage_dtype(precision) != torch.float32:
        network.to(storage_dtype(precision))
    apply_precision(network, precision)
    return network
