"""From the tokens of an answer to the text a client gets: stop strings end it and are no part of it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from inference.text_stream import TextStream


class StopText:
    """Looks for stop strings in text that comes in pieces, and holds back what may become one.

    Args:
        stops: none of them empty.

    Attributes:
        found: whether one has come; nothing is given out after that.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self.found = False

    def add(self, piece: str) -> str:
        """What of the text so far can be given out."""
        if self.found:
            return ""
        self._held += piece
        # The one that ends first is the one that is found, however the text is cut into pieces.
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            return self._held[: min(ends)[1]]
        return self._release(len(self._held) - self._open_end())

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        return given

    def _open_end(self) -> int:
        """Characters at the end that begin a stop string."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)


class AnswerText:
    """The text of one answer.

    Args:
        tokenizer: of the target.
        stops: stop strings.

    Attributes:
        tokens: of the answer, up to the one that completed a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._stream, self._stop = TextStream(tokenizer), StopText(stops) if stops else None
        self.tokens: list[int] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._stop is not None and self._stop.found

    def add(self, tokens: list[int]) -> str:
        """The text that these tokens add."""
        if self._stop is None:
            self.tokens += tokens
            return self._stream.add(tokens)
        pieces = []
        # One by one, so that where an answer ends does not depend on how many tokens a round emits.
        for token in tokens:
            if self._stop.found:
                break
            self.tokens.append(token)
            pieces.append(self._stop.add(self._stream.add([token])))
        return "".join(pieces)

    def finish(self) -> str:
        """What is left when nothing more comes."""
        if self._stop is None:
            return self._stream.finish()
        return "" if self._stop.found else self._stop.add(self._stream.finish()) + self._stop.finish()
