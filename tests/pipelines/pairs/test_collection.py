"""gc frees what nobody needs, in steps that a kill does not break; a rollback works after it."""

import shutil
from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines.locks import RegistryBusy, registry_lock
from pipelines.pairs.collection import IMPORT, lock_of
from pipelines.pairs.command import main
from pipelines.realign.cycle import Cycle, begin
from pipelines.registry import CHAMPION, alias_target, move_alias, next_version, read_log, versions
from tests.pipelines.pairs import fake


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five versions, each champion in its turn."""
    for index in range(5):
        fake.publish(tmp_path, speedup=1 + index / 10)
    return tmp_path


def gc(root: Path, *words: str) -> None:
    assert main(["gc", "pair", "--registry", str(root), *words]) == 0


def left(root: Path) -> list[str]:
    return [folder.name for folder in versions(root, "pair")]


def test_old_versions_go_but_not_the_one_to_roll_back_to(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gc(root, "--keep", "1")
    assert left(root) == ["v4", "v5"]
    said = capsys.readouterr().out
    assert "kept pair/v4: the champion to roll back to" in said and "removed pair/v1: " in said
    removed = [e for e in read_log(root) if e.get("event") == "removed"]
    assert [e["version"] for e in removed] == ["v1", "v2", "v3"] and all(e["bytes"] > 0 for e in removed)
    assert all(e["reason"] == "gc --keep 1" and e["digest"] for e in removed)
    assert main(["rollback", "pair", "--registry", str(root)]) == 0
    assert alias_target(root, "pair", CHAMPION) == "v4"
    assert main(["verify", "pair", "--all", "--registry", str(root)]) == 0
    with pytest.raises(InputError, match="v3, the champion before this one, was removed"):
        main(["rollback", "pair", "--registry", str(root)])


def test_champion_challenger_and_an_open_cycle_keep_their_versions(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    move_alias(root, "pair", CHAMPION, "v1", reason="by hand")
    move_alias(root, "pair", "challenger", "v2", reason="try")
    begin(root / "pair", Cycle("abc", "", "v3", "", "", 0, []))
    gc(root, "--keep", "1")
    assert left(root) == ["v1", "v2", "v3", "v5"]  # v5 is the newest, and the champion before
    said = capsys.readouterr().out
    for why in ("v1: champion", "v2: challenger", "v3: re-alignment abc is under way on it"):
        assert f"kept pair/{why}" in said


def test_a_dry_run_says_the_same_and_touches_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((root / "pair").rglob("*"))
    gc(root, "--keep", "2", "--dry-run")
    said = capsys.readouterr().out
    assert "would remove pair/v3" in said and said.splitlines()[-1].endswith(" would be freed")
    assert sorted((root / "pair").rglob("*")) == before
    gc(root, "--keep", "2")
    assert capsys.readouterr().out == said.replace("would remove", "removed").replace("would be freed", "freed")


def test_a_number_is_never_given_twice(root: Path) -> None:
    gc(root, "--keep", "1")
    assert next_version(root, "pair") == "v6"
    shutil.rmtree(root / "pair" / "v5")
    assert next_version(root, "pair") == "v6"


@pytest.mark.parametrize("keep", ["0", "-1"])
def test_at_least_one_version_is_kept(root: Path, keep: str) -> None:
    with pytest.raises(InputError, match="keep at least 1 version"):
        gc(root, f"--keep={keep}")


def test_gc_waits_for_no_other_run(root: Path) -> None:
    with registry_lock(root), pytest.raises(RegistryBusy, match="another run holds the registry"):
        gc(root)
    assert len(left(root)) == 5


def test_what_killed_runs_left_goes_and_what_is_in_use_stays(root: Path) -> None:
    pair = root / "pair"
    for name in (".partial-v6", f"{IMPORT}stale", f"{IMPORT}busy", "notes"):
        (pair / name).mkdir()
        (pair / name / "file").write_text("x", encoding="utf-8")
    (pair / ".champion.aside").symlink_to("v1")
    with lock_of(pair / f"{IMPORT}busy"):
        gc(root)
    assert {p.name for p in pair.iterdir() if not p.name.startswith(("v", ".lock"))} == {
        f"{IMPORT}busy",
        "notes",
        "champion",
    }
    gc(root)
    assert not (pair / f"{IMPORT}busy").exists()


@pytest.mark.parametrize("step", ["before_log", "before_delete"])
def test_a_killed_removal_is_ended_by_the_next(root: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    where = {"before_log": "add_to_log", "before_delete": "shutil.rmtree"}[step]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"pipelines.pairs.collection.{where}", killed)
        gc(root, "--keep", "1")
    assert left(root) == ["v2", "v3", "v4", "v5"] and (root / "pair" / ".removed-v1").is_dir()
    gc(root, "--keep", "1")
    assert left(root) == ["v4", "v5"] and not (root / "pair" / ".removed-v1").exists()
    removed = [e["version"] for e in read_log(root) if e.get("event") == "removed"]
    assert removed == ["v1", "v2", "v3"]


def test_another_pair_is_left_alone(root: Path) -> None:
    for _ in range(3):
        fake.publish(root, "other")
    gc(root, "--keep", "1")
    assert len(versions(root, "other")) == 3
    with pytest.raises(InputError, match=r"no pair 'pear'.*did you mean 'pair'"):
        main(["gc", "pear", "--registry", str(root)])
