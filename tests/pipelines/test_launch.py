"""`dspark launch`: the words it gives torchrun, and the exit code it hands on."""

import sys
from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines import launch


def test_one_node_stands_alone() -> None:
    assert launch.torchrun(4, 1, 0, "") == [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"),
        *("--standalone", "-m", "pipelines.cli"),
    ]


def test_several_nodes_meet_at_the_first() -> None:
    words = launch.torchrun(8, 2, 1, "node0:1234")
    assert words[words.index("--nnodes") :] == [
        *("--nnodes", "2", "--node-rank", "1", "--master-addr", "node0", "--master-port", "1234"),
        *("-m", "pipelines.cli"),
    ]
    assert "29500" in launch.torchrun(8, 2, 0, "node0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "2", "build"], "several nodes need the address of the first one"),
        (["--processes", "-1", "build"], "-1 processes on node 0 of 1"),
        (["--processes", "2", "--nodes", "2", "--node", "2", "--master", "a"], "2 processes on node 2 of 2"),
    ],
)
def test_what_cannot_be_launched_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        launch.main(words)


@pytest.mark.parametrize(("left", "ended", "code"), [("3", 1, 3), (None, 1, 1), (None, 0, 0), ("0", 0, 0)])
def test_the_first_process_decides_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, left: str | None, ended: int, code: int
) -> None:
    # torchrun makes every failure a 1; what the first process left in the file says which it was.
    def run(words: list[str], file: Path) -> int:
        assert words[-2:] == ["build", "trainer=deepspeed"]
        if left is not None:
            file.write_text(left)
        return ended

    monkeypatch.setattr(launch, "_run", run)
    assert launch.main(["--processes", "2", "build", "trainer=deepspeed"]) == code
