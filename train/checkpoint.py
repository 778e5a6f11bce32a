"""Checkpoints: safetensors for numbers, JSON for the rest, nothing pickled, and either whole or not there at all.

A checkpoint is a folder `step-00000120/` with `weights.safetensors` (trained parameters), `optimizer.safetensors`
(its tensors and the random states) and `state.json` (step, counters, the shape of the optimizer's state, a digest of
every file). It is written under another name, fsynced and renamed; on reading every digest is checked, and a damaged
checkpoint is passed over for the one before it. It holds no frozen parameter: those come from where the caller got
them.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

from train.errors import TrainingError

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_STATE, _WEIGHTS, _OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"


class DamagedCheckpoint(TrainingError):
    """A checkpoint that cannot be read back whole."""


@dataclass(frozen=True)
class Snapshot:
    """Everything needed to go on as if nothing had happened.

    Attributes:
        step: steps completed.
        weights: trained parameters by name.
        optimizer: the optimizer's state by parameter name, a tree of dicts, lists, tensors and plain values.
        rng: random states by device ("cpu", "cuda:0", ...), uint8 tensors.
        record: counters and metrics of the loop, plain JSON.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]
    record: dict[str, Any]


def flatten(tree: Any, *, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a tree into `tensors` and return its shape as JSON with a reference in each one's place.

    Raises:
        TrainingError: the tree holds something that is neither tensor, dict, list, tuple nor plain value.
    """
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": {str(k): flatten(v, name=f"{name}.{k}", tensors=tensors) for k, v in tree.items()}}
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [flatten(v, name=f"{name}.{i}", tensors=tensors) for i, v in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TrainingError(
        f"optimizer state {name} is a {type(tree).__name__}, which a checkpoint cannot hold",
        mend="use an optimizer whose state is tensors and plain numbers",
    )


def unflatten(shape: Any, *, tensors: dict[str, Tensor]) -> Any:
    """Rebuild the tree that `flatten` took apart."""
    ((kind, content),) = shape.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(value, tensors=tensors) for key, value in content.items()}
    if kind in ("list", "tuple"):
        items = [unflatten(value, tensors=tensors) for value in content]
        return items if kind == "list" else tuple(items)
    return content


def _names_in_order(module: nn.Module, optimizer: optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in the order its state dict numbers them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(module: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state by parameter name; hyper-parameters are the configuration's and stay out."""
    state = optimizer.state_dict()["state"]
    return {name: state[i] for i, name in enumerate(_names_in_order(module, optimizer)) if i in state}


def load_optimizer_state(module: nn.Module, optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a state from `optimizer_state` back; parameters without one start afresh."""
    numbered = {i: state[name] for i, name in enumerate(_names_in_order(module, optimizer)) if name in state}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})


def rng_states() -> dict[str, Tensor]:
    """Return torch's random states: the CPU's and every CUDA device's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states.update({f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    return states


def load_rng_states(states: dict[str, Tensor]) -> None:
    """Put random states back; those of devices this machine does not have are left out."""
    torch.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda:{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{i}"], i)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's trained parameters into a module, such as those of the best checkpoint.

    Raises:
        DamagedCheckpoint: the checkpoint is not whole.
        TrainingError: it holds parameters of another name or shape.
    """
    put_weights(module, read_snapshot(folder).weights, where=folder)


def put_weights(module: nn.Module, weights: dict[str, Tensor], *, where: Path) -> None:
    """Copy weights into the module's trainable parameters; the names and shapes must be the same.

    Raises:
        TrainingError: names or shapes differ.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    differ = sorted(set(trained) ^ set(weights)) or [n for n, p in trained.items() if p.shape != weights[n].shape]
    if differ:
        raise TrainingError(
            f"checkpoint and module differ in {len(differ)} parameters, first {differ[0]}",
            where=str(where),
            mend="train the same module as before, or remove the checkpoints to start afresh",
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def step_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def saved_steps(root: Path) -> list[int]:
    """Return the steps that have a checkpoint, whole or not, in rising order."""
    names = [p.name.removeprefix("step-") for p in root.glob("step-*") if p.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _record_digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to the CPU, contiguous, each with memory of its own: safetensors refuses shared memory."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        result[name] = own.clone() if storage in seen or own.storage_offset() else own
        seen.add(storage)
    return result


def _load(path: Path) -> dict[str, Tensor]:
    """Read tensors into memory of their own: safetensors maps the file, which would live on after its removal."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def write_snapshot(root: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint aside, force it to disk, and move it to its final name in one step.

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints are untouched and nothing half-made is left.
    """
    final, aside = step_folder(root, snapshot.step), root / f".partial-{snapshot.step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        shape = flatten(snapshot.optimizer, name="state", tensors=tensors)
        tensors.update({f"rng.{device}": state for device, state in snapshot.rng.items()})
        save_file(_separate(snapshot.weights), aside / _WEIGHTS)
        save_file(_separate(tensors), aside / _OPTIMIZER)
        body = {
            "format": _FORMAT,
            "step": snapshot.step,
            "optimizer": shape,
            "record": snapshot.record,
            "files": {name: _file_digest(aside / name) for name in (_WEIGHTS, _OPTIMIZER)},
        }
        (aside / _STATE).write_text(json.dumps({**body, "digest": _record_digest(body)}), encoding="utf-8")
        for path in (*(aside / name for name in (_WEIGHTS, _OPTIMIZER, _STATE)), aside):
            _sync(path)
        if final.exists():  # a damaged one that was passed over on resuming
            shutil.rmtree(final)
        os.rename(aside, final)
        _sync(root)
    except SafetensorError as error:  # what safetensors makes of a full disk
        shutil.rmtree(aside, ignore_errors=True)
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error), str(root)) from error
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def read_snapshot(folder: Path) -> Snapshot:
    """Read a checkpoint back and check every digest.

    Raises:
        DamagedCheckpoint: a file is missing, truncated or altered.
    """
    try:
        body = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        digest = body.pop("digest")
        if digest != _record_digest(body):
            raise ValueError(f"{_STATE} does not match its digest")
        if body["format"] != _FORMAT:
            raise ValueError(f"format {body['format']}, this version reads {_FORMAT}")
        for name, expected in body["files"].items():
            if _file_digest(folder / name) != expected:
                raise ValueError(f"{name} does not match its digest")
        weights, tensors = _load(folder / _WEIGHTS), _load(folder / _OPTIMIZER)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"checkpoint is damaged: {error}", where=str(folder)) from error
    return Snapshot(
        step=int(body["step"]),
        weights=weights,
        optimizer=unflatten(body["optimizer"], tensors=tensors),
        rng={name.removeprefix("rng."): state for name, state in tensors.items() if name.startswith("rng.")},
        record=body["record"],
    )


def newest_snapshot(root: Path) -> Snapshot | None:
    """Return the newest whole checkpoint, warning about each damaged one passed over; None if there is none."""
    for step in reversed(saved_steps(root)):
        try:
            return read_snapshot(step_folder(root, step))
        except DamagedCheckpoint as error:
            _LOG.warning("%s: passed over for an earlier one", error)
    return None


def rotate(root: Path, *, step: int, keep: int, best_step: int | None) -> None:
    """Remove checkpoints except the `keep` newest up to `step` and the best one.

    Anything later than `step` is left over from a line that was given up (a damaged checkpoint) and goes too.
    """
    known = saved_steps(root)
    kept = {*[s for s in known if s <= step][-keep:], best_step}
    for old in known:
        if old not in kept:
            shutil.rmtree(step_folder(root, old))
