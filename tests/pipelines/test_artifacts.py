"""An artifact is complete or absent, is found by what went into it, and knows when a file was changed."""

import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines import artifacts, provenance
from pipelines.artifacts import MANIFEST, Artifact, Spec, Store, Work
from pipelines.files import read_json, sha256_file, write_json

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Settings:
    temperature: float = 0.7
    folder: Path = Path("a")


def spec(*, temperature: float = 0.7, seed: int = 0, version: int = 1, source: str = "d1") -> Spec:
    return Spec("corpus", config=Settings(temperature), inputs={"target": source}, seed=seed, schema_version=version)


def write(work: Work, *, text: str = "text") -> None:
    (work.folder / "shards").mkdir(exist_ok=True)
    (work.folder / "shards" / "0.jsonl").write_text(text)
    work.metrics["responses"] = 3


def test_a_manifest_says_what_went_in_and_what_came_out(tmp_path: Path) -> None:
    with Store(tmp_path).create(spec(seed=5)) as work:
        write(work, text="abc")
    manifest = read_json(tmp_path / "corpus" / spec(seed=5).key / MANIFEST)
    # digest of "abc": FIPS 180-2, appendix B.1
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["files"] == {"shards/0.jsonl": {"sha256": digest, "bytes": 3}}
    assert manifest["config"] == {"temperature": 0.7, "folder": "a"}
    assert manifest["inputs"] == {"target": "d1"}
    assert (manifest["kind"], manifest["schema_version"], manifest["seed"]) == ("corpus", 1, 5)
    assert manifest["metrics"] == {"responses": 3}
    assert manifest["packages"].keys() >= {"python", "torch", "transformers"}
    assert len(manifest["code"]["source"]) == 64
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest["created"])
    assert manifest["argv"]
    took = manifest["took"]
    assert took.keys() == {"seconds", "resident_bytes", "device_bytes", "since_start", "resumed"}
    assert 0 <= took["seconds"] < 60 and took["resident_bytes"] > 2**20 and took["resumed"] is False
    assert work.artifact is not None and work.folder == work.artifact.path
    work.artifact.verify()


def test_what_it_took_is_no_part_of_it_and_tells_a_resumed_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Store(tmp_path / "resumed").create(spec()) as work:
        write(work)
        raise KeyboardInterrupt
    for place in ("resumed", "whole"):
        with Store(tmp_path / place).create(spec()) as work:
            write(work)
    resumed, whole = (Store(tmp_path / place).find(spec()) for place in ("resumed", "whole"))
    assert resumed is not None and whole is not None
    assert (resumed.manifest["took"]["resumed"], whole.manifest["took"]["resumed"]) == (True, False)
    assert resumed.digest == whole.digest


def test_the_key_is_made_of_everything_that_decides_the_result() -> None:
    keys = [spec(), spec(temperature=1.0), spec(seed=1), spec(version=2), spec(source="d2")]
    assert len({s.key for s in keys}) == 5
    assert spec().key == spec().key
    assert re.fullmatch("[0-9a-f]{16}", spec().key)


def test_nothing_is_found_before_it_is_complete(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.create(spec()) as work:
        write(work)
        assert store.find(spec()) is None
    found = store.find(spec())
    assert found is not None and found.metrics == {"responses": 3}
    assert store.find(spec(seed=1)) is None


def test_a_block_that_raises_leaves_its_work_for_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="killed"), store.create(spec()) as work:
        write(work, text="half")
        raise RuntimeError("killed")
    assert store.find(spec()) is None
    with store.create(spec()) as work:
        assert work.folder.name == f".partial-{spec().key}"
        assert (work.folder / "shards" / "0.jsonl").read_text() == "half"
    assert store.find(spec()) is not None


def test_obtain_makes_once_and_says_that_it_skips(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = []

    def make(work: Work) -> None:
        made.append(work)
        write(work)

    first = Store(tmp_path).obtain(spec(), make=make)
    assert "skipped" not in caplog.text
    second = Store(tmp_path).obtain(spec(), make=make)
    assert (len(made), first) == (1, second)
    assert f"corpus {spec().key}: unchanged, skipped" in caplog.text


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    made, started, go = [], threading.Event(), threading.Event()

    def make(work: Work) -> None:
        made.append(work)
        started.set()
        assert go.wait(20)
        write(work)

    threads = [threading.Thread(target=Store(tmp_path).obtain, args=(spec(),), kwargs={"make": make}) for _ in "ab"]
    threads[0].start()
    assert started.wait(20)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(20)
    assert len(made) == 1
    assert Store(tmp_path).find(spec()) is not None


KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines import artifacts
from tests_spec import spec, write
if sys.argv[2] == "before its name":
    artifacts._rename = lambda partial, final: os.kill(os.getpid(), signal.SIGKILL)
with artifacts.Store(Path(sys.argv[1])).create(spec()) as work:
    write(work, text="whole")
    if sys.argv[2] == "in the block":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("moment", "made_again"), [("in the block", True), ("before its name", False)])
