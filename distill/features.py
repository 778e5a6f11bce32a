"""Target features of a corpus on disk: kept while the target wrote its responses, or captured afterwards.

Beside each token shard lies `shard-00000.features.safetensors` with one row of tapped layers per token, bf16. The row
of a conversation's last token is zero: that token was never fed, and no draft looks at it. Reading maps the file and
copies only the rows asked for, so a corpus larger than memory trains all the same.

Compressed, a layer's row is 8-bit numbers and one scale, about half the bytes.
"""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distill.conversation import Conversation
from distill.corpus import StoredSample, shard_name
from inference.errors import InputError, first_line
from inference.model import CausalModel

BYTES_PER_NUMBER = 2
"""Features and states are kept in bf16, unless features are compressed."""
_SCALE_BYTES = 4
_OPEN_FILES = 64
"""Mapped files at one time; a process may map only so many."""


def features_path(folder: Path, index: int) -> Path:
    """Where a shard's features are."""
    return folder / f"{shard_name(index)}.features.safetensors"


def write_features(
    folder: Path, index: int, features: Sequence[torch.Tensor], taps: Sequence[int], *, compressed: bool = False
) -> None:
    """Write one shard's features, `[T, m * D]` a sample, aside and by rename."""
    path = features_path(folder, index)
    aside = path.with_suffix(".partial")
    rows = torch.cat(list(features))
    tensors = compress(rows, len(taps)) if compressed else {"features": rows.to(torch.bfloat16)}
    save_file(tensors, aside, {"taps": json.dumps(list(taps))})
    with aside.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(aside, path)


