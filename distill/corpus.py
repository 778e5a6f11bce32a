"""The corpus on disk: the target's own responses as token shards, with the states that predicted them when known.

A shard is `shard-00000.safetensors` (tokens, lengths, assistant mask, optional states) beside `shard-00000.jsonl` (who
asked what, one line a sample). A shard is written whole or not at all, so a killed run goes on after its last shard.

Opening reads lengths, masks and lines once, refuses what is damaged, and keeps an index of 45 bytes a conversation.
Tokens, masks and states come from the mapped files whenever they are asked for, so a corpus may be larger than memory.
"""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distill.conversation import Conversation, Sample, state_rows, stated_positions
from inference.errors import InputError, first_line

_OPEN_FILES = 64
"""Mapped shards at one time; a process may map only so many, and opening one takes some 30 us."""
_WHERE = np.dtype(
    [
        ("shard", np.int32),
        ("start", np.int64),  # of its tokens in the shard
        ("tokens", np.int32),
        ("responses", np.int32),  # tokens of the assistant's own
        ("first", np.int32),  # of those; the number of tokens where there are none
        ("stated", np.int64),  # of its states in the shard; -1 without states
        ("states", np.int32),
        ("split", np.uint8),
        ("line", np.int64),  # byte in the shard's lines
    ]
)
_Index = npt.NDArray[np.void]


def shard_name(index: int) -> str:
    """Stem of a shard's two files."""
    return f"shard-{index:05d}"


def shard_written(folder: Path, index: int) -> bool:
    """Whether a shard is whole; its token file is renamed into place last."""
    return (folder / f"{shard_name(index)}.safetensors").is_file()


def write_shard(folder: Path, index: int, samples: Sequence[Conversation]) -> None:
    """Write one shard, its token file last and by rename."""
    stem = folder / shard_name(index)
    tensors = {
        "tokens": torch.cat([s.tokens for s in samples]).to(torch.int32),
        "mask": torch.cat([s.mask for s in samples]).to(torch.uint8),
        "lengths": torch.tensor([s.tokens.shape[0] for s in samples]),
    }
    states = [s.states for s in samples if s.states is not None]
    if len(states) == len(samples):
        tensors["states"] = torch.cat(states).to(torch.bfloat16)
    lines = [
        {"id": s.id, "domain": s.domain, "source": s.source, "split": s.split, "response": s.text} for s in samples
    ]
    _replace(stem.with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in lines).encode())
    aside = stem.with_suffix(".partial")
    save_file(tensors, aside)
    with aside.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(aside, stem.with_suffix(".safetensors"))


