"""Many requests decoded together by captured rounds: they join and leave between rounds, the host looks once a round.

Every request has a place of fixed size, its own temperature, seed, length and stop rules; its law is that of
`inference.decoder.decode`, and so are its greedy tokens. The next round is on its way before the last one's tokens are
looked at, so that the device does not wait for the host; a request that has ended is found out one round later, and
nothing of that round counts. Rounds are of the first places alone, in powers of two: few requests do not pay for many
places. All requests of a round propose equally many tokens (`inference.graphed.depths`).

    engine = GraphedEngine(Rounds(target, network, block=4, batch=64, capacity=512))
    handle = engine.submit(prompt, request, seed=0)
    while not engine.idle:
        engine.step()
    handle.result.tokens
"""

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.decoder import check_prompt_length, up_to_stop
from inference.graphed.depths import Depths, FixedDepth
from inference.graphed.rounds import COLDEST, Rounds
from inference.graphed.timing import Moment
from inference.request import Decoded, Request

# Rounds for which a request's uniform numbers are drawn and sent at once.
_TAPE_ROUNDS = 64


@dataclass(eq=False)
class GraphedHandle:
    """One request, as the caller sees it.

    Attributes:
        prompt: token ids.
        request: what was asked.
        seed: fixes its random decisions.
        on_tokens: called with newly emitted tokens after every round.
        result: tokens so far, and what they took; no seconds, which are not told apart by request.
        started: whether it has been given a place.
        ended: whether nothing more will come.
    """

    prompt: list[int]
    request: Request
    seed: int
    on_tokens: Callable[[list[int]], None] | None = None
    result: Decoded = field(default_factory=Decoded)
    started: bool = False
    ended: bool = False


@dataclass(eq=False)
class _Running:
    """A request in a place.

    Attributes:
        handle: the request.
        place: of it.
        left: tokens it may still emit.
        most: at least as many positions as it holds.
        generator: of its uniform numbers; None for a greedy request.
        begun: rounds it has been in.
        gone: whether it has left its place.
    """

    handle: GraphedHandle
    place: int
    left: int
    most: int
    generator: torch.Generator | None
    begun: int = 0
    gone: bool = False


@dataclass
class _Flight:
    """A round on its way: who was in it and in which places, where its tokens will be, and begin and end of what the
    device does for it: the prompts of those who joined, if any did, then the round."""

    running: list[tuple[_Running, int]]
    depth: int
    host: Tensor
    spans: list[tuple[Moment, Moment]]


def round_sizes(max_requests: int) -> list[int]:
    """Numbers of places that rounds of so many requests have: powers of two, and all of them."""
    return sorted({1 << n for n in range((max_requests - 1).bit_length())} | {max_requests})


