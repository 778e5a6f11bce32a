"""The command that measures what several processes give: it ends, its figures are of what it says, tokens are equal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inference.errors import InputError
from inference.loading import load_causal_model
from pipelines.spreading.random_target import Shape, random_target
from pipelines.spreading.talk import Collectives
from tests.pipelines.tiny import REPOSITORY, Workplace, read

SHAPE = Shape(layers=2, width=64, heads=4, kv_heads=2, inner=96, context=512)
CPU = torch.device("cpu")


@pytest.mark.slow
def test_two_processes_decode_and_write_what_one_does(tiny_place: Workplace, tmp_path: Path) -> None:
    shape = ["--layers", "2", "--width", "64", "--heads", "4", "--kv-heads", "2", "--inner", "96"]
    few = ["--rounds", "2", "--prompts", "2", "--tokens", "8", "--loads", "2"]
    corpus = ["--shards", "3", "--shard", "2", "--corpus-tokens", "8"]
    words = ["--folder", str(tmp_path / "out"), "--like", str(tiny_place.root / "target"), *shape, *few, *corpus]
    command = [sys.executable, "-m", "pipelines.spreading", "--processes", "2", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "out" / "spreading.json")
    assert (found["processes"], found["weights"]) == (2, "random")

    passes, batch, corpus_found = found["fp32"]["passes"], found["fp32"]["batch"]["2"], found["corpus"]
    assert set(passes["same_tokens"].values()) == {passes["requests"]} == {2}
    assert set(batch["same_tokens"].values()) == {batch["requests"]} == {4}
    assert set(passes["agreeing_tokens"].values()) == {8}
    assert passes["tau"]["spread, look-up"] == passes["tau"]["one process, look-up"] >= 1
    for talk in passes["talk"].values():
        # Every pass is announced, and its two layers each add up twice, after attention and after the rest.
        assert talk["announcements"] >= 1 and talk["announced_bytes"] > 0 and talk["announce_seconds"] > 0
        assert talk["collectives"] >= 4 and talk["collective_bytes"] > 0 and talk["collective_seconds"] > 0
    assert passes["spread_over_one"]["target-only"]["value"] > 0

    assert corpus_found["same_bytes"] and corpus_found["conversations"] == 6
    assert sorted(share["shards"] for share in corpus_found["processes"]) == [1, 2]
    assert corpus_found["shared_out_over_one"]["low"] is not None
    lines = done.stdout.splitlines()
    assert any(line.startswith("passes, fp32, spread, look-up: ") and "same tokens 2 of 2" in line for line in lines)
    assert any(line.startswith("corpus, fp32: ") and "same bytes: True" in line for line in lines)


def test_a_random_target_is_an_ordinary_model_that_its_seed_decides(tiny_place: Workplace, tmp_path: Path) -> None:
    like = tiny_place.root / "target"
    folders = [
        random_target(tmp_path / name, SHAPE, like=like, seed=seed, device=CPU)
        for name, seed in (("a", 0), ("b", 0), ("b", 1))
    ]
    one, same, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == same != other
    model = load_causal_model(folders[0], precision="fp32", device=CPU)
    assert model.tokenizer.get_vocab() == load_causal_model(like, precision="fp32", device=CPU).tokenizer.get_vocab()
    written = (folders[0] / "model.safetensors").stat().st_mtime_ns
    random_target(tmp_path / "a", SHAPE, like=like, seed=0, device=CPU)
    assert (folders[0] / "model.safetensors").stat().st_mtime_ns == written, "it is written once"


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"kv_heads": 3}, {"layers": 0}])
def test_a_shape_that_is_none_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="no llama has"):
        Shape(**wrong)


def test_what_is_no_collective_is_not_counted() -> None:
    with Collectives() as counted:
        torch.ones(3) @ torch.ones(3)
    assert (counted.count, counted.nbytes) == (0, 0)
