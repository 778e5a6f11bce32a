"""What is learned from, what is left out, what is cut: counted and said."""

import logging
from functools import partial

import pytest
import torch

from distill.conversation import Chosen, Joined, Sample, responds_within
from distill.selection import select
from inference.errors import InputError


def _sample(index: int, *, length: int, first: int, split: str = "train") -> Sample:
    return Sample(
        id=f"p{index}",
        domain="chat",
        source="made",
        split=split,
        tokens=torch.arange(length),
        mask=torch.arange(length) >= first,
        states=None,
        text="",
    )


# Within ten tokens: two whole, two cut by 3 and 10 tokens, one whose response is behind the cut, one without any.
SAMPLES = [
    _sample(0, length=8, first=3),
    _sample(1, length=13, first=4),
    _sample(2, length=14, first=10),
    _sample(3, length=6, first=6),
    _sample(4, length=20, first=9, split="validation"),
    _sample(5, length=10, first=2, split="validation"),
]


def test_everything_is_counted_and_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="distill.selection"):
        selection = select(SAMPLES, usable=partial(responds_within, max_tokens=10), max_tokens=10, draft="pruned")
    assert [s.id for s in selection.train] == ["p0", "p1"]
    assert [s.id for s in selection.validation] == ["p4", "p5"]
    assert selection.counts == {
        "samples": 2,
        "validation_samples": 2,
        "samples_without_response": 2,
        "samples_cut": 2,
        "tokens_cut": 3 + 10,
    }
    assert [record.getMessage() for record in caplog.records] == [
        "pruned learns from 2 conversations, 2 validate; 2 have no response to learn from; 2 cut at 10 tokens lose 13"
    ]


def test_a_corpus_without_a_response_to_train_on_is_refused() -> None:
    with pytest.raises(InputError, match=r"no training sample has a response \[corpus\]: build a larger corpus"):
        select(SAMPLES, usable=lambda s: s.split == "validation", max_tokens=10, draft="pruned")


def test_shards_one_after_the_other_are_one_sequence() -> None:
    joined = Joined([SAMPLES[:2], [], SAMPLES[2:5], SAMPLES[5:]])
    assert list(joined) == SAMPLES and len(joined) == 6
    assert joined[-1] is SAMPLES[5] and joined[2] is SAMPLES[2]
    assert list(joined[1:4]) == SAMPLES[1:4]
    with pytest.raises(IndexError):
        joined[6]
    assert len(Joined([])) == 0


def test_chosen_conversations_are_a_sequence_of_their_own() -> None:
    chosen = Chosen(SAMPLES, [4, 0, 2])
    assert list(chosen) == [SAMPLES[4], SAMPLES[0], SAMPLES[2]]
    assert list(chosen[1:]) == [SAMPLES[0], SAMPLES[2]]
    with pytest.raises(IndexError):
        chosen[3]
