"""`dspark report` writes one file where it is told to, and the same figures as pictures."""

import re
from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines.version_report.command import main
from tests.pipelines.version_report.versions import add_everything, write_version


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A version with everything."""
    root = tmp_path / "registry"
    folder = write_version(root)
    add_everything(folder, root)
    return folder


def test_it_writes_beside_the_caller_and_leaves_the_version_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in folder.iterdir())
    assert main(["registry/pair/champion"]) == 0
    assert capsys.readouterr().out == "pair-v1.html\n"
    page = (tmp_path / "pair-v1.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in folder.iterdir()) == before
    assert "--pair registry/pair/v1" in page and str(tmp_path) not in page, "as seen from here"


def test_every_figure_of_the_page_is_a_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), "--out", str(tmp_path / "r.html"), "--png", str(tmp_path / "png")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    pictures = sorted(p.stem for p in (tmp_path / "png").iterdir())
    assert pictures == sorted(re.findall(r'<figure id="figure-(.*?)"', page)) and len(pictures) == 15
    assert len(capsys.readouterr().out.splitlines()) == 16


def test_a_price_given_now_replaces_the_one_of_the_score(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    main([str(folder), "--out", str(out)])
    assert "No price per hour was given" in out.read_text(encoding="utf-8")
    main([str(folder), "--out", str(out), "--price-per-hour", "0.36"])
    page = out.read_text(encoding="utf-8")
    # 10 ms a token are 360 tokens for 0.36 / 3600 * 3.6: about 1.0 for a million.
    [cost] = re.findall(r'<th scope="row">none</th><td>([0-9.]+)</td><td>-</td>', page)
    assert float(cost) == pytest.approx(1.0, rel=0.1)


def test_a_load_that_lies_elsewhere_can_be_shown(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "load").mkdir()
    (folder / "load.json").rename(tmp_path / "load" / "load.json")
    out = tmp_path / "r.html"
    main([str(folder), "--out", str(out)])
    assert 'id="load"' not in out.read_text(encoding="utf-8")
    main([str(folder), "--out", str(out), "--load", str(tmp_path / "load")])
    assert 'id="load"' in out.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="cannot read the file"):
        main([str(folder), "--out", str(out), "--load", str(tmp_path)])


@pytest.mark.parametrize("price", ["-1", "nan", "inf"])
def test_what_is_no_price_is_refused(folder: Path, tmp_path: Path, price: str) -> None:
    with pytest.raises(InputError, match="a price of"):
        main([str(folder), "--out", str(tmp_path / "r.html"), f"--price-per-hour={price}"])


def test_a_place_without_a_version_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pair here"):
        main([str(tmp_path), "--out", str(tmp_path / "r.html")])
    assert not (tmp_path / "r.html").exists()


def test_a_copy_without_a_registry_has_no_history(folder: Path, tmp_path: Path) -> None:
    copy = folder.rename(tmp_path / "copy")
    main([str(copy), "--out", str(tmp_path / "r.html")])
    assert 'id="history"' not in (tmp_path / "r.html").read_text(encoding="utf-8")
