"""A target whose weights lie in several processes: transformers' own tensor-parallel plan, and one process that leads.

    torchrun --nproc-per-node 2 -m pipelines.cli score target.path=/models/large

Whether a target lies in several is decided by `inference.placement`.

The leader runs the ordinary program. Whenever it feeds its model, it announces what is fed, and the followers feed
their parts the same: whoever calls the model, by `CausalModel` or directly, need not know. Followers keep a mirror of
every cache; what the leader does to one between two passes (a rollback, a sibling that moves) is noted and repeated by
the mirrors before the next pass.

The draft is not repeated on the followers, and neither is anything random. Their part of a pass needs tokens and no
distribution, so a second copy of the draft would only cost memory and time, and a second random stream could only come
out of step: with one of each, no two processes can disagree about what was accepted.

Not data parallel: what has gradients runs on the leader alone, unless the others are called to it as a task of theirs
(`call_to`). Alone runs too whatever the leader starts as a process of its own, such as the check of a published pair,
which needs the whole target on one device.
"""

import functools
import gc
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from inference import processes
from inference.attention import current_override, current_siblings, masked_siblings
from inference.batch.cache import SlotCache
from inference.batch.ragged import Plan, ragged_logits
from inference.cache import RollbackCache
from inference.errors import InputError
from inference.loading import check_model_folder, load_causal_model
from inference.mirrored import Journal, MirroredCache, MirroredSlots
from inference.model import CausalModel, OutputHead
from inference.placement import Placement, placement
from inference.precision import is_packed
from inference.sharded import bare, gathered, load_part, settled

_LOG = logging.getLogger(__name__)
_FED = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}
_SAID: set[tuple[Path, int]] = set()
_EDITS = {"rollback", "move", "batch_select_indices", "join", "fork", "leave"}


Task = Callable[[processes.Group, dict[str, Any]], None]
"""Something all processes do together: the group, and what JSON can hold."""


def run(program: Callable[[], int], tasks: Mapping[str, Task] | None = None) -> int:
    """Run a program on the first of the processes that torchrun started, while the others hold parts of its targets.

    Args:
        program: as on one process; targets it loads by `load_target` may be spread over all. Returns its exit code.
        tasks: what else the others can be called to, by name (`call_to`).

    Returns:
        The program's exit code, on all processes that live.

    Raises:
        ProcessLost: the processes do not find each other. One that is lost later makes the program's own passes raise.
    """
    return processes.run(program, lambda group: _Follower(group, tasks or {}).serve())


def call_to(group: processes.Group, task: str, given: dict[str, Any]) -> None:
    """Call the other processes to something that this one will do as well; it is theirs to come to an end by itself.

    Raises:
        ProcessLost: one of them is gone.
    """
    group.announce({"do": "task", "task": task, "given": given, "dropped": _ledger(group).take_dropped()})


def load_target(
    folder: Path, *, precision: str, device: torch.device, attention: str = "sdpa", way: str = ""
) -> CausalModel:
    """A target in one arithmetic; of several processes this one holds it whole, or all do, by `inference.placement`.

    Args:
        folder: the model folder, at the same place for every process.
        precision: see `inference.precision`.
        device: where it runs; each process takes a GPU of its own.
        attention: transformers' attention implementation.
        way: of placing it, in place of what `inference.placement.placing` says.

    Raises:
        InputError: see `load_causal_model`; or what is asked for cannot be spread, or one process cannot load its part.
        ProcessLost: one of them is gone.
    """
    group = processes.current()
    if group is None:
        return load_causal_model(folder, precision=precision, device=device, attention=attention)
    check_model_folder(folder)
    placed = placement(folder, precision=precision, device=device, way=way)
    _say_once(folder, placed)
    if placed.processes == 1:
        return load_causal_model(folder, precision=precision, device=device, attention=attention)
    check_spread(precision=precision, device=device, size=group.size)
    gc.collect()  # a sharded model that was dropped is a cycle; its memory is wanted now
    ledger = _ledger(group)
    number = next(ledger.numbers)
    wanted = {"folder": str(folder.resolve()), "precision": precision, "attention": attention}
    group.announce({"do": "load", "number": number, "dropped": ledger.take_dropped(), **wanted})
    model = load_part(group, folder, precision=precision, attention=attention)
    target = ParallelModel(model, ledger=ledger, number=number, folder=folder, precision=precision)
    weakref.finalize(target, ledger.dropped.append, number)
    return target


