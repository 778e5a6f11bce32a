"""A version arrives whole or not at all, whatever kills, cuts or forges it on its way."""

import json
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import known_implementations

from inference.errors import InputError
from inference.pair_files import read_pair
from pipelines import cli
from pipelines.files import sha256_file
from pipelines.locks import RegistryBusy, registry_lock
from pipelines.pairs import fetching, importing, retries
from pipelines.pairs.collection import IMPORT
from pipelines.pairs.command import main
from pipelines.pairs.digests import check, seal
from pipelines.pairs.importing import bring
from pipelines.pairs.retries import retried, shown
from pipelines.pairs.stores import FsspecStore, LocalFolder, Store, open_store
from pipelines.registry import CHAMPION, FILES_FILE, alias_target, next_version, read_log, versions
from tests.pipelines.pairs import fake
from tests.pipelines.tiny import contents

KINDS = ("folder", "file", "memory")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits of the stores, noted and not waited."""
    waited: list[float] = []
    monkeypatch.setattr("pipelines.pairs.retries.time.sleep", waited.append)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    return waited


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fake.publish(tmp_path / "registry")
    return tmp_path / "registry"


@pytest.fixture(params=KINDS)
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address of each kind with nothing at it."""
    return {
        "folder": str(tmp_path / "out" / "v1"),
        "file": f"file://{tmp_path}/out/v1",
        "memory": "memory://bucket/pair/v1",
    }[str(request.param)]


def run(root: Path, *words: str) -> None:
    assert main([words[0], "--registry", str(root), *words[1:]]) == 0


def files_at(where: str) -> dict[str, int]:
    return open_store(where).sizes()


def overwrite(where: str, name: str, content: bytes) -> None:
    if where.startswith("memory"):
        fsspec.filesystem("memory").pipe_file(f"{where}/{name}", content)
    else:
        (Path(where.removeprefix("file://")) / name).write_bytes(content)


def kill_after(count: int, monkeypatch: pytest.MonkeyPatch, *, verb: str) -> list[str]:
    """Ctrl-C at the `count`-th file that a store moves; returns the names that were asked for."""
    asked: list[str] = []
    for kind in (LocalFolder, FsspecStore):
        real = getattr(kind, verb)

        def counted(self: Store, name: Any, *rest: Any, real: Any = real) -> None:
            asked.extend(name if isinstance(name, Mapping) else [name])
            if len(asked) == count:
                raise KeyboardInterrupt
            real(self, name, *rest)

        monkeypatch.setattr(kind, verb, counted)
    return asked


