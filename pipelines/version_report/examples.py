"""Worked examples: a few requests decoded again, with what the draft proposed and what became of it, token by token.

The decoder is not touched: the draft is wrapped in a recorder that passes everything on and remembers what was
proposed and how much of it stood. Written by the process that checks a new version, read by its report.

    write_examples(pair, checks, folder / "examples.json", domains={"gsm8k-1": "maths"})
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from inference.drafters import Drafter, Proposal, ReadsFeatures
from inference.errors import InputError
from inference.lookahead import Lookahead
from inference.pair import Pair
from inference.randomness import Source
from inference.records import tokens_digest
from inference.sampling_settings import SamplingSettings
from pipelines.files import read_json, write_json
from pipelines.verify import Check, repeat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES_FILE = "examples.json"
ACCEPTED, TARGET, REJECTED = "accepted", "target", "rejected"
MOST = 6
"""Examples written: enough to see how a draft behaves, few enough to read."""


@dataclass(frozen=True)
class Token:
    """One token of an example.

    Attributes:
        text: what it adds to the answer; empty for special tokens, and for all but the last token of a character.
        kind: `accepted` (the draft's, and stands), `target` (the target's own: a correction or the bonus) or
            `rejected` (proposed after the tokens before it in its round, and dropped).
        round: target pass it belongs to, from 1.
    """

    text: str
    kind: str
    round: int


@dataclass(frozen=True)
class Example:
    """One request, decoded again.

    Attributes:
        prompt: the user's message.
        domain: of the prompt; empty where unknown.
        temperature: it was decoded at.
        tau: emitted tokens per target pass.
        tokens: in the order in which a reader meets them: what stands, what was rejected, what the target added.
    """

    prompt: str
    domain: str
    temperature: float
    tau: float
    tokens: list[Token]

    @property
    def answer(self) -> str:
        """The answer's text, special tokens left out."""
        return "".join(token.text for token in self.tokens if token.kind != REJECTED)


@dataclass
class _Round:
    """One target pass: where it began, what was proposed, how much of the chain stood, what was emitted."""

    context_tokens: int
    proposal: Proposal
    num_accepted: int = 0
    emitted: list[int] = field(default_factory=list)

    def kinds(self) -> list[str]:
        """Of the emitted tokens. A sibling that stands is the draft's too.

        A rejected sibling is never what the target draws after it, since nothing of its chance is left there: so a
        token that equals a sibling of its place is that sibling.
        """
        number = self.num_accepted
        proposal = self.proposal
        siblings = [] if proposal.siblings is None else proposal.siblings.tolist()
        beside = {token for slot, token in zip(proposal.slots, siblings, strict=True) if slot == number}
        stood = number + (len(self.emitted) > number and self.emitted[number] in beside)
        return [ACCEPTED if index < stood else TARGET for index in range(len(self.emitted))]

    def dropped(self) -> list[int]:
        """Tokens of the chain that do not stand; none where a stop token ended the answer before them."""
        return self.proposal.tokens[self.num_accepted :].tolist() if len(self.emitted) > self.num_accepted else []


class _Recorder:
    """A draft that remembers its rounds; all else it leaves to the one it wraps."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.kind = drafter.kind
        self.rounds: list[_Round] = []

    def begin(self, prompt: torch.Tensor) -> None:
        """See `Drafter`; likewise below."""
        self._drafter.begin(prompt)

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        proposal = self._drafter.propose(
            context, limit=limit, lookahead=lookahead, settings=settings, generator=generator
        )
        self.rounds.append(_Round(context.shape[0], proposal))
        return proposal

    def rollback(self, num_accepted: int) -> None:
        self.rounds[-1].num_accepted = num_accepted
        self._drafter.rollback(num_accepted)

    def nbytes(self) -> int:
        return self._drafter.nbytes()

    def finished(self, tokens: list[int]) -> list[_Round]:
        """The rounds of a request, each with its share of the emitted tokens."""
        starts = [one.context_tokens - self.rounds[0].context_tokens for one in self.rounds]
        for one, (start, end) in zip(self.rounds, itertools.pairwise([*starts, len(tokens)]), strict=True):
            one.emitted = tokens[start:end]
        return self.rounds


class _FeatureRecorder(_Recorder):
    """The same for a draft that reads the target's features."""

    def __init__(self, drafter: Drafter, reader: ReadsFeatures) -> None:
        super().__init__(drafter)
        self._reader = reader
        self.taps = reader.taps

    def read(self, features: torch.Tensor) -> None:
        """See `ReadsFeatures`."""
        self._reader.read(features)


