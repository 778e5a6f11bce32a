"""What a drifting target is trained on and measured with: GSM8K's questions and answers, other domains' prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distill.chat import conversation_tokens, messages_for
from distill.prompts import Prompt, SourceContext, choose, package
from inference.errors import InputError, first_line
from pipelines.staleness import DOMAIN, OTHERS
from train.batches import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATASET = "gsm8k_train"  # rows 0-999; the rows after them are held out and this set never gives them
PROBE_FROM_ROW = 900
"""Rows from here on are not trained on: tau is measured on them."""


@dataclass(frozen=True)
class Example:
    """A conversation to learn from.

    Attributes:
        row: of the data set, from 0.
        tokens: the whole conversation.
        supervised: which of its tokens the target is to write: the answer and the token that ends it.
    """

    row: int
    tokens: list[int]
    supervised: list[bool]


def read_examples(tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int) -> list[Example]:
    """Rows 0-999 of GSM8K as conversations of the target, those of more than `max_tokens` left out.

    Raises:
        InputError: the package is missing or damaged, or the tokenizer has no chat template.
    """
    questions = package.Config(dataset=DATASET).read(SourceContext(tokenizer, 0))
    file = package.QUESTION_FILES[DATASET]
    [path] = [Path(str(f.locate())) for f in metadata.files(file.package) or [] if f.as_posix() == file.path]
    lines = path.read_text(encoding="utf-8").splitlines()
    examples = []
    for prompt in questions:
        try:
            answer = str(json.loads(lines[int(prompt.id)])["answer"]).strip()
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"row {prompt.id} has no answer ({first_line(error)})",
                where=str(path),
                mend="install the packages again with `make env`",
            ) from error
        messages = [*messages_for(prompt.turns), {"role": "assistant", "content": answer}]
        tokens, supervised = conversation_tokens(tokenizer, messages)
        if len(tokens) <= max_tokens:
            examples.append(Example(int(prompt.id), tokens, supervised))
    return examples


def split_examples(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """What is trained on, and what the loss is probed on.

    Raises:
        InputError: nothing to train on or nothing to probe.
    """
    training = [example for example in examples if example.row < PROBE_FROM_ROW]
    probe = [example for example in examples if example.row >= PROBE_FROM_ROW]
    if not training or not probe:
        raise InputError("no conversation is short enough", where="max_tokens", mend="allow longer ones")
    return training, probe


def read_probe_prompts(tokenizer: "PreTrainedTokenizerBase", *, count: int, seed: int) -> list[Prompt]:
    """Prompts that tau is measured on: `count` of the domain, none of them trained on, and a third of that of others.

    Raises:
        InputError: a package is missing or damaged.
    """
    context = SourceContext(tokenizer, seed)
    rows = package.Config(dataset=DATASET).read(context)
    chosen = choose([prompt for prompt in rows if int(prompt.id) >= PROBE_FROM_ROW], limit=count, seed=seed)
    for name in OTHERS.values():
        chosen += package.Config(dataset=name, limit=max(1, count // len((DOMAIN, *OTHERS)))).load(context)
    return chosen


def make_batch(examples: Sequence[Example], *, device: torch.device) -> Batch:
    """Pad conversations to one length.

    Returns:
        `tokens` int64 `[B, T]`, `attention` int64 `[B, T]`, and `labels` int64 `[B, T]`: the token that follows where
        it is to be learned, -1 elsewhere.
    """
    longest = max(len(example.tokens) for example in examples)
    tokens, attention, labels = (torch.full((len(examples), longest), fill) for fill in (0, 0, -1))
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = torch.tensor(example.tokens)
        attention[row, :length] = 1
        wanted = torch.tensor(example.supervised[1:])
        labels[row, : length - 1] = torch.where(wanted, torch.tensor(example.tokens[1:]), -1)
    return {"tokens": tokens.to(device), "attention": attention.to(device), "labels": labels.to(device)}


__all__ = ["Example", "make_batch", "read_examples", "read_probe_prompts", "split_examples"]