def test_there_and_back(root: Path, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(root, "export", "pair", where)
    there = files_at(where)
    folder = root / "pair" / "v1"
    assert there == {name: len(content) for name, content in contents(folder).items()}
    mine = tmp_path / "mine"
    fake.publish(mine, speedup=1.2)
    run(mine, "import", where)
    assert [p.name for p in versions(mine, "pair")] == ["v1", "v2"] and alias_target(mine, "pair", CHAMPION) == "v1"
    info = read_pair(mine / "pair" / "v2")
    assert (info["name"], info["version"]) == ("pair", "v2")
    came = info["imported"]
    assert (came["from"], came["name"], came["version"]) == (where, "pair", "v1")
    assert came["digest"] == sha256_file(folder / FILES_FILE)
    before, after = contents(folder), contents(mine / "pair" / "v2")
    assert {name for name in before if before[name] != after[name]} == {"pair.json", FILES_FILE}
    [event] = [e for e in read_log(mine) if "event" in e]
    assert (event["event"], event["version"], event["origin"]) == ("imported", "v2", where)
    assert event["digest"] == sha256_file(mine / "pair" / "v2" / FILES_FILE)
    run(mine, "verify", "--all")
    assert not [p for p in (mine / "pair").iterdir() if p.name.startswith(".")]


def test_the_same_content_is_taken_in_once(root: Path, where: str, tmp_path: Path) -> None:
    run(root, "export", "pair", where)
    run(root, "import", where)  # from where it was made
    assert [p.name for p in versions(root, "pair")] == ["v1"] and len(read_log(root)) == 1
    mine = tmp_path / "mine"
    for _ in range(2):
        run(mine, "import", where)
    assert [p.name for p in versions(mine, "pair")] == ["v1"] and len(read_log(mine)) == 1
    run(mine, "export", "pair", str(tmp_path / "further"))
    run(root, "import", str(tmp_path / "further"))  # and round again
    assert [p.name for p in versions(root, "pair")] == ["v1"]


def test_champion_moves_only_where_it_is_asked_for(root: Path, tmp_path: Path) -> None:
    run(root, "export", "pair", str(tmp_path / "out"))
    mine = tmp_path / "mine"
    run(mine, "import", str(tmp_path / "out"), "--as", "other")
    assert alias_target(mine, "other", CHAMPION) is None
    run(mine, "import", str(tmp_path / "out"), "--as", "other", "--champion")
    assert alias_target(mine, "other", CHAMPION) == "v1" and read_pair(mine / "other" / "champion")["name"] == "other"
    assert next_version(mine, "other") == "v2"


def test_an_export_of_a_version_older_than_seals_is_sealed(tmp_path: Path) -> None:
    fake.publish(tmp_path / "old", sealed=False)
    run(tmp_path / "old", "export", "pair", str(tmp_path / "out"))
    assert check(tmp_path / "out") == [] and (tmp_path / "out" / FILES_FILE).is_file()
    run(tmp_path / "old", "import", str(tmp_path / "out"))
    assert not (tmp_path / "old" / "pair" / "v2").exists()


def test_another_version_at_the_address_is_not_overwritten(root: Path, where: str) -> None:
    run(root, "export", "pair", where)
    run(root, "export", "pair", where)
    there = files_at(where)
    fake.publish(root, speedup=3.0)
    with pytest.raises(InputError, match="another version is there"):
        run(root, "export", "pair", where)
    assert files_at(where) == there


def test_other_files_at_the_address_are_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match=r"other files are there, such as thesis\.txt"):
        run(root, "export", "pair", str(tmp_path / "home"))
    with pytest.raises(InputError, match="not a folder"):
        run(root, "export", "pair", str(tmp_path / "home" / "thesis.txt"))
    with pytest.raises(InputError, match="inside the registry"):
        run(root, "export", "pair", str(root / "pair" / "v9"))
    assert list((tmp_path / "home").iterdir()) == [tmp_path / "home" / "thesis.txt"]


def test_a_damaged_version_is_not_handed_on(root: Path, where: str) -> None:
    (root / "pair" / "v1" / "MODEL_CARD.md").write_text("changed", encoding="utf-8")
    with pytest.raises(InputError, match=r"a file of pair/v1 has 7 bytes, not 19 \[.*MODEL_CARD.md\]"):
        run(root, "export", "pair", where)
    assert files_at(where) == {}


