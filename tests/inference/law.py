"""Exact output laws over a tiny vocabulary: every random decision of the decoder's own code, with its probability."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from inference.decoder import decode
from inference.drafters import Drafter
from inference.lookahead import Lookahead
from inference.model import CausalModel
from inference.request import Request
from inference.sampling import token_probs
from inference.sampling_settings import SamplingSettings

VOCAB = 3
PROMPT = torch.tensor([0, 1, 0, 1])
LENGTH = 3

Law = dict[tuple[int, ...], float]


def tiny_model(seed: int, *, layers: int = 2, hidden: int = 16, vocab: int = VOCAB, spread: float = 6.0) -> CausalModel:
    """A random llama in fp64 whose distributions are far from uniform, so that a wrong law shows."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=spread / parameter.shape[1])
    return CausalModel(model)


class TokenCache:
    """A stand-in cache that remembers tokens; a rollback that is left out shows in every later row."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def rollback(self, length: int) -> None:
        del self.tokens[length:]

    def move(self, source: int, destination: int) -> None:
        self.tokens[destination] = self.tokens[source]

    def nbytes(self) -> int:
        return 0


def prefixes(cache: TokenCache, tokens: torch.Tensor, slots: Sequence[int]) -> list[tuple[int, ...]]:
    """What each token of a pass stands at the end of, siblings after the chain; the cache takes them all."""
    held, fed = tuple(cache.tokens), tuple(tokens.tolist())
    cache.tokens += fed
    chain = len(fed) - len(slots)
    found = [held + fed[: i + 1] for i in range(chain)]
    return found + [held + fed[: 1 + slot] + (sibling,) for slot, sibling in zip(slots, fed[chain:], strict=True)]


class MemoModel(CausalModel):
    """A model whose rows are computed once per prefix, uncached: enumeration repeats its passes thousands of times."""

    takes_siblings = True

    def __init__(self, inner: CausalModel) -> None:
        super().__init__(inner.model)
        self.inner = inner
        self.rows: dict[tuple[int, ...], torch.Tensor] = {}
        self.features: dict[tuple[int, ...], torch.Tensor] = {}
        self.latest: list[tuple[int, ...]] = []

    def new_cache(self) -> TokenCache:  # type: ignore[override]
        return TokenCache()

    def logits(  # type: ignore[override]
        self, tokens: torch.Tensor, cache: TokenCache, *, num_rows: int, slots: Sequence[int] = ()
    ) -> torch.Tensor:
        self.latest = prefixes(cache, tokens, slots)
        return torch.stack([self.row(prefix) for prefix in self.latest[-num_rows:]])

    @contextmanager
    def tapped(self, taps: Sequence[int]) -> Iterator["MemoModel._Features"]:  # type: ignore[override]
        yield self._Features(self, tuple(taps))

    class _Features:
        """Features of the latest pass, each computed once per prefix."""

        def __init__(self, model: "MemoModel", taps: tuple[int, ...]) -> None:
            self.model, self.taps = model, taps

        def take(self) -> torch.Tensor:
            return torch.stack([self._of(prefix) for prefix in self.model.latest])[None]

        def _of(self, prefix: tuple[int, ...]) -> torch.Tensor:
            if prefix not in self.model.features:
                inner = self.model.inner
                with torch.inference_mode(), inner.tapped(self.taps) as features:
                    inner.model(input_ids=torch.tensor([prefix]), use_cache=False)
                    self.model.features[prefix] = features.take()[0, -1]
            return self.model.features[prefix]

    def row(self, prefix: tuple[int, ...]) -> torch.Tensor:
        """Raw logits `[V]` after a prefix."""
        if prefix not in self.rows:
            with torch.inference_mode():
                logits = self.inner.model(input_ids=torch.tensor([prefix]), use_cache=False).logits[0, -1]
            self.rows[prefix] = logits.double()
        return self.rows[prefix]


class Path:
    """A `Source` that replays forced decisions, then takes the first outcome of each and notes the others."""

    def __init__(self, forced: tuple[int, ...]) -> None:
        self.forced = forced
        self.taken: list[int] = []
        self.probability = 1.0
        self.others: list[tuple[int, ...]] = []

    def _decide(self, chances: list[float]) -> int:
        possible = [i for i, chance in enumerate(chances) if chance > 0.0]
        step = len(self.taken)
        if step < len(self.forced):
            choice = self.forced[step]
        else:
            choice = possible[0]
            self.others += [(*self.taken, other) for other in possible[1:]]
        self.taken.append(choice)
        self.probability *= chances[choice]
        return choice

    def categorical(self, probs: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self._decide(probs.tolist()))

    def accepted_prefix(self, ratios: torch.Tensor) -> int:
        chances, survived = [], 1.0
        for ratio in ratios.tolist():
            chances.append(survived * (1.0 - ratio))
            survived *= ratio
        return self._decide([*chances, survived])


def speculative_law(
    target: CausalModel,
    drafter: Drafter,
    lookahead: Callable[[], Lookahead],
    settings: SamplingSettings,
    *,
    length: int = LENGTH,
    stop_tokens: frozenset[int] = frozenset(),
) -> Law:
    """Law of the output of `decode`, by walking every path through its random decisions."""
    law: Law = {}
    waiting: list[tuple[int, ...]] = [()]
    request = Request(settings=settings, max_new_tokens=length, stop_tokens=stop_tokens)
    while waiting:
        path = Path(waiting.pop())
        result = decode(target, drafter, PROMPT, request=request, lookahead=lookahead(), generator=path)
        output = tuple(result.tokens)
        law[output] = law.get(output, 0.0) + path.probability
        waiting += path.others
    return law


def target_law(
    target: MemoModel,
    settings: SamplingSettings,
    *,
    length: int = LENGTH,
    stop_tokens: frozenset[int] = frozenset(),
    prompt: torch.Tensor = PROMPT,
) -> Law:
    """Law of plain sampling from the target, by multiplying its rows; no decoder code is involved."""
    law: Law = {}
    vocab = target.vocab_size
    for output in itertools.product(range(vocab), repeat=length):
        probability = 1.0
        emitted: tuple[int, ...] = ()
        for token in output:
            prefix = (*prompt.tolist(), *emitted)
            row = token_probs(
                target.row(prefix)[None], context=torch.tensor(prefix), block=PROMPT[:0], settings=settings
            )[0]
            probability *= float(row[token])
            emitted = (*emitted, token)
            if token in stop_tokens:
                break
        if len(emitted) == length or emitted[-1] in stop_tokens:
            # Longer continuations of a stopped output are the same output; count it once.
            law.setdefault(emitted, probability)
    return {output: p for output, p in law.items() if p > 0.0}


def distance(one: Law, other: Law) -> float:
    """Largest difference of probability over all outputs."""
    return max(abs(one.get(o, 0.0) - other.get(o, 0.0)) for o in {*one, *other})
