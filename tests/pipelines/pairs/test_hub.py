"""A version goes to the Hub in one commit, comes back whole, and nothing of the token is said."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from inference.errors import InputError
from pipelines.pairs import retries
from pipelines.pairs.command import main
from pipelines.pairs.hub import readme
from pipelines.registry import FILES_FILE, versions
from tests.pipelines.pairs import fake
from tests.pipelines.pairs.fake_hub import Hub, serving

TOKEN = "hf_SECRETSECRET"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub at hand, and a library that is not offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(retries, "BACKOFF_S", 0.0)
    with serving() as found:
        monkeypatch.setattr("pipelines.pairs.hub.hub_api", lambda: HfApi(endpoint=found.endpoint, token=TOKEN))
        yield found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fake.publish(tmp_path / "registry")
    return tmp_path / "registry"


def run(root: Path, *words: str) -> None:
    assert main([words[0], "--registry", str(root), *words[1:]]) == 0


def test_there_and_back(hub: Hub, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(root, "export", "pair", "hf://org/pair")
    assert hub.private == {"org/pair": True} and len(hub.commits) == 2  # the repository's own, and one for all files
    held = hub.files("org/pair")
    folder = root / "pair" / "v1"
    sent = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {name: held[name] for name in sent} == sent and set(held) - set(sent) == {"README.md", ".gitattributes"}
    run(tmp_path / "mine", "import", "hf://org/pair")
    run(tmp_path / "mine", "verify", "--all")
    [version] = versions(tmp_path / "mine", "pair")
    assert not (version / "README.md").exists() and not [p for p in version.rglob(".*")]
    assert (version / fake.WEIGHTS).read_bytes() == sent[fake.WEIGHTS]
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err and TOKEN not in (tmp_path / "mine" / "events.jsonl").read_text()
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_the_page_tells_the_hub_what_it_wants_to_know(hub: Hub, root: Path) -> None:
    run(root, "export", "pair", "hf://org/pair", "--public")
    page = hub.files("org/pair")["README.md"].decode()
    front, _, body = page.removeprefix("---\n").partition("\n---\n")
    assert hub.private == {"org/pair": False}
    assert {"library_name: dspark", "base_model: org/target", "- speculative-decoding"} <= set(front.splitlines())
    assert body.strip().startswith("# pair v1") and "dspark pairs import hf://org/pair" in body


@pytest.mark.parametrize(
    ("path", "base"),
    [("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("org/target", "org/target"), ("/models/mine", None)],
)
def test_the_page_names_a_target_that_the_hub_knows(path: str, base: str | None) -> None:
    front = readme({"target": {"path": path}, "draft": {}}, "# pair", where="hf://org/pair").split("---\n")[1]
    assert [line for line in front.splitlines() if "base_model" in line] == ([f"base_model: {base}"] if base else [])


def test_a_second_export_finds_the_first(hub: Hub, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(root, "export", "pair", "hf://org/pair")
    run(root, "export", "pair", "hf://org/pair")
    assert "is at hf://org/pair already, nothing to do" in capsys.readouterr().out and len(hub.commits) == 2


def test_another_version_needs_a_branch_of_its_own(hub: Hub, root: Path, tmp_path: Path) -> None:
    run(root, "export", "pair", "hf://org/pair")
    fake.publish(root, speedup=2.0)
    before = dict(hub.branches["org/pair"])
    with pytest.raises(InputError, match=r"another version is there \[hf://org/pair\]: .*@v2"):
        run(root, "export", "pair", "hf://org/pair")
    assert hub.branches["org/pair"] == before
    fake.publish(tmp_path / "new", "pair2")
    run(tmp_path / "new", "export", "pair2", "hf://org/pair2@v2")
    run(tmp_path / "mine", "import", "hf://org/pair2@v2")
    assert FILES_FILE not in hub.files("org/pair2", "main") and FILES_FILE in hub.files("org/pair2", "v2")


def test_files_that_are_no_part_of_the_version_are_left_alone(hub: Hub, root: Path) -> None:
    hub.branches["org/pair"] = {}
    hub.commit("org/pair", "main", {"model.safetensors": b"somebody's"})
    with pytest.raises(InputError, match=r"other files are there, such as model\.safetensors"):
        run(root, "export", "pair", "hf://org/pair")
    assert hub.files("org/pair") == {"model.safetensors": b"somebody's"}


def test_a_file_changed_on_the_hub_is_refused(hub: Hub, root: Path, tmp_path: Path) -> None:
    run(root, "export", "pair", "hf://org/pair")
    held = hub.files("org/pair")
    held[fake.WEIGHTS] = bytes(reversed(held[fake.WEIGHTS]))
    with pytest.raises(InputError, match=r"draft/model\.safetensors is damaged there"):
        run(tmp_path / "mine", "import", "hf://org/pair")
    held[fake.WEIGHTS] = b"cut"
    with pytest.raises(InputError, match=r"draft/model\.safetensors has 3 of \d+ bytes"):
        run(tmp_path / "mine", "import", "hf://org/pair")
    assert versions(tmp_path / "mine", "pair") == []


def test_a_hostile_listing_on_the_hub_is_refused(hub: Hub, tmp_path: Path) -> None:
    listing = {"../../owned": {"bytes": 1, "sha256": "0" * 64}}
    hub.branches["org/pair"] = {}
    hub.commit("org/pair", "main", {FILES_FILE: json.dumps(listing).encode(), "pair.json": b"{}"})
    with pytest.raises(InputError, match="which leads out of the folder"):
        run(tmp_path / "mine", "import", "hf://org/pair")


def test_a_busy_hub_is_asked_again_and_one_that_refuses_is_not(hub: Hub, root: Path, tmp_path: Path) -> None:
    run(root, "export", "pair", "hf://org/pair")
    hub.fail_next = [503, 503]
    run(tmp_path / "mine", "import", "hf://org/pair")
    hub.fail_next = [403]
    with pytest.raises(InputError, match=r"the store failed: .*403.*logged in and may do this"):
        run(tmp_path / "mine", "import", "hf://org/pair", "--as", "again")
    assert hub.fail_next == []


def test_nothing_there_is_said(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no pair is there \[hf://org/none\]: check the address, and that you may"):
        run(tmp_path, "import", "hf://org/none")


@pytest.mark.parametrize("where", ["hf://pair", "hf://datasets/org/pair", "hf://org/pa ir", "hf://"])
def test_an_address_that_is_no_repository_is_said(tmp_path: Path, where: str) -> None:
    with pytest.raises(InputError, match=r"is no repository: hf://user/repo"):
        run(tmp_path, "import", where)


def test_offline_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="unset HF_HUB_OFFLINE"):
        run(tmp_path, "import", "hf://org/pair")