def compress(rows: torch.Tensor, num_taps: int) -> dict[str, torch.Tensor]:
    """8-bit numbers `features` `[T, m * D]` and `scales` `[T, m]` of rows `[T, m * D]`: each layer's largest is 127."""
    layers = rows.float().unflatten(1, (num_taps, -1))
    scales = layers.abs().amax(-1, keepdim=True) / 127.0
    numbers = (layers / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return {"features": numbers.flatten(1), "scales": scales[..., 0].contiguous()}


def feature_bytes(*, tokens: int, hidden: int, num_taps: int, compressed: bool = False) -> int:
    """Bytes on disk of the features of some tokens."""
    return tokens * num_taps * (hidden + _SCALE_BYTES if compressed else hidden * BYTES_PER_NUMBER)


def bytes_per_token(
    *, tokens: int, stated: int, hidden: int, num_taps: int, compressed: bool = False
) -> tuple[float, float]:
    """Bytes per training token of our layout, and of DeepSpec's target cache v2 for the same taps.

    Ours keeps the last state where something learns from it (`stated` tokens); the cache keeps it everywhere, besides
    token, attention and loss mask.
    """
    taps = feature_bytes(tokens=1, hidden=hidden, num_taps=num_taps, compressed=compressed)
    ours = taps + stated / tokens * hidden * BYTES_PER_NUMBER + 4 + 1
    theirs = (num_taps + 1) * hidden * BYTES_PER_NUMBER + 4 + 1 + 1
    return ours, float(theirs)


class _Rows:
    """Rows of one file, read when asked for.

    Args:
        features: `[N, m * D]`, bf16 or 8-bit numbers; a slice of a file or a tensor.
        scales: `[N, m]` of the latter, else None.
    """

    def __init__(self, features: Any, scales: Any) -> None:
        self.features, self.scales = features, scales

    @property
    def shape(self) -> tuple[int, int]:
        """N, and m * D."""
        count, width = self.features.get_shape()
        return count, width

    def read(self, start: int, end: int) -> torch.Tensor:
        """Rows `[end - start, m * D]`, bf16."""
        numbers: torch.Tensor = self.features[start:end]
        if self.scales is None:
            return numbers
        scales: torch.Tensor = self.scales[start:end]
        layers: torch.Tensor = numbers.unflatten(1, (scales.shape[1], -1)) * scales[..., None]
        rows: torch.Tensor = layers.flatten(1).to(torch.bfloat16)
        return rows

    def on(self, device: torch.device) -> "_Rows":
        """The same, whole and on a device."""
        scales = None if self.scales is None else self.scales[:].to(device)
        return _Rows(self.features[:].to(device), scales)


class FeatureShards:
    """Features of a corpus folder, by sample. Few files are mapped at one time.

    Args:
        folder: that holds the feature files.
        samples: of the corpus, shard by shard.
        taps: layers wanted, in the order wanted.

    Raises:
        InputError: a file is missing, damaged, or lacks a wanted layer.
    """

    def __init__(self, folder: Path, samples: Sequence[Sequence[Conversation]], *, taps: Sequence[int]) -> None:
        self._folder, self._num_shards = folder, len(samples)
        self._rows = functools.lru_cache(maxsize=_OPEN_FILES)(self._mapped)
        # Where the features of samples in memory begin; those on disk know it themselves.
        self._places: dict[str, tuple[int, int]] = {}
        self._total = 0
        first: list[int] | None = None
        self._columns: torch.Tensor | None = None
        for index, shard in enumerate(samples):
            path = features_path(folder, index)
            rows, kept = _opened(path)
            count, width = rows.shape
            start = 0
            for sample in shard:
                if isinstance(sample, StoredSample):
                    assert (sample.shard, sample.start) == (index, start), "the shards of the corpus, in order"
                else:
                    self._places[sample.id] = index, start
                start += sample.num_tokens
            first = first or kept
            # One choice of columns serves all shards, so all must have kept the same layers in the same order.
            if count != start or kept != first or not set(taps) <= set(kept):
                raise InputError(
                    f"features of {count} tokens and layers {kept}, wanted {start} and {list(taps)}",
                    where=str(path),
                    mend="build the corpus again",
                )
            self._total += count * width * BYTES_PER_NUMBER
            if list(taps) != kept:
                size = width // len(kept)
                starts = torch.tensor([kept.index(tap) * size for tap in taps])
                self._columns = (starts[:, None] + torch.arange(size)).flatten()

    def _mapped(self, index: int) -> _Rows:
        return _opened(features_path(self._folder, index))[0]

    def of(self, sample: Conversation) -> torch.Tensor:
        """Features `[T, m * D]` of one sample, bf16."""
        if isinstance(sample, StoredSample):
            index, start = sample.shard, sample.start
        else:
            index, start = self._places[sample.id]
        features = self._rows(index).read(start, start + sample.num_tokens)
        return features if self._columns is None else features[:, self._columns]

    def resident(self, device: torch.device) -> "FeatureShards":
        """Keep everything on an accelerator that has room for it three times over, so that no step waits for a copy."""
        if device.type == "cuda" and 3 * self._total < torch.cuda.mem_get_info(device)[0]:
            whole = [self._mapped(index).on(device) for index in range(self._num_shards)]
            self._rows = functools.lru_cache(maxsize=0)(whole.__getitem__)
            self._columns = None if self._columns is None else self._columns.to(device)
        return self


def _opened(path: Path) -> tuple[_Rows, list[int]]:
    """A file's features, not read yet, and its layers.

    Raises:
        InputError: missing or damaged.
    """
    try:
        file: Any = safe_open(path, framework="pt")
        kept = [int(tap) for tap in json.loads(file.metadata()["taps"])]
        rows = file.get_slice("features")
        if len(rows.get_shape()) != 2:
            raise ValueError(f"a tensor of shape {rows.get_shape()}, not of rows")
        scales = file.get_slice("scales") if "scales" in file.keys() else None
        if scales is not None and scales.get_shape() != [rows.get_shape()[0], len(kept)]:
            raise ValueError(f"scales of shape {scales.get_shape()}")
        return _Rows(rows, scales), kept
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise InputError(f"unreadable features: {reason}", where=str(path), mend="build the corpus again") from None


def kept_taps(folder: Path) -> list[int]:
    """Layers whose features a corpus folder holds; none where it holds none.

    Raises:
        InputError: the first file is damaged.
    """
    path = features_path(folder, 0)
    return _opened(path)[1] if path.is_file() else []


def capture_features(target: CausalModel, sample: Conversation, taps: Sequence[int]) -> torch.Tensor:
    """Run the target over one conversation: `[T, m * D]`, bf16, the last token's row included."""
    with torch.inference_mode(), target.tapped(taps) as features:
        target.model.base_model(input_ids=sample.tokens[None].to(target.device), use_cache=False)
        rows = features.take()[0].to(torch.bfloat16).cpu()
    return rows.clone()