def check_spread(*, precision: str, device: torch.device, size: int) -> None:
    """Refuse what a target cannot be spread with.

    Raises:
        InputError: packed weights, or another device than the processes have.
    """
    if is_packed(precision):
        raise InputError(
            f"packed weights ({precision}) cannot be spread over {size} processes",
            where="target.precision",
            mend="use fp32, bf16, fp16 or auto",
        )
    if (device.type == "cuda") != torch.cuda.is_available():
        raise InputError(
            f"the parts of a target lie on GPUs where there are any, not on {device}",
            where="target.device",
            mend="use target.device=auto",
        )


def _say_once(folder: Path, placed: Placement) -> None:
    """One line on where a target lies, for the first of its arithmetics."""
    if (said := (folder, placed.processes)) in _SAID:
        return
    _SAID.add(said)
    if placed.processes > 1:
        _LOG.info("the target is spread over %d processes: %s", placed.processes, placed.reason)
    else:
        level = logging.WARNING if placed.refused else logging.INFO
        _LOG.log(level, "the first process holds the target alone, the others wait: %s", placed.reason)


class _Ledger:
    """Numbers of what the leader has made and let go, models and caches alike."""

    def __init__(self, group: processes.Group) -> None:
        self.group = group
        self.numbers = itertools.count()
        self.dropped: list[int] = []

    def take_dropped(self) -> list[int]:
        """What was let go since last asked."""
        taken = self.dropped[:]
        del self.dropped[: len(taken)]
        return taken


@functools.cache
def _ledger(group: processes.Group) -> _Ledger:
    return _Ledger(group)


class ParallelModel(CausalModel):
    """The leader's part of a target, which behaves as the whole."""

    def __init__(self, model: PreTrainedModel, *, ledger: _Ledger, number: int, folder: Path, precision: str) -> None:
        super().__init__(model, folder=folder, precision=precision)
        self._ledger, self._number = ledger, number
        self._embedding: nn.Module | None = None
        self._whole_head: OutputHead | None = None
        announcer = _Announcer(ledger, number)
        announcer.attach(model, "model")
        announcer.attach(model.base_model, "base")

    def new_cache(self) -> RollbackCache:
        """See `CausalModel.new_cache`."""
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        journal = Journal(next(self._ledger.numbers))
        cache = MirroredCache(layers, journal, size=self._ledger.group.size)
        weakref.finalize(cache, self._ledger.dropped.append, journal.number)
        return cache

    def new_slots(self, *, max_slots: int, max_tokens: int) -> SlotCache:
        """See `CausalModel.new_slots`."""
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        journal = Journal(next(self._ledger.numbers), slots=[max_slots, max_tokens])
        size = self._ledger.group.size
        cache = MirroredSlots(layers, journal, size=size, max_slots=max_slots, max_tokens=max_tokens)
        weakref.finalize(cache, self._ledger.dropped.append, journal.number)
        return cache

    @property
    def embedding(self) -> nn.Module:
        """See `CausalModel.embedding`; gathered when first asked for, and kept."""
        if self._embedding is None:
            self._embedding = self.whole(self.model.get_input_embeddings())
        return self._embedding

    @property
    def head(self) -> OutputHead:
        """See `CausalModel.head`; gathered when first asked for, and kept."""
        if self._whole_head is None:
            linear = self.model.get_output_embeddings()
            tied = linear.weight is self.model.get_input_embeddings().weight and linear.bias is None
            if tied:
                whole = bare(linear, {"weight": self.embedding.get_parameter("weight")})
            else:
                whole = self.whole(linear)
            self._whole_head = OutputHead(self.model, linear=whole)
        return self._whole_head

    def whole(self, module: nn.Module) -> nn.Module:
        """See `CausalModel.whole`; gathered from all processes at every call."""
        name = next(name for name, found in self.model.named_modules() if found is module)
        group = self._ledger.group
        group.announce({"do": "gather", "number": self._number, "module": name, "dropped": self._ledger.take_dropped()})
        with group.together():
            return bare(module, gathered(module))

    def nbytes(self) -> int:
        """Bytes of weights, in all processes together; what all of them hold is counted once."""
        return sum({id(t): t.nbytes for t in (*self.model.parameters(), *self.model.buffers())}.values())