class StoredSample:
    """A conversation on disk (see `Conversation`), by its place in an index. Reads when asked, keeps nothing."""

    __slots__ = ("_files", "_index", "_row")

    def __init__(self, files: "_Files", index: _Index, row: int) -> None:
        self._files, self._index, self._row = files, index, row

    def _number(self, name: str) -> int:
        return int(self._index[name][self._row])

    def _rows(self, name: str, start: int, count: int) -> torch.Tensor:
        """Rows of one of the shard's tensors, in the mapped file itself."""
        rows: torch.Tensor = self._files.tensors(self.shard)[name][start : start + count]
        return rows

    @property
    def shard(self) -> int:
        """Index of the shard."""
        return self._number("shard")

    @property
    def start(self) -> int:
        """Tokens before this conversation in its shard."""
        return self._number("start")

    @property
    def id(self) -> str:
        """See `Conversation`."""
        return str(self._line()["id"])

    @property
    def domain(self) -> str:
        """See `Conversation`."""
        return str(self._line()["domain"])

    @property
    def source(self) -> str:
        """See `Conversation`."""
        return str(self._line()["source"])

    @property
    def text(self) -> str:
        """See `Conversation`."""
        return str(self._line()["response"])

    def _line(self) -> dict[str, Any]:
        return self._files.line(self.shard, self._number("line"))

    @property
    def split(self) -> str:
        """See `Conversation`."""
        return self._files.splits[self._number("split")]

    @property
    def num_tokens(self) -> int:
        """See `Conversation`."""
        return self._number("tokens")

    @property
    def num_response_tokens(self) -> int:
        """See `Conversation`."""
        return self._number("responses")

    @property
    def first_response(self) -> int:
        """See `Conversation`."""
        return self._number("first")

    @property
    def has_states(self) -> bool:
        """See `Conversation`."""
        return self._number("stated") >= 0

    @property
    def tokens(self) -> torch.Tensor:
        """See `Conversation`."""
        return self._rows("tokens", self.start, self.num_tokens).long()

    @property
    def mask(self) -> torch.Tensor:
        """See `Conversation`."""
        return self._rows("mask", self.start, self.num_tokens).bool()

    @property
    def states(self) -> torch.Tensor | None:
        """See `Conversation`; in the mapped file, so nothing is copied until they are used."""
        return self._rows("states", self._number("stated"), self._number("states")) if self.has_states else None

    @property
    def stated(self) -> torch.Tensor:
        """See `Conversation`."""
        return stated_positions(self.mask, self._number("states") if self.has_states else None)

    def states_of(self, positions: torch.Tensor) -> torch.Tensor:
        """See `Conversation`."""
        states = self.states
        assert states is not None, "a conversation with states"
        return states[state_rows(self.stated, positions)]


class StoredSamples(Sequence[StoredSample]):
    """Conversations of a corpus folder: an index, and the files it points into."""

    def __init__(self, files: "_Files", index: _Index) -> None:
        self._files, self._index = files, index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> StoredSample: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredSamples": ...
    def __getitem__(self, index: int | slice) -> "StoredSample | StoredSamples":
        if isinstance(index, slice):
            return StoredSamples(self._files, self._index[index])
        return StoredSample(self._files, self._index, range(len(self))[index])


def read_shard(folder: Path, index: int) -> StoredSamples:
    """The conversations of one shard.

    Raises:
        InputError: a file is missing or truncated, or the two disagree.
    """
    files = _Files(folder)
    return StoredSamples(files, _indexed(files, index))


def read_shards(folder: Path) -> list[StoredSamples]:
    """All conversations of a corpus folder, shard by shard.

    Raises:
        InputError: no shard, or an unreadable one.
    """
    samples, counts = _read(folder)
    ends = np.cumsum(counts).tolist()
    return [samples[end - count : end] for end, count in zip(ends, counts, strict=True)]


def read_corpus(folder: Path) -> StoredSamples:
    """All conversations of a corpus folder, in shard order; raises as `read_shards` does."""
    return _read(folder)[0]


def _read(folder: Path) -> tuple[StoredSamples, list[int]]:
    """All conversations of a corpus folder under one index, and how many each shard has."""
    count = len(list(folder.glob("shard-*.jsonl")))
    if count == 0:
        raise InputError("the corpus holds no shards", where=str(folder), mend="run `dspark corpus`")
    files = _Files(folder)
    shards = [_indexed(files, index) for index in range(count)]
    return StoredSamples(files, np.concatenate(shards)), [len(shard) for shard in shards]


