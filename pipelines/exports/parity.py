"""The gate an export passes before it is published: what an engine makes of its files is the draft it was made from.

Three comparisons, each from the exported files alone: files against their digests; logits and confidences of whole
blocks against the training graph, within 1e-5 in fp32; and the scored requests, decoded again with the rebuilt draft,
token for token and in as many target passes as the score took, which is the same tau.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from inference.drafters import Drafter
from inference.drafters.feature import FeatureDrafter
from inference.drafters.mixed import MixedDrafter, mixed_drafter
from inference.errors import InputError
from inference.feature_networks import FeatureNetwork, PackedBatch
from inference.feature_networks._checkpoint import load_network, put_into, vocabulary_digest
from inference.loading import load_causal_model
from inference.model import CausalModel
from inference.pair import Pair
from pipelines.exports import gguf_files, independent
from pipelines.exports.source import model_folder
from pipelines.exports.write import SERVE_FOLDER, Export, converted_from, layouts_for, read_exports
from pipelines.files import sha256_file

TOLERANCE = 1e-5
"""Of logits in fp32, times the largest of them."""
_TOKENS, _ANCHORS = 96, 8
_MEND = "this is a mistake in the export, or its files were changed; export the pair again"


def check_exports(version: Path, pair: Pair, repeats: Callable[[Drafter], Iterator[tuple[str, bool]]]) -> None:
    """Pass every export of a version through the gate.

    Args:
        version: holds `draft/` and `serve/`.
        pair: the version, loaded.
        repeats: decodes the scored requests with a drafter; for each its name, and whether it went as in the score.

    Raises:
        InputError: an export is not the draft; the message names what differs.
    """
    serve = version / SERVE_FOLDER
    draft, _ = model_folder(version / "draft")
    tokens = sample_tokens(pair)
    exports = [export for export in read_exports(serve) if export.folder]
    for export in exports:
        check_files(serve / export.folder, export)
        if export.layout == gguf_files.NAME:
            source = converted_from(exports)
            assert source is not None, "a GGUF file is listed with the format it was made from"
            gguf_files.check_whole(serve / export.folder / gguf_files.FILE, serve / source.folder)
            continue
        drafter = _rebuilt(serve / export.folder, export.layout, draft, pair, tokens)
        for name, went in repeats(standing_in(pair.drafter, drafter)):
            if not went:
                raise InputError(f"{name} took other tokens or passes than its score", where=export.layout, mend=_MEND)


def check_files(folder: Path, export: Export) -> None:
    """Compare an export's files with their digests.

    Raises:
        InputError: one is missing, changed, or was not there.
    """
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    for name in sorted(there | export.files.keys()):
        if name not in there or sha256_file(folder / name) != export.files.get(name):
            raise InputError("a file of the export was changed, lost or added", where=str(folder / name), mend=_MEND)


def sample_tokens(pair: Pair) -> Tensor:
    """Tokens that blocks are compared on, int64 `[T]`: no model wrote them, all parts of the vocabulary are in them."""
    generator = torch.Generator().manual_seed(0)
    length = min(_TOKENS, pair.target.context_limit // 2)
    return torch.randint(pair.target.vocab_size, (length,), generator=generator).to(pair.target.device)


def standing_in(own: Drafter, rebuilt: Drafter) -> Drafter:
    """The rebuilt draft in the place of the pair's own: behind look-up, where that is the pair's."""
    if isinstance(own, MixedDrafter):
        return mixed_drafter(own.lookup, rebuilt, draft_tokens=own.draft_tokens)
    return rebuilt


def _rebuilt(folder: Path, layout: str, draft: Path, pair: Pair, tokens: Tensor) -> Drafter:
    """The drafter of an export, once its logits are the draft's."""
    target, precision = pair.target, pair.target.precision or "fp32"
    if layout == independent.NAME:
        independent_gap(draft, folder, target, tokens)
        return independent.read_model_folder(folder, target, precision=precision)
    original = load_network(draft, target, precision="fp32")
    rebuilt = layouts_for(original.config.kind)[layout].read(folder, target)
    block_gap(original, rebuilt, target, tokens, where=layout)
    put_into(rebuilt, precision)
    return FeatureDrafter(rebuilt)


