"""A corpus that several processes write: the bytes of one, whoever is killed, and who writes which shard."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from distill.responses.local import Config as LocalResponses
from inference import placement, processes
from inference.target import TargetConfig
from pipelines import corpus_shards
from pipelines.corpus_shards import Shards, dealt, sharing_group
from tests.pipelines.tiny import REPOSITORY, Workplace, contents, run

CORPUS = ("corpus.max_new_tokens=24", "corpus.batch_size=1")  # five shards of 18 conversations


def launch(words: Sequence[str], *, size: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.cli", "launch", "--processes", str(size), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out + err


def files(place: Workplace) -> dict[str, bytes]:
    """What the corpus holds, without who made it when."""
    return {name: content for name, content in contents(place.only("corpus")).items() if name != "manifest.json"}


@pytest.fixture(scope="module")
def alone(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace with the corpus that one process writes."""
    place = tiny_place.again(tmp_path_factory.mktemp("alone"))
    text, code = run(place.words(*CORPUS, stage="corpus"))
    assert code == 0, text
    return place


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(alone: Workplace, tmp_path: Path) -> None:
    place = alone.again(tmp_path / "two")
    said = finish(launch(place.words(*CORPUS, stage="corpus")))
    assert files(place) == files(alone)
    assert place.only("corpus").name == alone.only("corpus").name, "the number of processes is no part of a corpus"
    assert said.count("2 processes share out the corpus") == 1
    assert "corpus: 3 of 3 shards of each process" in said  # the first process alone talks
    assert "corpus: 3 shards in " in said


@pytest.mark.slow
def test_with_one_shard_the_other_process_is_idle(alone: Workplace, tmp_path: Path) -> None:
    words = (*CORPUS, "corpus.batch_size=18")
    one, two = (alone.again(tmp_path / name) for name in ("one", "two"))
    text, code = run(one.words(*words, stage="corpus"))
    assert code == 0, text
    said = finish(launch(two.words(*words, stage="corpus")))
    assert files(two) == files(one)
    assert "corpus: 1 of 1 shards, " in said


@pytest.mark.slow
def test_asked_for_a_spread_target_writes_the_corpus_though_it_fits_one_process(
    alone: Workplace, tmp_path: Path
) -> None:
    place = alone.again(tmp_path / "two")
    said = finish(launch(place.words(*CORPUS, "processes.corpus=tensor", stage="corpus")))
    assert said.count("the target is spread over 2 processes: as asked for") == 1
    assert "share out the corpus" not in said
    assert files(place).keys() == files(alone).keys()


def killed(place: Workplace, words: Sequence[str], *, first: bool) -> str:
    """What a run says whose first or last process is killed once a shard is there."""
    process = launch(place.words(*words, stage="corpus"))
    while not list(place.artifacts.glob("corpus/.partial-*/shard-*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    started = [(p.pid, p) for p in psutil.Process(process.pid).children(recursive=True)]
    ranks = sorted((pid, p) for pid, p in started if "--nproc-per-node" not in p.cmdline())
    ranks[0 if first else -1][1].kill()
    return finish(process, code=1)


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_line_and_a_rerun_completes(alone: Workplace, tmp_path: Path) -> None:
    words = (*CORPUS, "corpus.max_new_tokens=160")
    place, whole = (alone.again(tmp_path / name) for name in ("two", "whole"))
    said = killed(place, words, first=False)
    [line] = [line for line in said.splitlines() if line.startswith("dspark: ")]
    assert "another process of this run ended or does not answer" in line
    assert not place.complete("corpus")
    finish(launch(place.words(*words, stage="corpus")))
    text, code = run(whole.words(*words, stage="corpus"))
    assert code == 0, text
    assert files(place) == files(whole)


@pytest.mark.slow
def test_without_the_first_process_the_others_end(alone: Workplace, tmp_path: Path) -> None:
    words = (*CORPUS, "corpus.max_new_tokens=160")
    said = killed(alone.again(tmp_path / "two"), words, first=True)
    assert "dspark: " not in said  # it alone speaks; torchrun says which was killed


def test_shards_are_dealt_forth_and_back() -> None:
    # Later shards have longer prompts: 0 1 | 3 2 | 4 gives neither process the later one of every pair.
    assert [dealt([0, 1, 2, 3, 4], rank=rank, size=2) for rank in (0, 1)] == [[0, 3, 4], [1, 2]]
    assert [dealt([7], rank=rank, size=3) for rank in range(3)] == [[7], [], []]
    shares = [dealt(list(range(17)), rank=rank, size=4) for rank in range(4)]
    assert sorted(index for share in shares for index in share) == list(range(17))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_is_told_to_the_others_is_what_they_understand(tmp_path: Path) -> None:
    shards = Shards(
        folder=tmp_path / "corpus",
        target_folder=tmp_path / "target",
        target=TargetConfig(path="somewhere", device="cpu"),
        precision="bf16",
        corpus=LocalResponses(temperature=0.5, taps=[1, 2]),
        seed=3,
        taps=[1, 2],
        rows=[[4, 0], [2]],
    )
    assert Shards.from_plain(shards.plain()) == shards


class _Group:
    size = 2


@pytest.mark.parametrize(
    ("how", "heads", "spread_teacher", "room", "shared"),
    [
        ("auto", 4, False, 1.0, True),  # it fits, though it could be spread
        ("auto", 4, True, 1.0, False),  # said to be too large
        ("auto", 4, False, 0.0, False),  # too large
        ("auto", 3, True, 0.0, True),  # cannot be spread: nothing else is left
        ("tensor", 4, False, 1.0, False),
        ("tensor", 3, False, 1.0, True),
        ("data", 4, True, 0.0, True),
    ],
)
def test_who_writes_a_corpus(
    alone: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    heads: int,
    spread_teacher: bool,
    room: float,
    shared: bool,
) -> None:
    from pipelines.config import typed
    from tests.test_configs import composed

    folder = alone.root / "target"
    words = [f"processes.corpus={how}", f"target.spread_teacher={spread_teacher}", "target.device=cpu"]
    monkeypatch.setattr(processes, "_GROUP", _Group())
    monkeypatch.setattr(corpus_shards, "undivided", lambda folder, *, size: "heads" if heads % size else "")
    monkeypatch.setattr(placement, "_WEIGHTS_SHARE", room)
    assert (sharing_group(typed(composed(*words)), folder, precision="fp32") is not None) == shared
    assert sharing_group(typed(composed(*words, "corpus=server")), folder, precision="fp32") is None
    monkeypatch.setattr(processes, "_GROUP", None)
    assert sharing_group(typed(composed(*words)), folder, precision="fp32") is None


def test_an_unknown_way_is_refused() -> None:
    from pipelines.config import ProcessesConfig

    with pytest.raises(ValueError, match=r"processes.corpus is 'both'; use one of auto, data, tensor"):
        ProcessesConfig(corpus="both")
    with pytest.raises(ValueError, match=r"processes.decode is 'data'; use one of auto, one, tensor"):
        ProcessesConfig(decode="data")
