"""Memory that was freed goes back to the system, where the C library can be told to."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import re, torch
from pathlib import Path
from inference.memory import return_memory

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

large = torch.zeros(1 << 22); del large  # glibc has seen a large one freed: from now on it keeps such room
layers = [torch.zeros(1 << 18) for _ in range(300)]  # 300 MiB
last = torch.zeros(1 << 18)
del layers
before = held()
return_memory()
print(before - held())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc alone keeps what is freed"
)
def test_what_was_freed_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200


def test_another_c_library_only_collects_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    from inference import memory

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.return_memory()
