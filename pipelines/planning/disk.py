"""Bytes on disk: the corpus with what is kept of the target, checkpoints while training, and the drafts.

Layouts are those of `distill.corpus`, `distill.features` and `train.checkpoint`. Text is a guess; all else is exact for
the numbers of tokens given.
"""

from dataclasses import dataclass
from typing import Any

from distill.features import BYTES_PER_NUMBER, bytes_per_token, feature_bytes
from distill.responses.local import Config as LocalResponses
from inference.feature_networks import FeatureNetwork
from pipelines.planning.machine import GIB
from pipelines.planning.memory import state_bytes
from pipelines.planning.shapes import Student, count

# Token id and mask; length of a conversation; what JSON says of it besides its text, of about four letters a token.
_TOKEN_BYTES, _LENGTH_BYTES, _LINE_BYTES, _LETTERS = 4 + 1, 8, 400, 4
_FP32, _BF16, _INT64 = 4, 2, 8


@dataclass(frozen=True)
class Amount:
    """How much is written.

    Attributes:
        conversations: of the corpus.
        tokens: of all of them.
        written: of these the target's own.
    """

    conversations: int
    tokens: int
    written: int


def stated_tokens(corpus: Any, amount: Amount) -> int:
    """Tokens whose predicting state is kept with the corpus."""
    if not isinstance(corpus, LocalResponses) or not corpus.keep_states:
        return 0
    return amount.tokens - amount.conversations if corpus.keep_prompt_states else amount.written


def kept_layers(corpus: Any, amount: Amount, *, layers: int, hidden: int) -> list[int]:
    """Target layers whose features are kept with the corpus; none where they need more than `corpus.features_gib`."""
    if not isinstance(corpus, LocalResponses):
        return []
    taps = corpus.tapped_layers(layers)
    size = feature_bytes(tokens=amount.tokens, hidden=hidden, num_taps=len(taps), compressed=corpus.compress_features)
    return taps if size <= GIB * corpus.features_gib else []


def corpus_parts(corpus: Any, amount: Amount, *, kept: list[int], hidden: int) -> dict[str, float]:
    """Bytes of the corpus by part.

    Args:
        corpus: settings of whoever answers.
        amount: what is written.
        kept: layers whose features are kept.
        hidden: width of a layer of the target.
    """
    compressed = isinstance(corpus, LocalResponses) and corpus.compress_features
    return {
        "tokens": float(_TOKEN_BYTES * amount.tokens + _LENGTH_BYTES * amount.conversations),
        "states": float(stated_tokens(corpus, amount) * hidden * BYTES_PER_NUMBER),
        "features": float(
            feature_bytes(tokens=amount.tokens, hidden=hidden, num_taps=len(kept), compressed=compressed)
        ),
        "text": float(_LETTERS * amount.tokens + _LINE_BYTES * amount.conversations),
    }


def captured_bytes(corpus: Any, amount: Amount, *, taps: list[int], kept: list[int], hidden: int) -> float:
    """Bytes of what the build stage captures while a draft is trained, because the corpus lacks it.

    Args:
        corpus: settings of whoever answers.
        amount: what is written.
        taps: layers the draft reads; none for those that read tokens.
        kept: layers whose features are with the corpus.
        hidden: width of a layer of the target.
    """
    lacking = [] if set(taps) <= set(kept) else taps
    features = feature_bytes(tokens=amount.tokens, hidden=hidden, num_taps=len(lacking))
    states = 0 if stated_tokens(corpus, amount) else (amount.tokens - amount.conversations) * hidden * BYTES_PER_NUMBER
    return float(features + states)


def reference_bytes(amount: Amount, *, taps: int, hidden: int) -> float:
    """Bytes of DeepSpec's target cache for the same tokens and number of layers."""
    _, theirs = bytes_per_token(tokens=amount.tokens, stated=0, hidden=hidden, num_taps=taps)
    return theirs * amount.tokens


def checkpoint_bytes(trained: int, optimizer: str) -> float:
    """Bytes of one checkpoint: fp32 weights and the optimizer's state."""
    return (_FP32 + state_bytes(optimizer)) * trained


def draft_bytes(student: Student) -> float:
    """Bytes of a finished draft's weights: bf16, and the ids of a vocabulary of its own."""
    network = student.module
    if not isinstance(network, FeatureNetwork):
        return float(_BF16 * count(network.parameters()))
    own = _BF16 * count(network.own_tensors().values())
    if network.vocabulary is None:
        return float(own)
    return float(own + _INT64 * network.vocabulary.shape[0] + network.shape.vocab)
