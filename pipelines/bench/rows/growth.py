"""Growth of time with context, batch and corpus: fitted exponents and pictures, to see what grows faster than its size.

A pass after a longer context attends to more, which adds to what any pass costs; batches and corpora should cost no
more than in proportion.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from distill.prompts import SourceContext
from distill.prompts.jsonl import Config as JsonlPrompts
from distill.splits import prepare_prompts
from inference.batch.engine import BatchEngine
from inference.batch.responses import Wanted, answer_all
from inference.cache import RollbackCache
from inference.decoder import decode
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel, load_tokenizer
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from pipelines.bench.bench import Bench
from pipelines.bench.growing import SURPRISE, Growth, grown
from pipelines.bench.outcome import Curve, Figure, Outcome, Picture
from pipelines.bench.paired import Clock
from pipelines.bench.synthetic import one_epoch, open_corpus, write_corpus, write_prompts

_PREFILL = 512
_GREEDY = SamplingSettings(temperature=0.0)


@dataclass(kw_only=True)
class Config:
    """How far it goes.

    Attributes:
        kind: this row.
        contexts: tokens before the pass; those the target has no room for are left out.
        widths: tokens of the pass.
        decode_tokens: written after every context.
        batches: requests at once.
        steps: tokens of each of them that are timed.
        batch_context: tokens of their prompts.
        corpora: conversations.
        corpus_tokens: of a conversation, on average.
        rounds: how often all sizes are measured; intervals are over them.
    """

    kind: str = "growth"
    contexts: list[int] = field(default_factory=lambda: [64, 128, 256, 512, 1024, 2048, 4096])
    widths: list[int] = field(default_factory=lambda: [1, 5])
    decode_tokens: int = 16
    batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    steps: int = 16
    batch_context: int = 32
    corpora: list[int] = field(default_factory=lambda: [500, 1000, 2000, 4000])
    corpus_tokens: int = 128
    rounds: int = 4

    def __post_init__(self) -> None:
        smallest = min(*self.contexts, *self.widths, *self.batches, *self.corpora, self.rounds, self.steps)
        if smallest < 1 or self.decode_tokens < 1 or self.batch_context < 1:
            raise ValueError("growth needs sizes, rounds and steps of at least 1")
        if min(len(self.contexts), len(self.batches), len(self.corpora)) < 2 or self.corpus_tokens < 8:
            raise ValueError("growth needs two sizes or more of each kind, and conversations of 8 tokens or more")

    def run(self, bench: Bench) -> Outcome:
        """Measure."""
        figures: list[Figure] = []
        pictures: list[Picture] = []
        found: list[Growth] = []
        for part in (self._contexts, self._batches, self._corpora):
            more, picture, growths = part(bench)
            figures, pictures, found = [*figures, *more], [*pictures, *picture], [*found, *growths]
        notes = [
            "by context: the exponent of the whole pass, and of what more context adds to the pass after the shortest "
            "one, which is 1 where attention is all that grows",
            f"batches and corpora: an exponent above {SURPRISE.bound:g} is a surprise",
        ]
        return Outcome(figures, [one.to_json() for one in found], notes, pictures)

    def _grown(self, name: str, work: Mapping[int, Callable[[], float]], seed: int) -> Growth:
        return grown(name, work, rounds=self.rounds, seed=seed)

    # Context

    def _contexts(self, bench: Bench) -> tuple[list[Figure], list[Picture], list[Growth]]:
        seed, target = bench.options.seed, bench.target(bench.block_precision)
        room = bench.context_limit - max(*self.widths, self.decode_tokens + 1)
        sizes = [size for size in self.contexts if size <= room]
        if len(sizes) < 2:
            mend = "name shorter ones"
            raise InputError(f"the target has room for {room} tokens", where="growth.contexts", mend=mend)
        tokens = torch.randint(
            target.vocab_size, (max(sizes) + max(self.widths),), generator=torch.Generator().manual_seed(seed)
        ).to(target.device)
        caches = {size: _filled(target, tokens[:size]) for size in sizes}
        passes = []
        for width in self.widths:
            fed = {size: tokens[size : size + width] for size in sizes}
            work = {size: partial(_pass, target, fed[size], caches[size], size, bench.clock) for size in sizes}
            passes.append(self._grown(f"a pass of {width}, by context", work, seed))
        caches.clear()
        decoded = self._grown(
            "a decoded token, by context",
            {size: partial(_decoding, target, tokens[:size], self.decode_tokens) for size in sizes},
            seed,
        )
        figures = [f for one in passes for f in (one.figure(goal=None, seed=seed), one.figure_beyond_first(seed=seed))]
        figures.append(decoded.figure(goal=None, seed=seed))
        speed = Curve("decode", sizes, [1.0 / seconds for seconds in decoded.means()])
        pictures = [
            Picture(
                "growth_context", "A pass after more context", "context, tokens", "ms", [p.curve(1e3) for p in passes]
            ),
            Picture("growth_decode", "Decoding after more context", "context, tokens", "tokens/s", [speed]),
        ]
        return figures, pictures, [*passes, decoded]

    # Batch

    def _batches(self, bench: Bench) -> tuple[list[Figure], list[Picture], list[Growth]]:
        seed, target = bench.options.seed, bench.target(bench.generation_precision)
        draw = torch.Generator().manual_seed(seed)
        prompts = torch.randint(target.vocab_size, (max(self.batches), self.batch_context), generator=draw)
        prompts = prompts.to(target.device)
        arms: dict[str, Callable[..., float]] = {
            "a step of the batch engine, by requests": _engine_step,
            "a whole list of answers for a corpus, by requests": _whole_list,
        }
        growths = [
            self._grown(
                name,
                {size: partial(step, target, prompts[:size], self.steps, bench.clock) for size in self.batches},
                seed,
            )
            for name, step in arms.items()
        ]
        picture = Picture("growth_batch", "More requests at once", "requests", "ms", [g.curve(1e3) for g in growths])
        return [growth.figure(goal=SURPRISE, seed=seed) for growth in growths], [picture], growths

    # Corpus

    def _corpora(self, bench: Bench) -> tuple[list[Figure], list[Picture], list[Growth]]:
        seed = bench.options.seed
        with _corpora(self.corpora, tokens=self.corpus_tokens, bench=bench) as (folders, prepared):
            work = {
                "preparing prompts": prepared,
                "opening a corpus": {size: _timed(open_corpus, folder) for size, folder in folders.items()},
                "the batches of an epoch": {size: _timed(one_epoch, folder) for size, folder in folders.items()},
            }
            growths = [self._grown(f"{name}, by conversations", sizes, seed) for name, sizes in work.items()]
        curves = [growth.curve() for growth in growths]
        picture = Picture("growth_corpus", "The data part of training", "conversations", "s", curves)
        return [growth.figure(goal=SURPRISE, seed=seed) for growth in growths], [picture], growths


def _filled(target: CausalModel, tokens: torch.Tensor) -> RollbackCache:
    """A cache that holds some tokens."""
    cache = target.new_cache()
    for piece in tokens.split(_PREFILL):
        target.logits(piece, cache, num_rows=1)
    return cache


def _pass(target: CausalModel, fed: torch.Tensor, cache: RollbackCache, length: int, clock: Clock) -> float:
    """Seconds of a pass after the first `length` tokens of a cache."""
    cache.rollback(length)
    began = clock()
    target.logits(fed, cache, num_rows=len(fed))
    return clock() - began


def _decoding(target: CausalModel, prompt: torch.Tensor, count: int) -> float:
    """Seconds a token after the prompt, its own pass not included."""
    result = decode(
        target,
        NoDrafter(),
        prompt,
        request=Request(settings=_GREEDY, max_new_tokens=count),
        lookahead=FixedLookahead(0),
        generator=TorchSource.seeded(0, device=target.device),
    )
    return (result.total_seconds - result.seconds["prefill"]) / len(result.tokens)


def _engine_step(target: CausalModel, prompts: torch.Tensor, steps: int, clock: Clock) -> float:
    """Seconds of a step for all requests, after the one that lets them in."""
    engine = BatchEngine(target, NoDrafter, FixedLookahead(0), max_requests=len(prompts))
    request = Request(settings=_GREEDY, max_new_tokens=steps + 1)
    for prompt in prompts:
        engine.submit(prompt, request, generator=TorchSource.seeded(0, device=target.device))
    engine.step()
    began = clock()
    for _ in range(steps):
        engine.step()
    assert engine.idle, "requests of one length end together"
    return (clock() - began) / steps


def _whole_list(target: CausalModel, prompts: torch.Tensor, steps: int, clock: Clock) -> float:
    """Seconds of all answers, the prompts' pass included."""
    wanted = Wanted(settings=_GREEDY, max_new_tokens=steps, stop_tokens=frozenset())
    began = clock()
    answer_all(target, prompts.tolist(), wanted, max_running=len(prompts), seed=0)
    return clock() - began


