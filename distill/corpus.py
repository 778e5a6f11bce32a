"""The corpus on disk: the target's own responses as token shards, with the states that predicted them when known.

A shard is `shard-00000.safetensors` (tokens, lengths, assistant mask, optional states) beside `shard-00000.jsonl` (who
asked what, one line a sample). A shard is written whole or not at all, so a killed run goes on after its last shard.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from inference.errors import InputError


@dataclass(frozen=True)
class Sample:
    """One conversation in tokens.

    Attributes:
        id: of the prompt.
        domain: of the prompt.
        source: of the prompt.
        split: `train` or `validation`.
        tokens: int64 `[T]`, template and responses.
        mask: bool `[T]`, true where the token is the assistant's own.
        states: the target's head inputs that predicted tokens, or None: `[mask.sum(), D]` for the assistant's own,
            `[T - 1, D]` for all but the first, prompts included.
        text: the last response as text, for people.
        features: `[T, m * D]`, target features as a generator kept them (see `distill.features`), or None; not read
            back with the rest.
    """

    id: str
    domain: str
    source: str
    split: str
    tokens: torch.Tensor
    mask: torch.Tensor
    states: torch.Tensor | None
    text: str
    features: torch.Tensor | None = None

    @property
    def stated(self) -> torch.Tensor:
        """Bool `[T]`, true where `states` has the row that predicted the token."""
        if self.states is None:
            return torch.zeros_like(self.mask)
        if self.states.shape[0] == int(self.mask.sum()):
            return self.mask
        return torch.arange(self.tokens.shape[0]) > 0

    def states_of(self, positions: torch.Tensor) -> torch.Tensor:
        """States `[positions.sum(), D]` that predicted some tokens.

        Args:
            positions: bool `[t]`, t up to T, true only where `stated` is.
        """
        assert self.states is not None, "the corpus was opened with states"
        rows = self.stated.long().cumsum(0) - 1
        return self.states[rows[: positions.shape[0]][positions]]


def shard_name(index: int) -> str:
    """Stem of a shard's two files."""
    return f"shard-{index:05d}"


def shard_written(folder: Path, index: int) -> bool:
    """Whether a shard is whole; its token file is renamed into place last."""
    return (folder / f"{shard_name(index)}.safetensors").is_file()


def write_shard(folder: Path, index: int, samples: list[Sample]) -> None:
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


def read_shard(folder: Path, index: int) -> list[Sample]:
    """Read one shard.

    Raises:
        InputError: a file is missing or truncated, or the two disagree.
    """
    stem = folder / shard_name(index)
    try:
        tensors = load_file(stem.with_suffix(".safetensors"))
        lines = [json.loads(line) for line in stem.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(
            f"unreadable shard: {str(error).splitlines()[0]}", where=str(stem), mend="build the corpus again"
        ) from None
    if not _fit_together(tensors):
        raise InputError("the tensors do not fit together", where=str(stem), mend="build the corpus again")
    lengths = tensors["lengths"].tolist()
    if len(lines) != len(lengths):
        raise InputError(
            f"{len(lines)} lines for {len(lengths)} samples", where=str(stem), mend="build the corpus again"
        )
    samples = []
    position = stated = 0
    everywhere = "states" in tensors and tensors["states"].shape[0] == sum(lengths) - len(lengths)
    for line, length in zip(lines, lengths, strict=True):
        mask = tensors["mask"][position : position + length].bool()
        count = length - 1 if everywhere else int(mask.sum())
        states = tensors["states"][stated : stated + count] if "states" in tensors else None
        samples.append(
            Sample(
                id=line["id"],
                domain=line["domain"],
                source=line["source"],
                split=line["split"],
                tokens=tensors["tokens"][position : position + length].long(),
                mask=mask,
                states=states,
                text=line["response"],
            )
        )
        position, stated = position + length, stated + count
    return samples


def read_shards(folder: Path) -> list[list[Sample]]:
    """All samples of a corpus folder, shard by shard.

    Raises:
        InputError: no shard, or an unreadable one.
    """
    count = len(list(folder.glob("shard-*.jsonl")))
    if count == 0:
        raise InputError("the corpus holds no shards", where=str(folder), mend="run `dspark corpus`")
    return [read_shard(folder, index) for index in range(count)]


def read_corpus(folder: Path) -> list[Sample]:
    """All samples of a corpus folder, in shard order; raises as `read_shards` does."""
    return [sample for shard in read_shards(folder) for sample in shard]


def _fit_together(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a shard holds its tensors: a row for every token, a state for every one of the assistant's or for all but
    each first."""
    if not {"tokens", "mask", "lengths"} <= tensors.keys():
        return False
    total = int(tensors["lengths"].sum())
    states = tensors.get("states")
    return (
        tensors["tokens"].shape == (total,)
        and tensors["mask"].shape == (total,)
        and (
            states is None
            or states.shape[0] in (int(tensors["mask"].bool().sum()), total - tensors["lengths"].shape[0])
        )
    )


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)
