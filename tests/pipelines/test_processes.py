"""The command line under torchrun: stages run once, on the first process, over a target that lies there or in two."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.pipelines.tiny import REPOSITORY, Workplace, read, run, token_digests

WORDS = ["draft=[none,lookup,eagle3]", "lookahead.tokens=3", "trainer.steps=3"]


def torchrun(words: Sequence[str], *, size: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, "-m", "pipelines.cli", *words], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_stages_run_once_over_a_target_in_two_processes(tiny_place: Workplace, tmp_path: Path) -> None:
    place = tiny_place.again(tmp_path / "two")
    done = torchrun(place.words(*WORDS, "processes.decode=tensor"))
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("the target is spread over 2 processes: as asked for") == 1
    manifest = read(place.only("score") / "manifest.json")
    assert "2 processes" in manifest["config"]["device"]
    assert done.stdout.count("precision   target-only fp32") == 1
    digests = token_digests(place.only("score"))
    greedy = {(prompt, arm): digest for (prompt, temperature, arm), digest in digests.items() if not temperature}
    assert {arm for _, arm in greedy} == {"none", "lookup", "eagle3"}
    assert all(digest == greedy[prompt, "none"] for (prompt, _), digest in greedy.items())
    assert place.champion.is_dir()


@pytest.mark.slow
def test_a_target_that_fits_one_process_is_decoded_there(tiny_place: Workplace, tmp_path: Path) -> None:
    one, two = (tiny_place.again(tmp_path / name) for name in ("one", "two"))
    words = ["draft=[none,lookup]", "lookahead.tokens=3"]
    text, code = run(one.words(*words))
    assert code == 0, text
    done = torchrun(two.words(*words))
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert said.count("the first process holds the target alone, the others wait: 0.00 GiB of weights in fp32") == 1
    assert "is spread over" not in said
    assert two.only("score").name == one.only("score").name, "the number of processes is no part of a score"
    assert token_digests(two.only("score")) == token_digests(one.only("score"))


def test_what_the_command_line_refuses_is_said_once_under_torchrun(tiny_place: Workplace, tmp_path: Path) -> None:
    place = tiny_place.again(tmp_path / "two")
    done = torchrun(place.words("target.path=/nowhere/at/all", stage="corpus"))
    assert done.returncode != 0
    assert done.stderr.count("dspark: no such model folder [/nowhere/at/all]") == 1
    assert "exitcode  : 2" in done.stderr
