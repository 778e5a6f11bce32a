"""`dspark launch`: the same command line on several processes. It only finds the words for torchrun.

    dspark launch --processes 8 build trainer=replicated trainer.accumulation=64
    dspark launch --nodes 2 --node 0 --master node0:29500 build trainer=deepspeed trainer.accumulation=64

torchrun knows failure and success alone, so the first process leaves its exit code in a file.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from inference.errors import InputError

CODE_FILE = "DSPARK_CODE_FILE"
"""Environment variable with the file that gets the first process's exit code."""


def main(words: Sequence[str]) -> int:
    """Start the processes and wait for them.

    Args:
        words: options of this command, then the words that every process gets.

    Returns:
        The exit code of the first process; 1 where it left none.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(list(words))
    processes = options.processes or _devices()
    if processes < 1 or options.nodes < 1 or not 0 <= options.node < options.nodes:
        raise InputError(
            f"{processes} processes on node {options.node} of {options.nodes}",
            where="dspark launch",
            mend="use at least one process, and nodes numbered from 0",
        )
    if options.nodes > 1 and not options.master:
        raise InputError(
            "several nodes need the address of the first one", where="dspark launch", mend="add --master host:port"
        )
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        ended = _run([*torchrun(processes, options.nodes, options.node, options.master), *rest], code)
        return int(code.read_text()) if code.is_file() else 1 if ended else 0


def torchrun(processes: int, nodes: int, node: int, master: str) -> list[str]:
    """The words that start so many processes on this node."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if nodes == 1:
        return [*words, "--standalone", "-m", "pipelines.cli"]
    address, _, port = master.partition(":")
    where = ["--master-addr", address, "--master-port", port or "29500"]
    return [*words, "--nnodes", str(nodes), "--node-rank", str(node), *where, "-m", "pipelines.cli"]


def leave_code(code: int) -> None:
    """Note the first process's exit code where `main` looks for it."""
    if path := os.environ.get(CODE_FILE):
        Path(path).write_text(str(code), encoding="utf-8")


def _run(words: list[str], code: Path) -> int:
    """Run torchrun to its end; what tells this process to stop tells torchrun, which tells all others."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(words, env={**os.environ, CODE_FILE: str(code), "PYTHONPATH": path})
    before = {
        n: signal.signal(n, lambda number, _: process.send_signal(number)) for n in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _devices() -> int:
    """One process a GPU, or one."""
    import torch

    return max(1, torch.cuda.device_count())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dspark launch",
        description="Run any dspark command on several processes, by torchrun.",
        epilog="Everything else goes to dspark. Training takes all processes with trainer=replicated (each has the "
        "whole draft) or trainer=deepspeed; the shards of the corpus are shared out among them; other stages spread "
        "the target over them (tensor parallel) if it does not fit one device, and otherwise run on the first alone "
        "(processes.decode). All nodes must see the same artifacts folder.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=0, help="processes on this node (default: one a GPU)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes in all (default 1)")
    parser.add_argument("--node", type=int, default=0, help="number of this node, from 0")
    parser.add_argument("--master", default="", help="host:port of node 0 (with several nodes)")
    return parser