def test_a_kill_leaves_nothing_half_made_and_the_rerun_ends_the_same(
    tmp_path: Path, moment: str, made_again: bool
) -> None:
    (tmp_path / "tests_spec.py").write_text(Path(__file__).read_text())
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed"), moment], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert Store(tmp_path / "killed").find(spec()) is None
    made = []

    def make(work: Work) -> None:
        made.append(work)
        write(work, text="whole")

    after = Store(tmp_path / "killed").obtain(spec(), make=make)
    unbroken = Store(tmp_path / "unbroken").obtain(spec(), make=make)
    after.verify()
    assert after.digest == unbroken.digest
    assert len(made) == 1 + made_again  # the unbroken one, and the killed one unless only its name was missing


def test_the_digest_covers_results_and_not_the_day(tmp_path: Path) -> None:
    digests = []
    for name, text in [("a", "x"), ("b", "x"), ("c", "y")]:
        with Store(tmp_path / name).create(spec()) as work:
            write(work, text=text)
            work.metrics["seconds"] = name
        assert work.artifact is not None
        work.artifact.manifest["created"] = name
        digests.append(work.artifact.digest)
    assert digests[0] == digests[1] != digests[2]


def test_kept_files_stay_outside_the_manifest_and_dropped_ones_go(tmp_path: Path) -> None:
    with Store(tmp_path).create(spec()) as work:
        write(work)
        (work.folder / "checkpoints" / "step-1").mkdir(parents=True)
        (work.folder / "checkpoints" / "step-1" / "model").write_text("large")
        (work.folder / "timings.json").write_text("{}")
        work.keep, work.drop = {"timings.json"}, {"checkpoints"}
    assert work.artifact is not None
    assert list(work.artifact.manifest["files"]) == ["shards/0.jsonl"]
    assert (work.artifact.path / "timings.json").is_file()
    assert not (work.artifact.path / "checkpoints").exists()
    work.artifact.verify()


def test_making_it_anew_replaces_it(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with Store(tmp_path).create(spec()) as work:
            write(work, text=text)
    assert work.artifact is not None
    assert (work.artifact.path / "shards" / "0.jsonl").read_text() == "new"
    work.artifact.verify()


@pytest.mark.parametrize(
    ("damage", "said"),
    [("change", "changed or damaged"), ("truncate", "changed or damaged"), ("remove", "is missing")],
)
def test_verify_names_the_bad_file(tmp_path: Path, damage: str, said: str) -> None:
    artifact = Store(tmp_path).obtain(spec(), make=write)
    file = artifact.path / "shards" / "0.jsonl"
    {
        "change": lambda: file.write_text("TEXT"),
        "truncate": lambda: file.write_text(""),
        "remove": file.unlink,
    }[damage]()
    with pytest.raises(InputError, match=rf"{said} \[.*shards/0\.jsonl\]: remove"):
        artifact.verify()


def write_many(work: Work) -> None:
    for number in range(12):
        (work.folder / f"{number:02}.bin").write_bytes(bytes([number]) * (1000 - number))


@pytest.mark.parametrize("processors", [1, 16])
def test_files_are_digested_one_by_one_or_side_by_side_with_the_same_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processors: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    artifact = Store(tmp_path).obtain(spec(), make=write_many)
    expected = {
        f"{n:02}.bin": {"sha256": hashlib.sha256(bytes([n]) * (1000 - n)).hexdigest(), "bytes": 1000 - n}
        for n in range(12)
    }
    assert list(artifact.manifest["files"].items()) == list(expected.items())
    artifact.verify()
    (artifact.path / "07.bin").unlink()
    (artifact.path / "03.bin").write_bytes(bytes(997))
    (artifact.path / "05.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"changed or damaged \[.*03\.bin\]: remove"):
        artifact.verify()  # the first of three


def test_no_file_is_hashed_twice_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(artifacts, "sha256_file", counted)
    for _ in range(2):
        assert Store(tmp_path).obtain(spec(), make=write_many).digest
    assert Store(tmp_path).find(spec()) is not None
    assert sorted(hashed) == [f"{number:02}.bin" for number in range(12)]


def test_what_is_not_a_manifest_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, {"kind": "corpus"})
    with pytest.raises(InputError, match=r"not the manifest of an artifact .*manifest\.json"):
        Artifact.load(tmp_path)


def test_a_full_disk_inside_the_block_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no space left on the disk"), Store(tmp_path).create(spec()):
        with open("/dev/full", "w") as full:
            full.write("x")
            full.flush()
    assert Store(tmp_path).find(spec()) is None
    Store(tmp_path).obtain(spec(), make=write).verify()  # and the lock was released


def test_secrets_are_hidden_and_ordinary_tokens_are_not() -> None:
    value = {"api_key": "x", "stop_token": "a", "max_new_tokens": 5, "server": {"hf_token": "y", "password": ""}}
    expected = {"api_key": "***", "stop_token": "a", "max_new_tokens": 5, "server": {"hf_token": "***", "password": ""}}
    assert provenance.redacted(value) == expected
    assert provenance.redacted({"url": "https://me:pw@host:80/v1"}) == {"url": "https://***@host:80/v1"}


def test_secrets_on_the_command_line_are_hidden() -> None:
    words = ["corpus=server", "corpus.api_key=abc", "+corpus.url=http://u:p@h/", "--auth-token", "t", "seed=1"]
    hidden = ["corpus=server", "corpus.api_key=***", "+corpus.url=http://***@h/", "--auth-token", "***", "seed=1"]
    assert provenance.redacted_argv(words) == hidden


def test_provenance_holds_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CANARY", "canary-value")
    assert "canary-value" not in str(provenance.collect())