class GraphedEngine:
    """Continuous batching over captured rounds.

    Args:
        rounds: of as many requests as may run at once; the engine's alone while it is used.
        depths: tokens proposed a round; None for the longest block.
        max_requests: most requests at once, in the first places; None for all of them.
        sizes: numbers of places that rounds may have besides; each is captured apart. None for all powers of two.
        refill: waiting requests are let in once so many places are free, or all of them have one: prompts are read
            together.
        on_leave: called with a request, its place and its number of tokens when it leaves the place; what the target
            keeps of it lies there until the next step, and is complete when all that was asked of the device is done.

    Attributes:
        rounds: as given.
        max_requests: most requests at once.
        sizes: numbers of places that rounds have, ascending.
        num_rounds: rounds so far.
        device_seconds: of the device, for rounds and for reading prompts, up to the last round that was looked at.
    """

    def __init__(
        self,
        rounds: Rounds,
        depths: Depths | None = None,
        *,
        max_requests: int | None = None,
        sizes: Sequence[int] | None = None,
        refill: int = 1,
        on_leave: Callable[[GraphedHandle, int, int], None] | None = None,
    ) -> None:
        self.rounds = rounds
        self.max_requests = rounds.batch if max_requests is None else max_requests
        if not 1 <= self.max_requests <= rounds.batch:
            raise ValueError(f"max_requests is {max_requests}; use 1 to {rounds.batch}, the places of the rounds")
        known = round_sizes(self.max_requests) if sizes is None else sizes
        self.sizes = sorted({size for size in known if size < self.max_requests} | {self.max_requests})
        self._depths: Depths = FixedDepth(rounds.block) if depths is None else depths
        self._refill, self._on_leave = refill, on_leave
        self.num_rounds, self.device_seconds = 0, 0.0
        self._waiting: deque[GraphedHandle] = deque()
        self._running: dict[int, _Running] = {}  # by place
        self._free = list(range(self.max_requests))  # a heap
        self._left: list[int] = []  # places of requests that left in the last step
        self._flight: _Flight | None = None
        self._spans: list[tuple[Moment, Moment]] = []  # of the round to be set off
        self._open = 0
        device = rounds.anchors.device
        self._on_gpu = device.type == "cuda"
        shape = rounds.emitted.shape
        # Of two rounds: one is read while the other is on its way.
        self._hosts = [torch.zeros(shape, dtype=torch.long, pin_memory=self._on_gpu) for _ in range(2)]
        size = (rounds.batch, _TAPE_ROUNDS, rounds.uniforms.shape[1])
        self._tape = torch.zeros(size, dtype=torch.float64, device=device)
        self._cold = [True] * rounds.batch
        rounds.temperatures.fill_(COLDEST)
        rounds.active.zero_()
        rounds.reset()

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._open

    @property
    def num_held(self) -> int:
        """Requests that have not ended."""
        return self._open

    @property
    def longest(self) -> int:
        """Most tokens of a request, prompt and answer."""
        # A request that has ended is in one round more.
        room = self.rounds.capacity - 2 * (self.rounds.block + 1)
        return min(self.rounds.target.target.context_limit, room)

    def prepare(self, *, sampled: bool, sizes: Sequence[int] | None = None, longest_prompt: int = 1) -> None:
        """Capture rounds while no request is there. What else is needed is captured when it comes.

        Args:
            sampled: which rounds.
            sizes: some of `sizes`; None for all of them.
            longest_prompt: in tokens; passes over prompts up to it are captured too.
        """
        assert self.idle, "rounds are prepared before requests come"
        self.rounds.prepare(sampled=sampled, places=sizes or self.sizes, blocks=self._depths.lengths)
        self.rounds.prepare_prompts(longest_prompt, together=self.max_requests)

    def submit(
        self,
        prompt: Tensor | Sequence[int],
        request: Request,
        *,
        seed: int,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> GraphedHandle:
        """Take a request; it runs as soon as a place is free, in the order of arrival.

        Args:
            prompt: token ids; of a tensor on a device, the device is waited for.
            request: its sampling, length and stop rules.
            seed: fixes every random decision; with blocks of one length nothing depends on who else is there.
            on_tokens: called with newly emitted tokens after every round.

        Raises:
            InputError: a prompt without tokens, or too long.
            ValueError: settings that these rounds do not follow.
        """
        settings, known = request.settings, self.rounds.truncation
        truncated = (settings.top_k, settings.top_p) != (known.top_k, known.top_p)
        if settings.repetition_penalty != 1.0 or (truncated and not settings.greedy):
            raise ValueError("captured rounds know temperatures, and one top_k and top_p for all requests")
        tokens = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        check_prompt_length(len(tokens), self.longest)
        handle = GraphedHandle(tokens, request, seed, on_tokens)
        self._waiting.append(handle)
        self._open += 1
        return handle

    @torch.inference_mode()
    def step(self) -> None:
        """Let waiting requests in, set off a round of all that run, and take the tokens of the round before."""
        self._admit()
        flight = self._set_off() if self._running else None
        if self._flight is not None:
            self._take(self._flight)
        self._flight = flight

    def abandon(self) -> None:
        """Give all requests up; what they have emitted stays."""
        for handle in [*self._waiting, *(one.handle for one in self._running.values())]:
            handle.ended = True
        self._waiting.clear()
        self._running.clear()
        self._left.clear()
        self._spans.clear()
        self._free, self._open, self._flight = list(range(self.max_requests)), 0, None
        self.rounds.active.zero_()
        self.rounds.reset()

    # Places

    def _admit(self) -> None:
        """Give places to waiting requests; the rest become ballast, and are left behind where half of a round is."""
        for place in self._left:
            heapq.heappush(self._free, place)
        coming = min(len(self._free), len(self._waiting))
        if coming and (coming == len(self._waiting) or coming >= self._refill or not self._running):
            new = [self._join(self._waiting.popleft(), heapq.heappop(self._free)) for _ in range(coming)]
            begun = Moment(self._on_gpu)
            self.rounds.begin_all([one.place for one in new], [one.handle.prompt for one in new])
            self._spans.append((begun, Moment(self._on_gpu)))
        for place in self._left:
            if place not in self._running:
                self.rounds.leave(place)
        self._left.clear()
        if self._running and not self._waiting:
            self._close_up()

    def _join(self, handle: GraphedHandle, place: int) -> _Running:
        settings, held = handle.request.settings, len(handle.prompt)
        generator = None if settings.greedy else torch.Generator().manual_seed(handle.seed)
        budget = min(handle.request.max_new_tokens, self.longest - held)
        running = _Running(handle, place, budget, held - 1, generator)
        if generator is not None:
            self.rounds.temperatures[place].fill_(settings.temperature)
        elif not self._cold[place]:
            self.rounds.temperatures[place].fill_(COLDEST)
            self._tape[place].fill_(0.0)
        self._cold[place] = generator is None
        self._running[place] = running
        handle.started = True
        return running

    def _close_up(self) -> None:
        """Move the last requests to free places where the next smaller round has room for all."""
        size = self._size(len(self._running))
        for place in sorted(self._running):
            if place >= size:
                to, running = heapq.heappop(self._free), self._running.pop(place)
                self.rounds.move(place, to, length=running.most)
                self._tape[to] = self._tape[place]
                self._cold[to] = self._cold[place]
                running.place = to
                self._running[to] = running
                heapq.heappush(self._free, place)

    def _leave(self, running: _Running, *, tokens: int) -> None:
        if running.gone:
            return
        running.gone = True
        del self._running[running.place]
        self._left.append(running.place)
        if self._on_leave is not None:
            self._on_leave(running.handle, running.place, tokens)

    def _size(self, needed: int) -> int:
        """Places of the smallest round in which so many have room."""
        return self.sizes[bisect_left(self.sizes, needed)]

    # Rounds

    def _set_off(self) -> _Flight:
        rounds, running = self.rounds, list(self._running.values())
        places = self._size(1 + max(self._running))
        depth = self._depths.depth(places)
        sampled = any(one.generator is not None for one in running)
        if sampled:
            self._draw(running)
            rounds.uniforms[:places].copy_(self._tape[:places, self.num_rounds % _TAPE_ROUNDS])
        longest = max(one.most for one in running)
        begun = Moment(self._on_gpu)
        rounds.round(shown=rounds.shown(longest), sampled=sampled, places=places, block=depth)
        host = self._hosts[self.num_rounds % 2][:places]
        host.copy_(rounds.emitted[:places], non_blocking=True)
        spans, self._spans = [*self._spans, (begun, Moment(self._on_gpu))], []
        for one in running:
            one.begun += 1
            # Not yet known; a rejection is taken back when the round is looked at.
            one.most += depth + 1
        self.num_rounds += 1
        return _Flight([(one, one.place) for one in running], depth, host, spans)

    def _draw(self, running: Sequence[_Running]) -> None:
        """Draw the coming rounds' numbers of those who have used up theirs, each from its own seed."""
        needing = [one for one in running if one.generator is not None and one.begun % _TAPE_ROUNDS == 0]
        if not needing:
            return
        numbers = torch.empty(len(needing), *self._tape.shape[1:], dtype=torch.float64)
        for own, one in zip(numbers, needing, strict=True):
            torch.rand(own.shape, dtype=torch.float64, generator=one.generator, out=own)
        # The tape's columns are rounds of the engine; a request may have begun at any of them.
        numbers = numbers.roll(self.num_rounds % _TAPE_ROUNDS, dims=1)
        places = torch.tensor([one.place for one in needing])
        self._tape.index_copy_(0, self._sent(places), self._sent(numbers))

    def _sent(self, tensor: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        if not self._on_gpu:
            return tensor
        return tensor.pin_memory().to(self._tape.device, non_blocking=True)

    def _take(self, flight: _Flight) -> None:
        """Hand out the tokens of a round that has been set off before the present one."""
        flight.spans[-1][1].wait()
        self.device_seconds += sum(end.since(begun) for begun, end in flight.spans)
        # A list of each column: one of each row would keep the garbage collector busy.
        *columns, counts = flight.host.t().tolist()
        first, depth = columns[0], flight.depth
        stood = []
        for one, place in flight.running:
            handle = one.handle
            result, stops = handle.result, handle.request.stop_tokens
            if handle.ended:
                continue
            if not depth and one.left > 2 and first[place] not in stops and handle.on_tokens is None:
                # The same for what nearly all requests of a target-only round come to: of a thousand, the host would
                # be slower than the round.
                one.left -= 1
                result.tokens.append(first[place])
                result.passes += 1
                result.blocks[0] = result.blocks.get(0, 0) + 1
                continue
            count = counts[place]
            stood.append(count - 1)
            one.most -= depth + 1 - count
            result.count_chain(depth, count - 1)
            written = [column[place] for column in columns[: min(count, one.left)]]
            emitted, finished = up_to_stop(written, stops)
            result.tokens += emitted
            one.left -= len(emitted)
            if finished or not one.left:
                handle.ended = True
                self._open -= 1
                self._leave(one, tokens=len(result.tokens))
            elif one.left == 1:
                # The round on its way emits the last token, whatever it is.
                self._leave(one, tokens=len(result.tokens) + 1)
            if handle.on_tokens is not None:
                handle.on_tokens(emitted)
        if stood:
            self._depths.observe(depth, stood)