class _Files:
    """The files of a corpus folder, of which few are open at a time.

    Args:
        folder: of the corpus.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.splits: list[str] = []
        self.tensors = functools.lru_cache(maxsize=_OPEN_FILES)(self._opened)

    def stem(self, shard: int) -> Path:
        """Path of a shard's two files without their suffixes."""
        return self._folder / shard_name(shard)

    def _opened(self, shard: int) -> dict[str, Any]:
        """The tensors of a shard by name, mapped and not read.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            file: Any = safe_open(self.stem(shard).with_suffix(".safetensors"), framework="pt")
            return {name: file.get_slice(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise _unreadable(error, self.stem(shard)) from None

    def lines(self, shard: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The lines of a shard, each with the byte it begins at.

        Raises:
            InputError: the file is missing or damaged.
        """
        at = 0
        try:
            with self.stem(shard).with_suffix(".jsonl").open("rb") as stream:
                for text in stream:
                    yield at, _checked(json.loads(text))
                    at += len(text)
        except (OSError, ValueError) as error:
            raise _unreadable(error, self.stem(shard)) from None

    def line(self, shard: int, at: int) -> dict[str, Any]:
        """The line of a shard that begins at a byte; raises as `lines` does."""
        try:
            with self.stem(shard).with_suffix(".jsonl").open("rb") as stream:
                stream.seek(at)
                return _checked(json.loads(stream.readline()))
        except (OSError, ValueError) as error:
            raise _unreadable(error, self.stem(shard)) from None

    def split_number(self, split: str) -> int:
        """What stands for a split in the index."""
        if split not in self.splits:
            self.splits.append(split)
        return self.splits.index(split)


def _checked(line: Any) -> dict[str, Any]:
    """A line that says all of a sample.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(line, dict) or not {"id", "domain", "source", "split", "response"} <= line.keys():
        raise ValueError("a line without id, domain, source, split or response")
    return line


def _unreadable(error: Exception, stem: Path) -> InputError:
    return InputError(f"unreadable shard: {first_line(error)}", where=str(stem), mend="build the corpus again")


def _indexed(files: _Files, shard: int) -> _Index:
    """The index of one shard.

    Raises:
        InputError: a file is missing or truncated, or the two disagree.
    """
    stem, tensors = files.stem(shard), files.tensors(shard)
    lines = list(files.lines(shard))
    if not _fit_together(tensors):
        raise InputError("the tensors do not fit together", where=str(stem), mend="build the corpus again")
    lengths, mask = tensors["lengths"][:].numpy(), tensors["mask"][:].bool().numpy()
    if len(lines) != len(lengths):
        raise InputError(
            f"{len(lines)} lines for {len(lengths)} samples", where=str(stem), mend="build the corpus again"
        )
    ends = np.cumsum(lengths)
    before = np.concatenate([[0], np.cumsum(mask)])
    # Places of all true tokens, and behind them one that no conversation reaches.
    places = np.append(np.flatnonzero(mask), len(mask))
    index = np.empty(len(lengths), dtype=_WHERE)
    index["shard"], index["start"], index["tokens"] = shard, ends - lengths, lengths
    index["responses"] = before[ends] - before[ends - lengths]
    index["first"] = np.minimum(places[before[ends - lengths]] - (ends - lengths), lengths)
    everywhere = "states" in tensors and tensors["states"].get_shape()[0] == len(mask) - len(lengths)
    index["states"] = lengths - 1 if everywhere else index["responses"]
    index["stated"] = np.cumsum(index["states"], dtype=np.int64) - index["states"] if "states" in tensors else -1
    index["line"] = [at for at, _ in lines]
    index["split"] = [files.split_number(line["split"]) for _, line in lines]
    return index


def _fit_together(tensors: dict[str, Any]) -> bool:
    """Whether a shard holds its tensors: a row for every token, a state for every one of the assistant's or for all but
    each first."""
    if not {"tokens", "mask", "lengths"} <= tensors.keys():
        return False
    shapes = {name: tensor.get_shape() for name, tensor in tensors.items()}
    lengths: torch.Tensor = tensors["lengths"][:]
    total = int(lengths.sum())
    if len(shapes["lengths"]) != 1 or bool((lengths < 0).any()):
        return False
    if shapes["tokens"] != [total] or shapes["mask"] != [total]:
        return False
    responses = int(tensors["mask"][:].bool().sum())
    return "states" not in shapes or shapes["states"][:1] in ([responses], [total - len(lengths)])


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


__all__ = [
    "Conversation",
    "Sample",
    "StoredSample",
    "StoredSamples",
    "read_corpus",
    "read_shard",
    "read_shards",
    "shard_name",
    "shard_written",
    "write_shard",
]