class _Announcer:
    """Makes what is fed to the leader's model known to the followers, before it is fed."""

    def __init__(self, ledger: _Ledger, number: int) -> None:
        self._ledger, self._number, self._inside = ledger, number, False

    def attach(self, module: nn.Module, part: str) -> None:
        """Announce every call of a module from outside the model."""
        forward = module.forward

        @functools.wraps(forward)
        def announced(*inputs: Any, **named: Any) -> Any:
            if self._inside:
                return forward(*inputs, **named)
            assert not inputs, "a target that is spread over processes takes its inputs by name"
            message = self._message(part, named)
            with self._pass():
                self._ledger.group.announce(message)
                return settled(forward(**named))

        vars(module)["forward"] = announced

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """Without gradients, whoever calls: with them transformers takes another way, which followers do not."""
        self._inside = True
        try:
            with self._ledger.group.together(), torch.no_grad():
                yield
        finally:
            self._inside = False

    def _message(self, part: str, named: dict[str, Any]) -> dict[str, Any]:
        assert named.keys() <= _FED, f"followers are not told of {sorted(named.keys() - _FED)}"
        cache, plan = named.get("past_key_values"), current_override()
        assert cache is None or isinstance(cache, MirroredCache | MirroredSlots), (
            "the cache is not one of this target's"
        )
        ragged = None
        if isinstance(cache, MirroredSlots):
            placement = cache.placement
            assert isinstance(plan, Plan) and placement is not None, "a slot cache takes part in ragged passes alone"
            ragged = {"widths": placement.widths, "active": placement.slots, "slots": plan.slots}
        return {
            "do": "pass",
            "number": self._number,
            "part": part,
            "fed": {name: _plain(value) for name, value in named.items() if name != "past_key_values"},
            "cache": None if cache is None else cache.journal.take(),
            "siblings": current_siblings(),
            "ragged": ragged,
            "dropped": self._ledger.take_dropped(),
        }


class _Follower:
    """Repeats what the leader announces, with its own parts of models and caches."""

    def __init__(self, group: processes.Group, tasks: Mapping[str, Task]) -> None:
        self.group, self.tasks = group, tasks
        self.models: dict[int, CausalModel] = {}
        self.caches: dict[int, RollbackCache | SlotCache] = {}

    def serve(self) -> int:
        """Do as announced until told to end; returns the exit code that was announced.

        Raises:
            ProcessLost: the leader or another follower is gone.
        """
        while True:
            message = self.group.hear()
            if message["do"] == "end":
                return int(message["code"])
            self._forget(message["dropped"])
            try:
                self._do(message)
            except InputError:
                pass  # the leader meets the same, and says so; of a part that cannot be loaded it was told

    def _do(self, message: dict[str, Any]) -> None:
        if message["do"] == "task":
            gc.collect()  # a sharded model that was dropped is a cycle; its memory is wanted now
            self.tasks[message["task"]](self.group, message["given"])
            return
        if message["do"] == "load":
            part = {name: message[name] for name in ("precision", "attention")}
            loaded = load_part(self.group, Path(message["folder"]), **part)
            self.models[message["number"]] = CausalModel(loaded, precision=message["precision"])
            return
        model = self.models[message["number"]]
        with self.group.together(), torch.inference_mode():
            if message["do"] == "gather":
                gathered(model.model.get_submodule(message["module"]))
            else:
                _feed(model, self._mirror(model, message["cache"]), message)

    def _mirror(self, model: CausalModel, told: dict[str, Any] | None) -> RollbackCache | SlotCache | None:
        """The mirror of the leader's cache, brought up to date; None for a pass without one."""
        if told is None:
            return None
        cache = self.caches.get(told["number"])
        if cache is None:
            limits = told["slots"]
            cache = model.new_slots(max_slots=limits[0], max_tokens=limits[1]) if limits else model.new_cache()
            self.caches[told["number"]] = cache
        for name, *given in told["edits"]:
            if name not in _EDITS:
                raise ValueError(f"no edit of a cache: {name}")
            if name == "batch_select_indices":
                given = [torch.tensor(given[0], device=model.device)]
            getattr(cache, name)(*given)
        return cache

    def _forget(self, dropped: list[int]) -> None:
        for number in dropped:
            self.caches.pop(number, None)
            if self.models.pop(number, None) is not None:
                gc.collect()  # a sharded model is a cycle


def _feed(model: CausalModel, cache: RollbackCache | SlotCache | None, message: dict[str, Any]) -> None:
    """One announced pass."""
    fed = {name: _tensor(value, model.device) for name, value in message["fed"].items()}
    if message["ragged"] is not None:
        assert isinstance(cache, SlotCache), "ragged passes go to slots"
        told, keep = message["ragged"], fed["logits_to_keep"]
        rows = keep if isinstance(keep, torch.Tensor) else torch.empty(0, dtype=torch.long) if keep else None
        tokens = fed["input_ids"][0]
        ragged_logits(model, tokens, told["widths"], cache, rows=rows, slots=told["slots"], active=told["active"])
        return
    module = model.model if message["part"] == "model" else model.model.base_model
    with masked_siblings(message["siblings"]):
        module(past_key_values=cache, **fed)


def _plain(value: Any) -> Any:
    return {"tensor": value.tolist()} if isinstance(value, torch.Tensor) else value


def _tensor(value: Any, device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    return torch.tensor(value["tensor"], dtype=None if value["tensor"] else torch.long, device=device)
