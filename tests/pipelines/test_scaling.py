"""The command that measures how training scales, on two CPU processes: offload keeps the losses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.tiny import REPOSITORY, Workplace, read


@pytest.mark.slow
def test_with_offload_the_losses_are_the_same(tiny_place: Workplace, tmp_path: Path) -> None:
    words = [
        word
        for word in tiny_place.words("draft=[none,eagle3]", "lookahead.tokens=3")
        if not word.startswith(("paths.artifacts", "paths.registry", "hydra.", "trainer.steps", "trainer.checkpoint"))
    ]
    options = ["--folder", str(tmp_path / "out"), "--sizes", "2", "--stages", "--micros", "2", "--steps", "3"]
    command = [sys.executable, "-m", "pipelines.scaling", *options, "--offload", "optimizer", "all", "--", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = read(tmp_path / "out" / "scaling.json")["runs"]
    assert list(runs) == ["plain", "offload_optimizer", "offload_all"]
    for kind in ("optimizer", "all"):
        run = runs[f"offload_{kind}"]
        assert (run["size"], run["stage"], run["offload"]) == (2, 3, kind)
        assert len(run["losses"]) == 3 and run["off"] < 1e-5
        assert run["step_seconds"] > 0 and run["peak_memory_gib"] > 0
    assert "offload_all: 2 processes" in done.stdout