def independent_gap(draft: Path, folder: Path, target: CausalModel, tokens: Tensor) -> float:
    """How far logits of an exported model are from the draft's, relative to the largest.

    Raises:
        InputError: further than rounding explains, or another tokenizer.
    """
    if vocabulary_digest(folder) != vocabulary_digest(draft):
        raise InputError("the export has another tokenizer than the draft", where=str(folder), mend=_MEND)
    rows = []
    for place in (draft, folder):
        model = load_causal_model(place, precision="fp32", device=target.device)
        target.check_same_vocabulary(model, where=str(place))
        with torch.inference_mode():
            rows.append(model.logits(tokens, model.new_cache(), num_rows=tokens.shape[0]).float())
    return _gap(rows[0], rows[1], where=str(folder))


def block_gap(
    original: FeatureNetwork, rebuilt: FeatureNetwork, target: CausalModel, tokens: Tensor, *, where: str
) -> float:
    """How far a rebuilt network's logits are from those of the training graph, relative to the largest.

    Each reads the target's features at its own taps, in blocks at the same anchors, the true tokens before every slot.

    Args:
        original: the draft.
        rebuilt: of the export.
        target: that both read.
        tokens: int64 `[T]`.
        where: for errors.

    Raises:
        InputError: other tokens can be proposed, blocks have another length, or rounding does not explain the gap.
    """
    if rebuilt.config.kind == "eagle3":
        rebuilt.block = original.block  # its files do not say how many steps are taken
    if rebuilt.block != original.block:
        what = f"it proposes {rebuilt.block} tokens a block, the draft {original.block}: another block layout"
        raise InputError(what, where=where, mend=_MEND)
    rows = [_block_rows(network, target, tokens) for network in (original, rebuilt)]
    (logits, confidence), (others, other_confidence) = rows
    if (confidence is None) != (other_confidence is None):
        raise InputError("the confidence head is lost", where=where, mend=_MEND)
    if confidence is not None and other_confidence is not None:
        _gap(confidence, other_confidence, where=f"{where}, confidences")
    return _gap(logits, others, where=where)


def _block_rows(network: FeatureNetwork, target: CausalModel, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits over the target's vocabulary `[n, V]` of blocks at a few anchors, and the confidences' `[n]`."""
    with torch.inference_mode():
        with target.tapped(network.taps) as features:
            target.logits(tokens, target.new_cache(), num_rows=1)
            taken = features.take().to(next(network.parameters()).dtype)
        batch = _batch(tokens, taken, block=network.block)
        states = network.slot_states(batch).flatten(0, 2)
        logits = network.head(states).float()
        confidence = network.confidence_logits(states)
    if network.vocabulary is not None:
        spread = logits.new_full((logits.shape[0], network.shape.vocab), -torch.inf)
        logits = spread.index_copy_(1, network.vocabulary, logits)
    return logits, None if confidence is None else confidence.float()


def _batch(tokens: Tensor, features: Tensor, *, block: int) -> PackedBatch:
    """One conversation with a few anchors, each with a whole block behind it."""
    length = tokens.shape[0]
    last = max(1, length - 1 - block)
    anchors = torch.linspace(1, last, min(_ANCHORS, last), device=tokens.device).long()[None]
    positions = torch.arange(length, device=tokens.device)[None]
    return PackedBatch(
        tokens=tokens[None],
        segments=torch.zeros_like(positions),
        positions=positions,
        features=features,
        anchors=anchors,
        slots=torch.ones((*anchors.shape, block), dtype=torch.bool, device=tokens.device),
    )


def _gap(logits: Tensor, others: Tensor, *, where: str) -> float:
    """Largest difference over the largest value.

    Raises:
        InputError: other entries are finite, or the difference is more than rounding.
    """
    finite = torch.isfinite(logits)
    if not torch.equal(finite, torch.isfinite(others)):
        raise InputError("it proposes other tokens than the draft", where=where, mend=_MEND)
    largest = float(logits[finite].abs().max())
    gap = float((logits[finite] - others[finite]).abs().max()) / max(largest, math.ulp(1.0))
    if not gap <= TOLERANCE:
        raise InputError(f"its logits differ from the draft's by {gap:.1e} of the largest", where=where, mend=_MEND)
    return gap


__all__ = ["block_gap", "check_exports", "check_files", "independent_gap"]