def _timed(work: Callable[[Path], int], folder: Path) -> Callable[[], float]:
    def run() -> float:
        began = time.perf_counter()
        work(folder)
        return time.perf_counter() - began

    return run


@contextmanager
def _corpora(
    sizes: list[int], *, tokens: int, bench: Bench
) -> Iterator[tuple[dict[int, Path], dict[int, Callable[[], float]]]]:
    """Synthetic corpora by size, and the preparation of as many prompts, for the length of the block."""
    context = SourceContext(tokenizer=load_tokenizer(bench.target_folder), seed=bench.options.seed)
    with tempfile.TemporaryDirectory() as made:
        folders = {size: Path(made) / str(size) for size in sizes}
        heldout = Path(made) / "heldout.jsonl"
        write_prompts(heldout, 100, seed=1)

        def prepare(file: Path) -> int:
            sources = {
                "train": JsonlPrompts(path=str(file)),
                "heldout": JsonlPrompts(path=str(heldout), heldout=True),
            }
            return len(prepare_prompts(sources, context, validation_share=0.06, seed=0).heldout)

        prepared = {}
        for size, folder in folders.items():
            write_corpus(folder, size, tokens=tokens)
            write_prompts(Path(made) / f"{size}.jsonl", size, seed=2)
            prepared[size] = _timed(prepare, Path(made) / f"{size}.jsonl")
        yield folders, prepared
