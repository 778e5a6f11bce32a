"""One run writes a registry; a second is told who holds it; a killed one holds nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines.locks import RegistryBusy, registry_lock

HOLD = """
import sys, time
from pathlib import Path
from pipelines.locks import registry_lock
with registry_lock(Path(sys.argv[1])):
    sys.stdout.write("held\\n"); sys.stdout.flush()
    time.sleep(60)
"""


def hold(root: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    repository = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", HOLD, str(root)]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_who_holds_it_and_does_not_wait(tmp_path: Path) -> None:
    with hold(tmp_path / "registry") as process:
        started = time.monotonic()
        expected = rf"process {process.pid} on {socket.gethostname()} since 20\d\d-.*\[.*registry\]: wait"
        with pytest.raises(RegistryBusy, match=expected), registry_lock(tmp_path / "registry"):
            pass
        assert time.monotonic() - started < 5
        process.terminate()


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with registry_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock.json").read_text()


def test_it_is_free_again_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside"), registry_lock(tmp_path):
        raise RuntimeError("inside")
    with registry_lock(tmp_path):
        pass
    assert not (tmp_path / ".lock.json").exists()


def test_one_process_cannot_take_it_twice(tmp_path: Path) -> None:
    with registry_lock(tmp_path), pytest.raises(RegistryBusy, match=f"process {os.getpid()} on "):
        with registry_lock(tmp_path):
            pass


def test_a_registry_that_is_a_file_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "registry").write_text("")
    with (
        pytest.raises(InputError, match="a file stands where a folder is needed"),
        registry_lock(tmp_path / "registry"),
    ):
        pass
