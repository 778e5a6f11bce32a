"""The processes of one run: who leads, what the leader tells the others, and how the loss of one ends them all.

Process 0 leads: it runs the program, alone. The others, its followers, hear what it announces and do their part; what
that is, this module does not know (`inference.parallel` does). Announcements are JSON over a group of their own, on the
CPU. A follower waits for the next one as long as it takes; whoever waits for another process in the middle of work that
all do together gives up after `PATIENCE`.

A process that dies closes its connections, which ends every wait for it at once. One that is stopped or hangs keeps
them, and is found out by `PATIENCE`. Only the leader says what happened; followers end without a word.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import distributed

from inference.errors import ProcessLost

PATIENCE = timedelta(seconds=20)
"""Longest wait for another process within work that all do at the same time, such as a pass."""
_START = timedelta(minutes=5)
_LOAD = timedelta(hours=2)
_IDLE = timedelta(days=365)
_GRACE_S = 3.0
_LINE_BYTES = 1024
_FAILED = 1
# How the libraries below say that a peer is gone; they raise plain RuntimeErrors.
_LOSS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "operation timed out", "broken pipe")


def is_loss(error: BaseException) -> bool:
    """Whether an exception of a collective operation means that another process is gone or does not answer."""
    words = str(error).lower()
    known = isinstance(error, RuntimeError) and any(word in words for word in _LOSS)
    return known or isinstance(error, distributed.DistError)


class Group:
    """The processes of this run.

    Attributes:
        rank: which of them this one is; 0 leads.
        size: how many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._over = threading.Event()
        self._turn = threading.RLock()
        self._teller: threading.Thread | None = None
        self._watchers: list[threading.Thread] = []
        self._voice = distributed.new_group(backend="gloo", timeout=_IDLE)
        self._pulse = distributed.new_group(backend="gloo", timeout=_IDLE)

    @property
    def lost(self) -> bool:
        """Whether another process is known to be gone."""
        return self._teller is not None

    def announce(self, message: dict[str, Any]) -> None:
        """Tell all followers something that JSON can hold.

        Raises:
            ProcessLost: one of them is gone.
        """
        text = json.dumps(message, separators=(",", ":")).encode()
        with self.together():
            for part in (torch.tensor([len(text)]), torch.frombuffer(bytearray(text), dtype=torch.uint8)):
                distributed.broadcast(part, 0, group=self._voice, async_op=True).wait(PATIENCE)

    def hear(self) -> dict[str, Any]:
        """Wait for the leader's next announcement.

        Raises:
            ProcessLost: the leader is gone.
        """
        with self.together():
            length = torch.zeros(1, dtype=torch.long)
            distributed.broadcast(length, 0, group=self._voice)
            text = torch.empty(int(length), dtype=torch.uint8)
            distributed.broadcast(text, 0, group=self._voice)
        message: dict[str, Any] = json.loads(bytes(text.tolist()))
        return message

    def lines(self, line: str) -> list[str]:
        """One line from every process, in the order of ranks; those who are late are waited for."""
        mine = torch.zeros(_LINE_BYTES, dtype=torch.uint8)
        text = bytearray(line.encode()[:_LINE_BYTES])
        if text:
            mine[: len(text)] = torch.frombuffer(text, dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with self.together():
            distributed.all_gather(every, mine, group=self._voice, async_op=True).wait(_LOAD)
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in every]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all processes do at the same time: the one place where a lost one becomes a `ProcessLost`.

        Raises:
            ProcessLost: another process ended, or did not answer in time.
        """
        if self.lost:
            raise self._loss()
        try:
            yield
        except (RuntimeError, ConnectionError) as error:
            if not is_loss(error):
                raise
            if not self._tells():
                time.sleep(_GRACE_S)  # the watching thread says it, and ends this process
            raise self._loss() from None

    def watch(self) -> None:
        """Let the leader learn of a follower's death whatever it is doing, and of being told to end."""
        for rank in range(1, self.size):
            self._watchers.append(threading.Thread(target=self._watch, args=(rank,), daemon=True))
            self._watchers[-1].start()
        signal.signal(signal.SIGTERM, self._told_to_end)

    def close(self) -> None:
        """Part in good order: followers say goodbye, so that their end is not taken for a loss."""
        self._over.set()
        if self.lost:
            return
        with self.together():
            if self.rank:
                distributed.send(torch.zeros(1), 0, group=self._pulse)
            distributed.barrier(self._voice, async_op=True).wait(PATIENCE)
        # All goodbyes were said. A thread still inside a library when the interpreter ends would abort the process.
        for watcher in self._watchers:
            watcher.join(PATIENCE.total_seconds())
        distributed.destroy_process_group()

    def _watch(self, rank: int) -> None:
        """Wait for a goodbye. A connection that closes without one is a loss, which the leader is given a moment to
        notice by itself: then it ends in good order."""
        try:
            distributed.recv(torch.zeros(1), rank, group=self._pulse)
        except RuntimeError:
            until = time.monotonic() + _GRACE_S
            while time.monotonic() < until and not self.lost:
                time.sleep(0.05)
            if not self._over.is_set() and self._tells():
                sys.stderr.write(f"dspark: {self._loss()}\n")
                leave(_FAILED)

    def _told_to_end(self, number: int, frame: FrameType | None) -> None:
        """torchrun tells all others to end when one process has ended badly."""
        if not self.lost and self._tells():
            raise self._loss()

    def _tells(self) -> bool:
        """Whether it is this thread that says what happened: the first one to ask."""
        with self._turn:
            if self._teller is None:
                self._teller = threading.current_thread()
            return self._teller is threading.current_thread()

    def _loss(self) -> ProcessLost:
        return ProcessLost(
            "another process of this run ended or does not answer",
            where=f"{self.size} processes",
            mend="see its own message or the system's (out of memory?), then run the same command again",
        )


