"""One round of B requests in fixed shapes: draft a block, verify it, accept, read what stands; captured as one graph.

The rules are those of `inference.verification`, for chains; every random decision is a uniform number handed in, so
that nothing on the device draws. Letters in shapes: G proposed tokens, W = G + 1 tokens of a pass, V vocabulary, Vd
the draft's.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inference.feature_networks import FeatureNetwork
from inference.graphed.contexts import StaticContext
from inference.graphed.target import ALIGNMENT, StaticTarget
from inference.model import CausalModel
from inference.randomness import drawn

_WARM_UPS = 3
_MOST_PROGRAMS = 256


class Rounds:
    """The rounds of B requests under one target and one draft.

    Args:
        target: verifies; see `StaticTarget` for which can.
        network: drafts; None for target-only decoding.
        block: G, tokens proposed a round; 0 without a draft.
        batch: B.
        capacity: positions a request may hold, a block that is rejected included.
        compiled: fuse the kernels of rounds by torch.compile before they are captured, which takes a minute for each.

    Attributes:
        anchors: int64 `[B]`, the last token of each request.
        lengths: int64 `[B]`, tokens before it.
        temperatures: fp32 `[B]`; read by sampled rounds.
        uniforms: fp64 `[B, 2 G + 1]`, in [0, 1): for drawing the block, for accepting it, for the token after it.
        emitted: int64 `[B, W + 1]`, what the last round emitted, then how many of them stand for emitted tokens.

    Raises:
        InputError: a target that cannot be run in fixed shapes.
    """

    def __init__(
        self,
        target: CausalModel,
        network: FeatureNetwork | None,
        *,
        block: int,
        batch: int = 1,
        capacity: int = 1024,
        compiled: bool = False,
    ) -> None:
        if network is None and block:
            raise ValueError("without a draft nothing is proposed")
        self.block, self.batch, self.capacity, self.network = block, batch, capacity, network
        self.target = StaticTarget(target, batch=batch, capacity=capacity, taps=network.taps if network else ())
        device = target.device
        self.context = (
            None
            if network is None
            else StaticContext(
                network.cached_layers,
                network.shape,
                batch=batch,
                capacity=capacity,
                dtype=next(network.parameters()).dtype,
                device=device,
            )
        )
        self.anchors = torch.zeros(batch, dtype=torch.long, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.temperatures = torch.ones(batch, device=device)
        self.uniforms = torch.zeros(batch, 2 * block + 1, dtype=torch.float64, device=device)
        self.emitted = torch.zeros(batch, block + 2, dtype=torch.long, device=device)
        self._every = torch.arange(batch, device=device)
        self._captured: dict[tuple[str, int, int], Callable[[], None]] = {}
        self._prompt: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._compiled = compiled
        self._pool: Any = None

    # What is asked of it

    def shown(self, longest: int) -> int:
        """Positions that a round must read where the longest request holds so many before it: a power of two, so that
        few graphs do; all of them where a graph takes a minute to compile."""
        return self.capacity if self._compiled else min(_power_of_two(longest + self.block + 1), self.capacity)

    @torch.inference_mode()
    def begin(self, row: int, prompt: Tensor) -> None:
        """Put a request into a place: all of its prompt but the anchor is read.

        Args:
            row: the place.
            prompt: int64 `[T]`, at least one token.
        """
        read = prompt.shape[0] - 1
        self.lengths[row] = 0
        if self.context is not None:
            self.context.held[row] = 0
        start = 0
        while start < read:
            width = min(_power_of_two(read - start), self._longest_piece())
            count = min(read - start, width)
            ids, following, numbers = self._prompt_inputs(width)
            ids[0, :count] = prompt[start : start + count]
            following[0, :count] = prompt[start + 1 : start + 1 + count]
            numbers[0], numbers[1], numbers[2] = row, start, count
            shown = min(self.capacity, _power_of_two(start + width))
            self._replay(("prompt", width, shown), functools.partial(self._read_prompt, width, shown))
            start += count
        self.lengths[row] = read
        self.anchors[row] = prompt[-1]

    def prepare(self, *, sampled: bool) -> None:
        """Capture the rounds of every size that a request may come to, so that none is captured while one waits."""
        sizes = {self.shown(longest) for longest in range(0, self.capacity, ALIGNMENT)}
        for shown in sorted(sizes):
            self.round(shown=shown, sampled=sampled)
            self.lengths.zero_()

    @torch.inference_mode()
    def round(self, *, shown: int, sampled: bool) -> None:
        """One round of all requests; see `emitted`. Nothing waits for the device."""
        self._replay(("round", shown, int(sampled)), functools.partial(self._round, shown, sampled))

    def parts(self, *, shown: int, sampled: bool) -> dict[str, Callable[[], None]]:
        """The parts of a round, captured apart, for who times them; they leave the round's state in disorder."""
        block = self.anchors[:, None].expand(-1, self.block + 1).contiguous()

        def draft() -> None:
            self._draft(shown, sampled)

        def verify() -> None:
            self.target.logits(self.target.run(block, self.lengths, self._every, shown=shown)[0])

        return {
            "draft": self.capture(draft, compiled=self._compiled),
            "verify": self.capture(verify, compiled=self._compiled),
        }

    # What is captured

    def _round(self, shown: int, sampled: bool) -> None:
        tokens, rows = self._draft(shown, sampled)
        ids = torch.cat([self.anchors[:, None], tokens], dim=1)
        states, features = self.target.run(ids, self.lengths, self._every, shown=shown)
        logits = self.target.logits(states)
        if sampled:
            emitted, stood = self._accept_sampled(tokens, rows, logits)
        else:
            emitted = logits.argmax(-1)
            stood = (tokens == emitted[:, :-1]).long().cumprod(1).sum(1)
        if self.context is not None and self.network is not None:
            self.context.reading(self._every, stood + 1, width=self.block + 1)
            self.network.read(features.flatten(0, 1), emitted.flatten(), self.context)
            self.context.read()
        self.anchors.copy_(emitted.gather(1, stood[:, None])[:, 0])
        self.lengths.add_(stood + 1)
        self.emitted[:, :-1].copy_(emitted)
        self.emitted[:, -1].copy_(stood + 1)

    def _draft(self, shown: int, sampled: bool) -> tuple[Tensor, list[Tensor]]:
        """The block's tokens, int64 `[B, G]`, and the rows `[B, Vd]` they were sampled from."""
        network, context = self.network, self.context
        if network is None or context is None or not self.block:
            return self.anchors[:, None][:, :0], []
        context.shown = shown
        context.drafting()
        block, previous = network.begin_block(self.anchors, context), self.anchors
        tokens, rows = [], []
        for slot in range(self.block):
            logits = network.step(block, slot, previous, confidence=False).logits
            if sampled:
                probs = torch.softmax(logits.float() / self.temperatures[:, None], dim=-1)
                index = drawn(probs, self.uniforms[:, slot])
                rows.append(probs)
            else:
                index = logits.argmax(-1)
            previous = index if network.vocabulary is None else network.vocabulary[index]
            tokens.append(previous)
        return torch.stack(tokens, dim=1), rows

    def _accept_sampled(self, tokens: Tensor, rows: list[Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Emitted tokens `[B, W]`, valid up to the one after those that stand, and how many stand, `[B]`."""
        block = self.block
        probs = torch.softmax(logits.float() / self.temperatures[:, None, None], dim=-1)
        if not block:
            return drawn(probs[:, 0], self.uniforms[:, -1])[:, None], self.lengths.new_zeros(self.batch)
        drafted = torch.stack(rows, dim=1)
        vocabulary = self.network.vocabulary if self.network is not None else None
        own = tokens if vocabulary is None else torch.searchsorted(vocabulary, tokens)
        chance = probs[:, :block].gather(2, tokens[..., None])[..., 0] / drafted.gather(2, own[..., None])[..., 0]
        stood = (self.uniforms[:, block : 2 * block] < chance).long().cumprod(1).sum(1)
        row = probs[self._every, stood]
        taken = drafted[self._every, stood.clamp(max=block - 1)] * (stood < block)[:, None]
        left = row.clone()
        if vocabulary is None:
            left -= taken
        else:
            left[:, vocabulary] -= taken
        left.clamp_(min=0.0)
        following = drawn(torch.where(left.sum(-1, keepdim=True) > 0, left, row), self.uniforms[:, -1])
        places = torch.arange(block + 1, device=tokens.device)
        padded = torch.cat([tokens, tokens[:, :1]], dim=1)
        return torch.where(places < stood[:, None], padded, following[:, None]), stood

    def _read_prompt(self, width: int, shown: int) -> None:
        ids, following, numbers = self._prompt_inputs(width)
        row, start, count = numbers[0:1], numbers[1:2], numbers[2:3]
        _, features = self.target.run(ids, start, row, shown=shown)
        if self.context is not None and self.network is not None:
            self.context.reading(row, count, width=width)
            self.network.read(features.flatten(0, 1), following.flatten(), self.context)
            self.context.read()

    def _prompt_inputs(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """A piece of a prompt, `[1, width]`, the tokens after each, and its request, start and length."""
        if width not in self._prompt:
            ids = torch.zeros(1, width, dtype=torch.long, device=self.anchors.device)
            self._prompt[width] = ids, torch.zeros_like(ids), torch.ones(3, dtype=torch.long, device=ids.device)
        return self._prompt[width]

    def _longest_piece(self) -> int:
        return max(ALIGNMENT, min(512, self.capacity // 2 // ALIGNMENT * ALIGNMENT))

    # Capturing

    def _replay(self, name: tuple[str, int, int], work: Callable[[], None]) -> None:
        """Run captured work, capturing it at its first time."""
        if name not in self._captured:
            self._captured[name] = self.capture(work, compiled=self._compiled and name[0] == "round")
        self._captured[name]()

    def capture(self, work: Callable[[], None], *, compiled: bool = False) -> Callable[[], None]:
        """Warm up, capture, and leave the state as it was before; without a GPU the work itself."""
        if self.anchors.device.type != "cuda":
            return work
        if compiled:
            # Every shape is a program of its own here, by design.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_PROGRAMS)
            work = torch.compile(work, dynamic=False)
        held = [] if self.context is None else [self.context.held, self.context.last]
        state = [(tensor, tensor.clone()) for tensor in (self.anchors, self.lengths, *held)]

        def restore() -> None:
            for tensor, before in state:
                tensor.copy_(before)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        self._pool = self._pool or graph.pool()
        restore()
        replay: Callable[[], None] = graph.replay
        return replay


def _power_of_two(needed: int) -> int:
    """The smallest power of two that is no less, from `ALIGNMENT` on."""
    size = ALIGNMENT
    while size < needed:
        size *= 2
    return size
