"""list, show, diff and verify say what is there, and one line what is wrong."""

import json
from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines import cli
from pipelines.pairs.command import main
from pipelines.pairs.naming import find
from pipelines.registry import EVENTS_FILE, FILES_FILE, read_log
from tests.pipelines.pairs import fake


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two versions of one pair, one of another."""
    registry = tmp_path / "registry"
    fake.publish(registry, speedup=1.5)
    fake.publish(registry, speedup=2.0)
    fake.publish(registry, "other", speedup=1.1, sealed=False)
    return registry


def pairs(root: Path, *words: str) -> int:
    return main([words[0], "--registry", str(root), *words[1:]])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_the_list_has_a_line_for_each_version(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pairs(root, "list") == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["pair", "aliases", "draft", "speedup", "tau", "target", "made", "size"]
    assert [row.split()[:2] for row in rows] == [["other/v1", "champion"], ["pair/v1", "-"], ["pair/v2", "champion"]]
    assert "seed (made)" in rows[2] and "2.00 [1.90, 2.10]" in rows[2] and "org/target 77777777" in rows[2]
    assert pairs(root, "list", "other") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_list_is_there_for_programs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pairs(root, "list", "--json", "pair") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["version"], first["aliases"], first["sealed"]) == ("v1", [], True)
    assert second["speedup"] == {"value": 2.0, "low": 1.9, "high": 2.1}
    folder = root / "pair" / "v2"
    assert second["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_a_broken_pair_does_not_hide_the_others(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "pair" / "v1" / "pair.json").write_text("{", encoding="utf-8")
    assert pairs(root, "list") == 0
    out = capsys.readouterr().out
    assert "unreadable: pair.json is not JSON" in out and "pair/v2" in out


def test_an_empty_registry_is_said_to_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pairs(tmp_path / "none", "list") == 0
    assert capsys.readouterr().out == f"no pairs in {tmp_path}/none: dspark publishes one\n"


def test_everything_about_one_version_is_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pairs(root, "show", "pair") == 0
    out = capsys.readouterr().out
    assert out.startswith("pair/v2  champion\n")
    for part in (
        "it is faster",
        "fp32, fixed lookahead of 4",
        "a machine",
        "draft/model.safetensors",
        "champion -> v2",
    ):
        assert part in out
    assert pairs(root, "show", "pair/v1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pair"], found["version"], found["info"]["version"]) == ("pair", "v1", "v1")
    assert fake.WEIGHTS in found["files"] and found["recorded"] == read_log(root)[0]["digest"]
    assert [(e["from"], e["to"]) for e in found["log"]] == [(None, "v1"), ("v1", "v2")]


@pytest.mark.parametrize(
    ("when_sampled", "when"), [({}, "greedy and captured"), ({"tree_when_sampled": True}, "captured")]
)
def test_a_tree_is_shown_in_few_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], when_sampled: dict[str, bool], when: str
) -> None:
    lookahead = {"kind": "fixed", "tokens": 4, "tree": {"paths": [[0], [1], [0, 0]], "lookup": 2}, **when_sampled}
    fake.publish(tmp_path, decoding={"precision": "bf16", "lookahead": lookahead})
    assert pairs(tmp_path, "show", "pair") == 0
    out = capsys.readouterr().out
    assert f"bf16, fixed lookahead of 4, trees of 5 when {when}\n" in out and "[0, 0]" not in out


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("piar", r"no pair 'piar' \[.*registry\]: did you mean 'pair'\?"),
        ("zzz", "there are other, pair"),
        ("pair/v3", r"no version 'v3' \[.*pair\]: there are v1, v2, champion"),
        ("pair/champoin", r"no version 'champoin' .*did you mean 'champion'"),
        ("pair/zzz", "there are v1, v2, champion"),
        ("../pair", "'..' is no name of a pair"),
        ("pair/../../x", r"no version '\.\./\.\./x'"),
        ("v1", "'v1' is no name of a pair"),
        ("", "'' is no name of a pair"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(root: Path, word: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        find(root, word)


def test_a_name_is_its_champion_an_alias_its_version_and_a_folder_itself(root: Path, tmp_path: Path) -> None:
    assert find(root, "pair").version == "v2" == find(root, "pair/champion").version
    assert find(root, "pair/v1").folder == root / "pair" / "v1"
    (root / "pair" / "champion").unlink()
    assert find(root, "pair").version == "v2"  # the newest
    apart = fake.write(tmp_path / "apart", "pair", "v7")
    assert find(root, str(apart)).root is None and find(root, str(apart)).label == str(apart)
    other = find(tmp_path / "elsewhere", str(root / "other" / "champion"))
    assert (other.root, other.label) == (root, "other/v1")


def test_an_alias_that_leads_nowhere_is_said(root: Path) -> None:
    (root / "pair" / "challenger").symlink_to("v9")
    with pytest.raises(InputError, match="challenger is v9, which is not there"):
        find(root, "pair/challenger")


def test_a_difference_names_settings_figures_and_files(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.publish(root, speedup=2.05, training={"steps": 20}, cost_profile={"device": "another", "versions": {}})
    (root / "pair" / "v3" / "extra.txt").write_text("x", encoding="utf-8")
    fake.seal(root / "pair" / "v3")
    assert pairs(root, "diff", "--json", "pair/v2", "pair/v3") == 0
    found = json.loads(capsys.readouterr().out)
    settings = {row["key"]: (row["left"], row["right"]) for row in found["settings"]}
    assert settings == {
        "training.steps": (10, 20),
        "cost_profile.device": ("a machine", "another"),
        "cost_profile.versions.torch": ("2", None),
    }
    assert found["not_comparable"][0] == "other devices (a machine; another)"
    assert {row["file"]: row["what"] for row in found["files"]} == {
        "MODEL_CARD.md": "changed",
        "draft/model.safetensors": "changed",
        "extra.txt": "added",
        "pair.json": "changed",
    }
    assert [row["apart"] for row in found["scorecards"]] == [False, False]  # 2.00 and 2.05, a tenth on either side
    assert pairs(root, "diff", "pair/v1", "pair/v2") == 0
    out = capsys.readouterr().out
    assert "apart" in out and "NOT comparable: prompts unknown" in out and "settings that differ: none" in out


def test_a_version_does_not_differ_from_itself(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pairs(root, "diff", "pair", "pair/champion") == 0
    out = capsys.readouterr().out
    assert "settings that differ: none" in out and "files that differ: none" in out


def test_a_whole_registry_verifies(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pairs(root, "verify", "--all") == 0
    other, first, second = capsys.readouterr().out.splitlines()
    assert other.startswith("other/v1: the draft is as it was published; the version is older than files.json")
    assert first == "pair/v1: 5 files as they were published" and second.startswith("pair/v2: 5 files")


@pytest.mark.parametrize("name", [fake.WEIGHTS, "pair.json", "MODEL_CARD.md", "serve/vllm/engine.json", FILES_FILE])
def test_a_flipped_bit_is_one_line_and_exit_code_2(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flip(root / "pair" / "v1" / name)
    words = ["pairs", "verify", "--registry", str(root)]
    assert cli.main([*words, "pair"]) == 0  # the champion is whole
    assert cli.main([*words, "pair", "--all"]) == 2
    said = capsys.readouterr()
    [line] = said.err.splitlines()
    assert line.startswith("dspark: a file of pair/v1 ") and f"v1/{name}]: put that file back from a copy" in line
    assert "pair/v2: 5 files as they were published" in said.out


def test_a_digest_moved_with_a_rollback_stays_the_first_one(root: Path) -> None:
    (root / "pair" / "v1" / "MODEL_CARD.md").write_text("forged", encoding="utf-8")
    fake.seal(root / "pair" / "v1")
    assert pairs(root, "rollback", "pair") == 0
    with pytest.raises(InputError, match="not the one that was recorded"):
        pairs(root, "verify", "pair")


def test_verify_sees_what_aliases_and_log_say(root: Path) -> None:
    alias = root / "pair" / "champion"
    alias.unlink()
    alias.symlink_to("v1")
    with pytest.raises(InputError, match="champion leads to v1, the log says v2"):
        pairs(root, "verify", "pair")
    alias.unlink()
    alias.symlink_to("v2")
    log = (root / EVENTS_FILE).read_text(encoding="utf-8").splitlines()
    (root / EVENTS_FILE).write_text("\n".join(log[1:]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="the log misses a move of champion"):
        pairs(root, "verify", "pair")
    (root / EVENTS_FILE).write_text("\n".join([log[0], log[1][:30]]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"not an entry of the log .*\[.*events.jsonl:2\]"):
        pairs(root, "verify", "pair")


def test_a_version_under_another_number_is_noticed(root: Path) -> None:
    (root / "pair" / "v1").rename(root / "pair" / "v5")
    with pytest.raises(InputError, match=r"pair\.json says it is pair/v1, not pair/v5"):
        pairs(root, "verify", "pair/v5")


def test_a_folder_outside_a_registry_verifies_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apart = fake.write(tmp_path / "apart", "pair", "v1")
    fake.seal(apart)
    assert pairs(tmp_path / "none", "verify", str(apart)) == 0
    assert "5 files as they were published (their seal is not in a log)" in capsys.readouterr().out
    flip(apart / fake.WEIGHTS)
    with pytest.raises(InputError, match="was changed"):
        pairs(tmp_path / "none", "verify", str(apart))


def test_verify_needs_a_name_or_all(root: Path) -> None:
    with pytest.raises(InputError, match="which pair"):
        pairs(root, "verify")


def test_decode_repeats_the_stored_requests(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("pipelines.verify.verify", lambda folder, *, cache, device: asked.append((folder, device)) or 3)
    assert pairs(root, "verify", "pair", "--decode", "--device", "cpu") == 0
    assert asked == [(root / "pair" / "v2", "cpu")]