def leave(code: int) -> NoReturn:
    """End this process at once: libraries that wait for a lost one when they are torn down are not torn down."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_GROUP: Group | None = None


def current() -> Group | None:
    """The group this process leads, inside `run`; None for a run of one process."""
    return _GROUP


def num_processes() -> int:
    """Processes of this run."""
    return 1 if _GROUP is None else _GROUP.size


def run(program: Callable[[], int], serve: Callable[[Group], int]) -> int:
    """Run a program on the leader, and let the followers serve it until it ends.

    Args:
        program: returns its exit code.
        serve: what a follower does; returns the exit code that the leader announced.

    Returns:
        The exit code of this process.

    Raises:
        ProcessLost: on the leader, when the processes do not find each other.
    """
    global _GROUP
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c reaches all of them, and the leader decides
        return _follow(rank, size, serve)
    _GROUP = _joined(rank, size)
    _GROUP.watch()
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]  # a process that the program starts is none of these
    code = _FAILED
    try:
        code = program()
    finally:
        _part(_GROUP, code)
    if _GROUP.lost:
        leave(code)
    _GROUP = None
    return code


def _joined(rank: int, size: int) -> Group:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, rank=rank, world_size=size, timeout=_START)
        return Group(rank, size)
    except (RuntimeError, ValueError):
        raise ProcessLost(
            f"the {size} processes of this run did not find each other",
            where="torchrun",
            mend="start all of them, with the same rendezvous address",
        ) from None


def _follow(rank: int, size: int, serve: Callable[[Group], int]) -> int:
    try:
        group = _joined(rank, size)
        code = serve(group)
        group.close()
    except ProcessLost:
        leave(_FAILED)
    return code


def _part(group: Group, code: int) -> None:
    """Tell the followers to end; that one is gone no longer matters."""
    try:
        group.announce({"do": "end", "code": code})
        group.close()
    except ProcessLost:
        pass
