"""Growing token ids turned into growing text: a piece is given out once its characters are complete.

Every step decodes the newest tokens and those before them alone, so that a long answer costs no more a token than a
short one. Knows nothing of stop strings or of who reads the text.
"""

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What bytes that do not make up a character yet are decoded to."""


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: of the model that answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # Tokens up to `_known` are shown. Those from `_before` to there are decoded along, since some tokenizers write
        # the first token of a text otherwise than later ones, as without its blank.
        self._before = self._known = self._shown = 0

    def add(self, tokens: list[int]) -> str:
        """The text that these tokens complete; special tokens have none."""
        self._tokens += tokens
        known = self._text(self._before, self._known)
        window = self._text(self._before, len(self._tokens))
        if window.endswith(_INCOMPLETE) or len(window) <= len(known):
            return ""
        self._before, self._known = self._known, len(self._tokens)
        self._shown += len(window) - len(known)
        return window[len(known) :]

    def finish(self) -> str:
        """What is left when nothing more comes: the last character may never have been completed."""
        rest = self._text(0, len(self._tokens))[self._shown :]
        self._shown += len(rest)
        return rest

    def _text(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True))
