"""Processes of their own that run the command line and can be killed, without paying for the imports each time.

A server imports everything once and forks for every run: the child is a real process, with files and locks of its own,
and `kill -9` ends it as it would any other.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from tests.pipelines.tiny import REPOSITORY

SERVER = """
import json, os, sys
import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot
import rich.console, rich.table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from pipelines import cli, config, run
config.register()
sys.stdout.write("ready\\n"); sys.stdout.flush()
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(request["folder"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1); os.dup2(log, 2); os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = cli.main(request["words"])
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    sys.stdout.write(f"{child}\\n"); sys.stdout.flush()
    _, status = os.waitpid(child, 0)
    sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\\n"); sys.stdout.flush()
"""


class Runner:
    """Runs command lines one after the other, each in a process that can be killed. Use it as a context manager.

    Args:
        folder: where they are called, and where `run.log` holds what the latest printed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "run.log"

    def __enter__(self) -> "Runner":
        command = [sys.executable, "-c", SERVER]
        self._server = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._line() == "ready"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.kill()
        self._server.communicate()

    def start(self, words: Sequence[str]) -> int:
        """Start a run; returns its process id, which is also its process group."""
        assert self._server.stdin is not None
        self.log.unlink(missing_ok=True)
        request = {"words": list(words), "folder": str(self.folder), "log": str(self.log)}
        self._server.stdin.write(json.dumps(request) + "\n")
        return int(self._line())

    def end(self) -> int:
        """Wait for the run's exit code; -9 when it was killed."""
        return int(self._line())

    def run(self, words: Sequence[str]) -> int:
        """Run to the end."""
        self.start(words)
        return self.end()

    def said(self) -> str:
        """What the latest run has printed so far."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def wait_until_said(self, text: str, *, process: int) -> bool:
        """Wait until the latest run has printed something; False when it ends first."""
        return _wait(lambda: text in self.said(), process=process, what=text)

    def _line(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()


def kill_group(process: int) -> None:
    """Kill a run and what it started, at once and without a word."""
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        pass


def alive(process: int) -> bool:
    """Whether a run that nobody has waited for yet still works."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_there(path: Path, *, process: int) -> bool:
    """Wait for a file or folder; False when the run ends first."""
    return _wait(path.exists, process=process, what=str(path))


def _wait(condition: Callable[[], bool], *, process: int, what: str, limit_s: float = 60.0) -> bool:
    start = time.monotonic()
    while not condition():
        if not alive(process):
            return condition()
        assert time.monotonic() - start < limit_s, f"{what} never came"
        time.sleep(0.002)
    return True