def recorder(drafter: Drafter) -> _Recorder:
    """A recorder for a draft."""
    return _FeatureRecorder(drafter, drafter) if isinstance(drafter, ReadsFeatures) else _Recorder(drafter)


def replay(pair: Pair, check: Check, *, domain: str = "") -> Example:
    """Decode a scored request again and note what became of every proposed token.

    The ordinary decoder does, which tells what was rejected: where captured rounds were scored, its answer is another
    sample of the same law.

    Args:
        pair: loaded from its files.
        check: the request, with the digest of its tokens.
        domain: of the prompt.

    Raises:
        InputError: it gave other tokens than its score.
    """
    recording = recorder(pair.drafter)
    decoded = repeat(pair, check, drafter=recording)
    if not check.captured_positions and tokens_digest(decoded.tokens) != check.digest:
        raise InputError(
            f"{check.prompt_id} at temperature {check.temperature:g} gave other tokens than its score",
            where=EXAMPLES_FILE,
            mend="same machine, versions and thread count as in cost_profile? then build the pair again",
        )
    tokens = _tokens(pair.target.tokenizer, recording.finished(decoded.tokens))
    return Example(check.user, domain, check.temperature, decoded.tau, tokens)


def _tokens(tokenizer: "PreTrainedTokenizerBase", rounds: Sequence[_Round]) -> list[Token]:
    answer = [token for one in rounds for token in one.emitted]
    texts = iter(pieces(tokenizer, answer))
    found: list[Token] = []
    seen: list[int] = []
    for number, one in enumerate(rounds, start=1):
        own = [Token(next(texts), kind, number) for kind in one.kinds()]
        stands = [*seen, *one.emitted[: one.num_accepted]]
        dropped = pieces(tokenizer, [*stands, *one.dropped()], start=len(stands))
        # After the accepted tokens, before what came in their place.
        found += own[: one.num_accepted]
        found += [Token(text, REJECTED, number) for text in dropped]
        found += own[one.num_accepted :]
        seen += one.emitted
    return found


def pieces(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int], *, start: int = 0) -> list[str]:
    """What each token adds to the text of all of them, special tokens left out.

    A character of several tokens comes with its last one. Joined, the pieces are the text that `tokens` decode to,
    less that of the first `start` of them.

    Args:
        tokenizer: of the target.
        tokens: ids.
        start: tokens at the beginning that get no piece.
    """

    def text(end: int) -> str:
        return str(tokenizer.decode(list(tokens[:end]), skip_special_tokens=True))

    whole = text(len(tokens))
    # A prefix that ends inside a character decodes to a replacement character, which the whole does not have there.
    ends = [_alike(text(end), whole) for end in range(start, len(tokens))] + [len(whole)]
    return [whole[low:high] for low, high in itertools.pairwise(itertools.accumulate(ends, max))]


def _alike(text: str, other: str) -> int:
    """Characters at the beginning that two texts share."""
    differ = (index for index, (own, its) in enumerate(zip(text, other, strict=False)) if own != its)
    return next(differ, min(len(text), len(other)))


def write_examples(
    pair: Pair, checks: Sequence[Check], path: Path, *, domains: Mapping[str, str] | None = None
) -> None:
    """Decode the first checks again and write what became of every token, whole or not at all.

    Args:
        pair: loaded from its files.
        checks: scored requests; the first `MOST` are taken.
        path: file to write.
        domains: of the prompts, by their ids, where known.

    Raises:
        InputError: a request gave other tokens than its score, or the file cannot be written.
    """
    known = domains or {}
    examples = [replay(pair, check, domain=known.get(check.prompt_id, "")) for check in checks[:MOST]]
    write_json(path, [asdict(example) for example in examples])


def read_examples(path: Path) -> list[Example]:
    """Read what `write_examples` wrote; none where there is no file.

    Raises:
        InputError: the file is something else.
    """
    if not path.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = read_json(path)
        examples = [Example(**{**row, "tokens": [Token(**token) for token in row["tokens"]]}) for row in rows]
    except (KeyError, TypeError) as error:
        raise InputError(f"not a list of examples: {error}", where=str(path), mend="publish the pair again") from None
    return [replace(example, tau=float(example.tau)) for example in examples]