@pytest.mark.parametrize("count", [1, 3, 5, 6])
def test_a_killed_push_is_no_pair_and_goes_on(
    root: Path, where: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(count, patch, verb="put")
        run(root, "export", "pair", where)
    there = files_at(where)
    assert FILES_FILE not in there and len(there) == count - 1 and ("pair.json" in there) == (count == 6)
    if there:
        with pytest.raises(InputError, match=r"no whole pair is there \(files\.json is missing\) .*: run its export"):
            run(tmp_path / "mine", "import", where)
    if where.startswith("memory") and fake.WEIGHTS in there:
        overwrite(where, fake.WEIGHTS, b"y" * there[fake.WEIGHTS])  # as long, but not the same
        count -= 1
    with monkeypatch.context() as patch:
        asked = kill_after(0, patch, verb="put")
        run(root, "export", "pair", where)
    assert len(asked) == 6 - (count - 1) and asked[-1] == FILES_FILE
    run(tmp_path / "mine", "import", where)
    run(tmp_path / "mine", "verify", "--all")


def test_what_a_killed_copy_left_in_a_folder_goes(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "draft").mkdir(parents=True)
    (out / "draft" / ".model.safetensors.77.aside").write_bytes(b"half")
    run(root, "export", "pair", str(out))
    assert check(out) == [] and not list(out.rglob("*.aside"))


@pytest.mark.parametrize("count", [2, 4, 6])
def test_a_killed_import_leaves_no_version_and_goes_on(
    root: Path, where: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, "export", "pair", where)
    mine = tmp_path / "mine"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(count + 1, patch, verb="fetch")  # the first is files.json
        run(mine, "import", where)
    assert versions(mine, "pair") == [] and read_log(mine) == []
    with monkeypatch.context() as patch:
        asked = kill_after(0, patch, verb="fetch")
        run(mine, "import", where)
    # files.json and pair.json are looked at anew; of the five files, those that were fetched are not fetched again
    assert len(asked) == 2 + 5 - (count - 2)
    run(mine, "verify", "--all")


@pytest.mark.parametrize("step", ["add_to_log", "fsync_path"])
def test_a_kill_after_the_name_is_given_is_made_up_for(
    root: Path, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    run(root, "export", "pair", str(tmp_path / "out"))
    mine = tmp_path / "mine"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(importing, step, killed)
        run(mine, "import", str(tmp_path / "out"))
    assert read_log(mine) == [] and len(versions(mine, "pair")) == 1
    run(mine, "import", str(tmp_path / "out"))
    [event] = read_log(mine)
    assert (event["event"], event["version"]) == ("imported", "v1") and len(versions(mine, "pair")) == 1


@pytest.mark.parametrize("name", [fake.WEIGHTS, "pair.json", "serve/vllm/engine.json"])
def test_a_file_cut_or_changed_in_the_store_is_refused(root: Path, where: str, name: str, tmp_path: Path) -> None:
    run(root, "export", "pair", where)
    whole = (root / "pair" / "v1" / name).read_bytes()
    overwrite(where, name, whole[:-1])
    with pytest.raises(InputError, match=rf"{name} has {len(whole) - 1} of {len(whole)} bytes .*: export it again"):
        run(tmp_path / "mine", "import", where)
    overwrite(where, name, bytes([*whole[:-1], whole[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{name} is damaged there"):
        run(tmp_path / "mine", "import", where)
    assert versions(tmp_path / "mine", "pair") == []
    overwrite(where, name, whole)
    run(tmp_path / "mine", "import", where)
    run(tmp_path / "mine", "verify", "--all")


@pytest.mark.parametrize("name", ["../../../owned", "/tmp/owned", "draft/../../owned", "..\\owned"])
def test_a_listing_that_leads_out_of_the_folder_is_refused(where: str, name: str, tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "evil", "pair", "v1")
    seal(folder)
    listing = json.loads((folder / FILES_FILE).read_text())
    listing[name] = {"bytes": 1, "sha256": "0" * 64}
    open_store(where).put({"pair.json": folder / "pair.json"})
    overwrite(where, FILES_FILE, json.dumps(listing).encode())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"files.json names .*: do not trust this copy"):
        run(tmp_path / "mine", "import", where)
    assert sorted(tmp_path.rglob("*")) == before


def test_links_in_a_foreign_folder_are_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(root, "export", "pair", str(out))
    weights = out / fake.WEIGHTS
    shutil.move(weights, tmp_path / "secret")
    weights.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="a symbolic link in a version"):
        run(tmp_path / "mine", "import", str(out))


def test_a_pair_of_another_schema_is_refused(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "new", "pair", "v1", schema_version=2)
    seal(folder)
    with pytest.raises(InputError, match=r"pair\.json has schema 2"):
        run(tmp_path / "mine", "import", str(folder))
    assert not (tmp_path / "mine" / "pair").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "v3", "", ".hidden", "a b"])
def test_a_name_that_a_pair_may_not_have_is_refused(root: Path, name: str, tmp_path: Path) -> None:
    run(root, "export", "pair", str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"is no name for a pair \[--as\]"):
        run(tmp_path / "mine", "import", str(tmp_path / "out"), "--as", name)
    evil = fake.write(tmp_path / "evil", name, "v1")
    seal(evil)
    with pytest.raises(InputError, match="give it one with --as"):
        run(tmp_path / "mine", "import", str(evil))


def test_two_imports_at_once_end_with_each_version_once(root: Path, tmp_path: Path) -> None:
    fake.publish(root, speedup=2.0)
    for version in ("v1", "v2"):
        run(root, "export", f"pair/{version}", str(tmp_path / version))
    mine = tmp_path / "mine"
    taken: list[str] = []
    gate = threading.Barrier(6)

    def work(version: str) -> None:
        gate.wait()
        taken.append(bring(str(tmp_path / version), mine))

    threads = [threading.Thread(target=work, args=(version,)) for version in ("v1", "v2") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == ["pair/v1"] * 3 + ["pair/v2"] * 3
    assert [p.name for p in versions(mine, "pair")] == ["v1", "v2"] and len(read_log(mine)) == 2
    run(mine, "verify", "--all")


def test_a_registry_that_stays_busy_costs_no_second_download(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, "export", "pair", str(tmp_path / "out"))
    mine = tmp_path / "mine"
    monkeypatch.setattr(importing, "PATIENCE_S", 0.05)
    monkeypatch.setattr("pipelines.pairs.importing.time.sleep", lambda _: None)
    start = time.monotonic()
    with registry_lock(mine), pytest.raises(RegistryBusy, match="another run holds the registry"):
        run(mine, "import", str(tmp_path / "out"))
    assert time.monotonic() - start < 5
    [partial] = (mine / "pair").glob(f"{IMPORT}*")
    assert len(contents(partial)) == 5
    with monkeypatch.context() as patch:
        asked = kill_after(0, patch, verb="fetch")
        run(mine, "import", str(tmp_path / "out"))
    assert asked == [FILES_FILE, "pair.json"]


def test_a_full_disk_is_said_before_anything_is_fetched(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, "export", "pair", str(tmp_path / "out"))
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 5))
    with pytest.raises(InputError, match=r"it takes .* 5 B are free .*: free some space"):
        run(tmp_path / "mine", "import", str(tmp_path / "out"))


def test_a_flaky_store_is_asked_three_times(
    root: Path, tmp_path: Path, quick: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OSError("reset"), TimeoutError("slow")]
    real = FsspecStore.put

    def flaky(self: FsspecStore, files: Mapping[str, Path]) -> None:
        if failures:
            raise failures.pop()
        real(self, files)

    monkeypatch.setattr(FsspecStore, "put", flaky)
    run(root, "export", "pair", "memory://a/v1")
    assert quick == [retries.BACKOFF_S, 2 * retries.BACKOFF_S]
    failures += [OSError("reset")] * 3
    with pytest.raises(InputError, match=r"the store failed 3 times: OSError: reset \[memory://b/v1\]: run the same"):
        run(root, "export", "pair", "memory://b/v1")


def test_a_transfer_cut_short_is_repeated(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(root, "export", "pair", "memory://a/v1")
    real, cut = FsspecStore.fetch, [fake.WEIGHTS]

    def cutting(self: FsspecStore, name: str, to: Path) -> None:
        real(self, name, to)
        if name in cut:
            cut.remove(name)
            to.write_bytes(to.read_bytes()[:10])

    monkeypatch.setattr(FsspecStore, "fetch", cutting)
    run(tmp_path / "mine", "import", "memory://a/v1")
    assert cut == []
    run(tmp_path / "mine", "verify", "--all")


def test_a_store_that_says_no_is_asked_once(quick: list[float]) -> None:
    def forbidden() -> None:
        raise PermissionError("Access Denied for s3://key:SECRET@bucket/x?X-Amz-Signature=SECRET")

    with pytest.raises(InputError, match=r"the store failed: PermissionError: .*logged in") as said:
        retried(forbidden, where="s3://key:SECRET@bucket/x?X-Amz-Signature=SECRET")
    assert quick == [] and "SECRET" not in str(said.value)
    with pytest.raises(KeyError, match="ours"):
        retried(lambda: {}["ours"], where="x")


def test_addresses_are_shown_without_what_is_secret_in_them() -> None:
    assert shown("sftp://me:pass@host/path") == "sftp://host/path"
    assert shown("https://host/path?sig=abc") == "https://host/path"
    assert shown("hf://org/pair@v2") == "hf://org/pair@v2" and shown("/a/b@c") == "/a/b@c"


def test_a_missing_back_end_is_one_line_with_its_package(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = {"class": "nowherefs.NowhereFileSystem", "err": "install it"}
    monkeypatch.setitem(known_implementations, "nowhere", lacking)
    words = ["pairs", "export", "--registry", str(root), "pair"]
    assert cli.main([*words, "nowhere://bucket/x"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == "dspark: nowhere:// needs the package nowherefs [nowhere://bucket/x]: pip install nowherefs"
    assert cli.main([*words, "s4://bucket/x"]) == 2
    assert "unknown protocol 's4'" in capsys.readouterr().err


def test_an_exported_folder_is_a_pair_like_any_other(root: Path, tmp_path: Path) -> None:
    run(root, "export", "pair", str(tmp_path / "out"))
    assert read_pair(tmp_path / "out") == read_pair(root / "pair" / "v1")
    assert contents(tmp_path / "out") == contents(root / "pair" / "v1")
