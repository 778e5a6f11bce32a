"""DFlash and DSpark in all formats: what they share.

Two block layouts must not be confused. *Anchor first*: the anchor's own slot predicts, a block of B slots proposes B
tokens (DSpark). *Bonus anchor*: the anchor's slot is read and not scored, a block of B slots proposes B - 1 (DFlash).
Layer ids are decoder indices here, and one higher where a key says `aux`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.errors import InputError
from inference.feature_drafts._block import TOKEN, BlockConfig
from inference.feature_drafts.dflash import Config as DFlashConfig
from inference.feature_drafts.dspark import Config as DSparkConfig
from inference.feature_networks import FeatureNetwork
from inference.feature_networks._block import BlockNetwork
from inference.model import CausalModel
from inference.unused_tokens import unused_token
from pipelines.exports.layouts._shared import rebuilt, vocabulary_tensors
from pipelines.exports.source import Source

HEAD_NAMES = {"markov": "vanilla", "gated": "gated", "rnn": "rnn"}
"""Our name of a sequential head -> the one in checkpoints."""


def network_of(source: Source) -> BlockNetwork:
    """The network as what it is."""
    assert isinstance(source.network, BlockNetwork), "DFlash and DSpark are block drafts"
    return source.network


def unnormed(source: Source) -> str:
    """Why a draft fits no engine's layers at all; empty when it does."""
    config = network_of(source).config
    assert isinstance(config, BlockConfig)
    if not config.qk_norm:
        return "engines norm queries and keys, this draft does not (qk_norm: false)"
    return "" if mask_token(source) is not None else "the target has no spare token that could stand for the mask"


def no_own_embedding(source: Source) -> str:
    """Why an engine that knows the target's embedding alone cannot serve a draft."""
    if network_of(source).mask_token is None:
        return "it has no place for a learned mask; train with mask: token"
    return "it has no place for the factor behind the target's embedding" if source.scaled_embedding else ""


def whole_vocabulary(source: Source) -> str:
    """Why an engine without a table of draft tokens cannot serve a draft."""
    return "it has no table of draft tokens; train with vocabulary: 0" if source.network.vocabulary is not None else ""


def first_reason(*reasons: str) -> str:
    """The first that is one."""
    return next(filter(None, reasons), "")


def mask_token(source: Source) -> int | None:
    """The token that stands for what is to come: the draft's own, or a spare one whose row takes the learned vector."""
    known = network_of(source).mask_token
    return unused_token(source.target.tokenizer, source.network.shape.vocab) if known is None else known


def draft_vocabulary(source: Source) -> dict[str, int]:
    """The key of a reduced vocabulary, where it is one."""
    return {} if source.network.vocabulary is None else {"draft_vocab_size": source.head().shape[0]}


def plain_tables(source: Source) -> str:
    """Why an engine that has the target's tables alone cannot serve a draft."""
    return first_reason(unnormed(source), no_own_embedding(source), whole_vocabulary(source))


def block_size(source: Source) -> int:
    """Slots of a block, the anchor's included."""
    return network_of(source).width


def sequential_head(source: Source) -> dict[str, Any]:
    """The keys of DSpark's heads."""
    config = source.network.config
    assert isinstance(config, DSparkConfig)
    return {
        "markov_rank": config.markov_rank,
        "markov_head_type": HEAD_NAMES[config.markov_head],
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }


def block_tensors(source: Source) -> dict[str, Tensor]:
    """Backbone and heads by the names of DSpark checkpoints; head and embedding where they are not the target's."""
    network = network_of(source)
    own = {n: t for n, t in network.own_tensors().items() if n != "mask_embedding" and not n.startswith("lm_head")}
    found = own | vocabulary_tensors(source)
    if network.vocabulary is not None:
        found["lm_head.weight"] = source.head()
    if source.own_embedding:
        embedding = source.embedding()
        if network.mask_token is None:
            token = mask_token(source)
            assert token is not None, "a draft without a mask is not exported"
            embedding[token] = network.mask_embedding.detach().to(embedding)
        found["embed_tokens.weight"] = embedding
    return found


def read_block(
    folder: Path,
    target: CausalModel,
    layers: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    block_size: int,
    sample_from_anchor: bool,
    mask: int,
    taps: list[int],
    heads: dict[str, Any] | None = None,
) -> FeatureNetwork:
    """The network an engine makes of DFlash or DSpark files.

    Args:
        folder: for errors.
        target: that it reads.
        layers: configuration of the layers.
        tensors: by the names of checkpoints.
        block_size: slots of a block.
        sample_from_anchor: whether the anchor's slot predicts.
        mask: token whose embedding stands for what is to come.
        taps: decoder indices.
        heads: keys of DSpark's heads; None for DFlash.

    Raises:
        InputError: they describe another computation than ours.
    """
    if not 0 <= mask < int(layers["vocab_size"]):
        raise InputError(f"no token {mask} for the mask", where=str(folder), mend="export it again")
    block = block_size if sample_from_anchor else block_size - 1
    settings: dict[str, Any] = {
        "block": block,
        "layers": int(layers["num_hidden_layers"]),
        "mask": TOKEN,
        "mask_token": mask,
    }
    if heads is None:
        config: BlockConfig = DFlashConfig(**settings)
    else:
        names = {name: ours for ours, name in HEAD_NAMES.items()}
        kind = names[str(heads["markov_head_type"])]
        config = DSparkConfig(**settings, markov_head=kind, markov_rank=int(heads["markov_rank"]))
    network = rebuilt(folder, target, config, layers, tensors, taps=taps)
    assert isinstance(network, BlockNetwork)
    # The layout is what the files say, not what the kind is used to.
    network.extra = 0 if sample_from_anchor else 1
    network.mask_id = torch.tensor(mask, device=target.device)
    return network
