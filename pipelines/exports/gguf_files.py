"""Drafts as GGUF, by llama.cpp's own converter where `make engines` has brought one; and what proves one whole.

The converter renames tensors and reorders rows of queries and keys, so they are compared by what neither changes: how
many numbers a tensor has, their sum and the sum of their squares.
"""

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from inference.errors import InputError
from pipelines.exports.layouts import GAMMA, SERVED_BY_LLAMA_CPP, Engine
from pipelines.exports.layouts._shared import WEIGHTS_FILE
from pipelines.provenance import ROOT

NAME, FILE = "gguf", "draft.gguf"
ENGINES_FOLDER = Path(os.environ.get("DSPARK_ENGINES") or ROOT / ".engines")
"""What `make engines` makes."""
TYPES = {
    "transformers": "draft-simple",
    "eagle3": "draft-eagle3",
    "dflash": "draft-dflash",
    "dspark": "draft-dspark",
    "dspark_speculators": "draft-dspark",
}
"""Format that is converted -> llama.cpp's type of draft."""
_NOT_WEIGHTS = ("d2t", "t2d", "rope_freqs.weight")
_ROUNDING = 1e-6

Fingerprint = tuple[int, float, float]


@dataclass(frozen=True)
class Converter:
    """llama.cpp's converter.

    Attributes:
        python: interpreter with what it needs.
        folder: source tree of llama.cpp.
    """

    python: Path
    folder: Path

    def convert(self, model: Path, made: Path, *, target: Path | None = None, outtype: str = "f32") -> None:
        """Convert a model folder; `made` appears only when that went well.

        Args:
            model: folder with `config.json` and safetensors.
            made: file to write.
            target: folder of the target, whose tokenizer drafts of parts take over; None for whole models.
            outtype: arithmetic of matrices, in the converter's words.

        Raises:
            InputError: the converter failed; its last line says why.
        """
        command = [str(self.python), str(self.folder / "convert_hf_to_gguf.py"), str(model), "--outtype", outtype]
        command += ["--outfile", str(made)] + (["--target-model-dir", str(target)] if target is not None else [])
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "gguf-py")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode or not made.is_file():
            made.unlink(missing_ok=True)
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise InputError(f"llama.cpp's converter failed: {said[:300]}", where=str(model), mend="see its message")


def present(engines: Path | None = None) -> Converter | None:
    """The converter of `make engines`, or None where that was not run."""
    engines = engines or ENGINES_FOLDER
    found = Converter(engines / "venv" / "bin" / "python", engines / "llama.cpp")
    return found if found.python.is_file() and (found.folder / "convert_hf_to_gguf.py").is_file() else None


def engine(layout: str) -> Engine:
    """How llama.cpp is started with the file of a format."""
    command = (
        "python convert_hf_to_gguf.py $TARGET --outtype bf16 --outfile target.gguf && "
        f"llama-server -m target.gguf -md $DRAFT/{FILE} --spec-type {TYPES[layout]} --spec-draft-n-max {GAMMA}"
    )
    return Engine("llama.cpp", command, tried=SERVED_BY_LLAMA_CPP)


def check_whole(file: Path, model: Path) -> None:
    """Compare a GGUF file's tensors with those of the folder it was made from.

    Raises:
        InputError: unreadable, or a tensor was lost, changed or added.
    """
    from gguf import GGUFReader

    try:
        tensors = [tensor for tensor in GGUFReader(file).tensors if tensor.name not in _NOT_WEIGHTS]
        converted = [_fingerprint(_numbers(tensor)) for tensor in tensors]
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"unreadable GGUF: {error}", where=str(file), mend="export the pair again") from None
    stored = load_file(model / WEIGHTS_FILE)
    wanted = [_fingerprint(tensor.double().numpy()) for name, tensor in stored.items() if name not in _NOT_WEIGHTS]
    if not _same(converted, wanted):
        what = f"{len(converted)} tensors, {len(wanted)} in the folder it was made from, or other values in them"
        raise InputError(f"the GGUF file is not the draft: {what}", where=str(file), mend="export the pair again")


def _numbers(tensor: object) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """What a GGUF tensor holds; bf16 comes as raw bytes."""
    data = np.asarray(tensor.data)  # type: ignore[attr-defined]
    if data.dtype == np.uint8:
        return torch.from_numpy(data.copy()).view(torch.bfloat16).double().numpy()
    return data.astype(np.float64)


def _fingerprint(values: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> Fingerprint:
    return values.size, float(values.sum()), float((values**2).sum())


def _same(converted: Iterable[Fingerprint], wanted: Iterable[Fingerprint]) -> bool:
    """Whether two sets of tensors agree; sums of reordered numbers differ by rounding."""
    mine, theirs = sorted(converted), sorted(wanted)
    return [one[0] for one in mine] == [one[0] for one in theirs] and all(
        abs(a[k] - b[k]) <= _ROUNDING * max(1.0, a[2]) for a, b in zip(mine, theirs, strict=True) for k in (1, 2)
    )
