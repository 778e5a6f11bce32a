"""Which conversations a draft learns from and is measured on, and what was left out or cut. Nothing goes silently."""

import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill.conversation import Chosen, Conversation
from inference.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """Conversations with something to learn from.

    Attributes:
        train: of the training split.
        validation: of the validation split.
        counts: samples: of `train`; validation_samples: of `validation`; samples_without_response: left out of either,
            because no token that can be learned from lies before the cut; samples_cut: longer than the cut, of those
            kept; tokens_cut: tokens they lose by it.
    """

    train: Chosen
    validation: Chosen
    counts: dict[str, int]


def select(
    samples: Sequence[Conversation], *, usable: Callable[[Conversation], bool], max_tokens: int, draft: str
) -> Selection:
    """Choose by split, count, and log the counts in one line.

    Args:
        samples: the whole corpus.
        usable: whether there is something to learn from in a conversation's first `max_tokens` tokens.
        max_tokens: longer ones are cut.
        draft: what learns, for the log.

    Raises:
        InputError: none to train on.
    """
    places = {"train": array("q"), "validation": array("q")}
    without = cut = tokens_cut = 0
    for place, sample in enumerate(samples):
        if sample.split not in places:
            continue
        if not usable(sample):
            without += 1
            continue
        places[sample.split].append(place)
        over = max(0, sample.num_tokens - max_tokens)
        cut, tokens_cut = cut + (over > 0), tokens_cut + over
    if not places["train"]:
        raise InputError("no training sample has a response", where="corpus", mend="build a larger corpus")
    counts = {
        "samples": len(places["train"]),
        "validation_samples": len(places["validation"]),
        "samples_without_response": without,
        "samples_cut": cut,
        "tokens_cut": tokens_cut,
    }
    logger.info(
        "%s learns from %d conversations, %d validate; %d have no response to learn from; %d cut at %d tokens lose %d",
        draft,
        counts["samples"],
        counts["validation_samples"],
        without,
        cut,
        max_tokens,
        tokens_cut,
    )
    return Selection(Chosen(samples, places["train"]), Chosen(samples, places["validation"]), counts)
