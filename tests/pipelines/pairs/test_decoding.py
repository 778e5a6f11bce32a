"""A pair that went through a store decodes as it did where it was made."""

import shutil
from pathlib import Path

import pytest

from pipelines.pairs.command import main
from pipelines.pairs.digests import seal
from pipelines.registry import CHAMPION, alias_target, versions
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import run


@pytest.mark.slow
def test_an_exported_and_an_imported_pair_decode_alike(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    registry, mine = tmp_path / "registry", tmp_path / "mine"
    shutil.copytree(finished.place.registry, registry, symlinks=True)
    assert main(["export", "--registry", str(registry), "tiny", str(tmp_path / "out")]) == 0
    assert main(["import", "--registry", str(mine), str(tmp_path / "out"), "--champion"]) == 0
    cache = ["--cache", str(finished.place.cache), "--device", "cpu"]
    assert main(["verify", "--registry", str(mine), "tiny", "--decode", *cache]) == 0
    assert "requests gave the same tokens" in capsys.readouterr().out
    answers = set()
    for folder in (registry / "tiny" / "champion", tmp_path / "out", mine / "tiny" / "champion"):
        text, code = run(["generate", "--pair", str(folder), *cache, "--max-new-tokens", "8", "hello"])
        assert code == 0, text
        answers.add(text.partition("\n[")[0])
    assert len(answers) == 1


@pytest.mark.slow
def test_a_run_finds_an_imported_version_of_its_own_decision(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = finished.place.again(tmp_path / "place")
    shutil.copytree(finished.place.artifacts, place.artifacts, symlinks=True)
    out = tmp_path / "out"
    shutil.copytree(finished.place.champion, out)
    seal(out)
    assert main(["import", "--registry", str(place.registry), str(out)]) == 0
    text, code = run(place.words(stage="publish"))
    assert code == 0, text
    assert alias_target(place.registry, "tiny", CHAMPION) == "v1" and len(versions(place.registry, "tiny")) == 1
    assert main(["verify", "--registry", str(place.registry), "--all"]) == 0
