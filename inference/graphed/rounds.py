"""One round of B requests in fixed shapes: draft a block, verify it, accept, read what stands; captured as one graph.

What is proposed is said by `inference.graphed.proposals`, what stands by `inference.graphed.acceptance`. A round may be
of the first requests alone and of a shorter block: what it shares with larger ones are weights and buffers.
Letters in shapes: G proposed tokens, W = G + 1 tokens of a pass, V vocabulary, Vd the draft's; of a tree, N nodes and D
depth.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inference.feature_networks import FeatureNetwork
from inference.graphed.acceptance import accept_greedy, accept_sampled, accept_tree
from inference.graphed.contexts import StaticContext
from inference.graphed.programs import Programs
from inference.graphed.prompts import Places, PromptReader, power_of_two
from inference.graphed.proposals import SIGNALS, Proposer, processed
from inference.graphed.target import ALIGNMENT, StaticTarget
from inference.graphed.written import Written
from inference.model import CausalModel
from inference.sampling_settings import SamplingSettings
from inference.trees import Tree, TreePlan

# Stands for greedy decoding in a sampled round: whatever is less likely has no mass, and of equals the first is drawn
# by a uniform number of 0.
COLDEST = 1e-30


class Rounds:
    """The rounds of B requests under one target and one draft.

    Args:
        target: verifies; see `StaticTarget` for which can.
        network: drafts; None for target-only decoding.
        block: G, tokens proposed a round; 0 without a draft.
        batch: B.
        capacity: positions a request may hold, a block that is rejected included.
        compiled: fuse the kernels of rounds by torch.compile before they are captured, which takes a minute for each.
        taps: target layers whose outputs are kept; without a draft, which has taps of its own.
        keep_states: keep the head's inputs; see `StaticTarget`.
        top_k: of sampled rounds, see `SamplingSettings`.
        top_p: likewise.
        tree: what greedy rounds propose that are asked for no block of their own; None for a chain of G tokens.
        tree_when_sampled: whether sampled rounds propose it too, by noise that target and draft share; see `noise`.

    Attributes:
        anchors: int64 `[B]`, the last token of each request.
        lengths: int64 `[B]`, tokens before it.
        active: int64 `[B]`, 1, and 0 of places without a request: those are ballast and stay at length 0.
        temperatures: fp32 `[B]`; read by sampled rounds.
        uniforms: fp64 `[B, 2 G + 1]`, in [0, 1): for drawing the block, for accepting it, for the token after it; of
            sampled rounds that propose a chain.
        noise: fp64 `[B, D + 1, V]`, standard exponential numbers, for each token that a sampled round with a tree may
            emit: the target's token is the one whose chance over its number is largest, which is a draw by its chances
            (Gumbel-max), and the draft proposes the tokens that would be likeliest to win by its own chances. None
            where no such round is asked for.
        emitted: int64 `[B, longest + 2]`, what the last round emitted, then, in the last column, how many of them stand
            for emitted tokens.
        signals: fp64 `[B, G, 2]`, what was known of each token of the last recorded block before it was drawn; see
            `SIGNALS`. Other rounds leave it as it is.
        plan: the tree as tensors; None without one.
        written: the tokens of all requests; None where no tree copies from them.
        programs: what is captured of rounds and prompts.

    Raises:
        InputError: a target that cannot be run in fixed shapes.
        ValueError: a tree that the draft cannot propose.
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
        taps: Sequence[int] = (),
        keep_states: bool = False,
        top_k: int = 0,
        top_p: float = 1.0,
        tree: Tree | None = None,
        tree_when_sampled: bool = False,
    ) -> None:
        if network is None and (block or tree):
            raise ValueError("without a draft nothing is proposed")
        if network is not None and taps:
            raise ValueError("a draft has taps of its own")
        self.block, self.batch, self.capacity, self.network = block, batch, capacity, network
        self.truncation = SamplingSettings(temperature=1.0, top_k=top_k, top_p=top_p)
        self.target = StaticTarget(
            target,
            batch=batch,
            capacity=capacity,
            taps=network.taps if network else taps,
            keep_states=keep_states,
            keep_features=bool(taps),
        )
        device = target.device
        if tree is not None and network is not None:
            network.check_tree(tree)
        self.plan = None if tree is None else TreePlan(tree, device)
        self.tree_when_sampled = tree_when_sampled and tree is not None
        noise = (batch, 1 + (tree.depth if tree else 0), target.vocab_size)
        self.noise = torch.ones(noise, dtype=torch.float64, device=device) if self.tree_when_sampled else None
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
                tree=self.plan,
            )
        )
        self.proposer = (
            None if network is None or self.context is None else Proposer(network, self.context, self.truncation)
        )
        if network is not None and device.type == "cuda":
            network.join_weights()
        self.anchors = torch.zeros(batch, dtype=torch.long, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.active = torch.ones(batch, dtype=torch.long, device=device)
        self.temperatures = torch.ones(batch, device=device)
        self.uniforms = torch.zeros(batch, 2 * block + 1, dtype=torch.float64, device=device)
        self.emitted = torch.zeros(batch, self.longest + 2, dtype=torch.long, device=device)
        self.signals = torch.zeros(batch, block, len(SIGNALS), dtype=torch.float64, device=device)
        self._every = torch.arange(batch, device=device)
        # What a round emits is written whole, beyond the end of a request that fills its place too.
        positions = capacity + self.longest + 1
        copies = tree is not None and tree.lookup > 0
        self.written = Written(batch, positions=positions, device=device) if copies else None
        self._compiled = compiled
        self.programs = Programs(device, self._state, compiled=compiled)
        places = Places(self.anchors, self.lengths, self.active, self.written)
        self._prompts = PromptReader(self.target, network, self.context, places, self.programs)

    # What is asked of it

    @property
    def longest(self) -> int:
        """Most tokens of a round that are emitted besides the target's own."""
        return max(self.block, 0 if self.plan is None else self.plan.tree.depth)

    @property
    def width(self) -> int:
        """Most tokens of a round that are proposed."""
        return max(self.block, 0 if self.plan is None else self.plan.tree.size)

    def proposes_tree(self, *, sampled: bool) -> bool:
        """Whether rounds propose the tree that are asked for no block of their own."""
        return self.plan is not None and (self.tree_when_sampled or not sampled)

    def shown(self, longest: int, *, sampled: bool = False) -> int:
        """Positions that a round must read where the longest request holds so many before it: a power of two, so that
        few graphs do; all of them where a graph takes a minute to compile."""
        needed = longest + (self.width if self.proposes_tree(sampled=sampled) else self.block) + 1
        return self.capacity if self._compiled else min(power_of_two(needed), self.capacity)

    def begin(self, row: int, prompt: Tensor) -> None:
        """Put a request into a place: all of its prompt but the anchor is read.

        Args:
            row: the place.
            prompt: int64 `[T]`, at least one token.
        """
        self.begin_all([row], [prompt.tolist()])

    @torch.inference_mode()
    def begin_all(self, places: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Put requests into places. Prompts that are padded to the same lengths are read together.

        Args:
            places: of each request, all different.
            prompts: token ids of each, at least one.
        """
        requests = dict(zip(places, prompts, strict=True))
        for place, prompt in requests.items():
            if len(prompt) == 1:
                self._reset(place, active=1)
                self.anchors[place].fill_(prompt[0])
                if self.written is not None:
                    self.written.begin(place, prompt[0])
        self._prompts.read([(place, prompt) for place, prompt in requests.items() if len(prompt) > 1])

    def leave(self, place: int) -> None:
        """Make a place ballast."""
        self._reset(place, active=0)

    @torch.inference_mode()
    def move(self, source: int, place: int, *, length: int) -> None:
        """Let a request go on in another place; its own becomes ballast.

        Args:
            source: where it is.
            place: where it goes.
            length: at least what it holds.
        """
        self.target.move(source, place, length=min(length, self.capacity))
        if self.context is not None:
            self.context.move(source, place)
        if self.written is not None:
            self.written.move(source, place)
        for tensor in (self.anchors, self.lengths, self.active, self.temperatures):
            tensor[place] = tensor[source]
        self.leave(source)

    def prepare(
        self, *, sampled: bool, places: Sequence[int] | None = None, blocks: Sequence[int] | None = None
    ) -> None:
        """Capture the rounds of every size that a request may come to, so that none is captured while one waits.

        No request is running.

        Args:
            sampled: which rounds.
            places: numbers of places; None for all of them.
            blocks: block lengths; None for the longest, or the tree.
        """
        lengths: Sequence[int | None] = blocks or [None]
        sizes = sorted({self.shown(longest, sampled=sampled) for longest in range(0, self.capacity, ALIGNMENT)})
        # What was timed or answered before may be longer than what the first sizes show.
        self.reset()
        for count, block, shown in itertools.product(places or [self.batch], lengths, sizes):
            self.round(shown=shown, sampled=sampled, places=count, block=block)
            self.reset()

    @torch.inference_mode()
    def prepare_prompts(self, longest: int, *, together: int) -> None:
        """Capture the passes over prompts. No request is running.

        Args:
            longest: tokens of the longest prompt.
            together: prompts that may be read at once.
        """
        self._prompts.prepare(longest, together=together)
        self.leave(0)

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget what all requests hold."""
        self.lengths.zero_()
        if self.context is not None:
            self.context.held.zero_()

    @torch.inference_mode()
    def round(
        self,
        *,
        shown: int,
        sampled: bool,
        places: int | None = None,
        block: int | None = None,
        recorded: bool = False,
    ) -> None:
        """One round; see `emitted`. Nothing waits for the device.

        Args:
            shown: at least what any request holds after it; see the method of that name.
            sampled: by `temperatures` and `uniforms`.
            places: of the first so many requests; None for all.
            block: tokens proposed; None for the longest block, or for the tree where there is one for such rounds and
                they are not recorded.
            recorded: also note `signals`, in a program of its own.
        """
        count = self.batch if places is None else places
        if self.plan is not None and self.proposes_tree(sampled=sampled) and block is None and not recorded:
            self.programs.run(
                ("tree", count, shown, int(sampled)),
                functools.partial(self._tree_round, self.plan, count, shown, sampled),
                compiled=True,
            )
            return
        length = self.block if block is None else block
        self.programs.run(
            ("recorded round" if recorded else "round", count, length, shown, int(sampled)),
            functools.partial(self._round, count, length, shown, sampled, recorded),
            compiled=True,
        )

    def parts(self, *, shown: int, sampled: bool) -> dict[str, Callable[[], None]]:
        """The parts of a round, captured apart, for who times them; they leave the round's state in disorder."""
        plan = self.plan if self.proposes_tree(sampled=sampled) else None
        width = 1 + (self.block if plan is None else plan.tree.size)
        block = self.anchors[:, None].expand(-1, width).contiguous()

        def draft() -> None:
            if plan is None:
                self._propose(self.batch, self.block, shown, sampled, recorded=False)
            else:
                self._propose_tree(plan, self.batch, shown, self._log_noise(self.batch) if sampled else None)

        def verify() -> None:
            self.target.logits(self.target.run(block, self.lengths, None, shown=shown, tree=plan)[0])

        return {
            "draft": self.programs.capture(draft, compiled=True),
            "verify": self.programs.capture(verify, compiled=True),
        }

    # What is captured

    def _round(self, places: int, length: int, shown: int, sampled: bool, recorded: bool) -> None:
        tokens, rows = self._propose(places, length, shown, sampled, recorded=recorded)
        ids = torch.cat([self.anchors[:places, None], tokens], dim=1)
        states, features = self.target.run(ids, self.lengths[:places], None, shown=shown)
        logits = self.target.logits(states)
        if sampled:
            emitted, stood = self._accept_sampled(tokens, rows, logits)
        else:
            emitted, stood = accept_greedy(tokens, logits.argmax(-1))
        self._go_on(emitted, stood, features)

    def _tree_round(self, plan: TreePlan, places: int, shown: int, sampled: bool) -> None:
        noise = self._log_noise(places) if sampled else None
        ids = torch.cat([self.anchors[:places, None], self._propose_tree(plan, places, shown, noise)], dim=1)
        lengths = self.lengths[:places]
        states, features = self.target.run(ids, lengths, None, shown=shown, tree=plan)
        rows = self.target.logits(states)
        if noise is not None:
            # Tokens of one depth share their noise: whichever of them stands, no other token is drawn by it.
            rows = processed(rows, self.temperatures[:places, None, None], self.truncation) - noise[:, plan.depths]
        emitted, stood, ways = accept_tree(ids, rows.argmax(-1), plan)
        self.target.keep(ways, lengths)
        self._go_on(emitted, stood, features[self._every[:places, None], ways])

    def _go_on(self, emitted: Tensor, stood: Tensor, features: Tensor) -> None:
        """Read what stands, and take the token after it for the next anchor.

        Args:
            emitted: int64 `[B, n]`, see `accept_greedy`.
            stood: int64 `[B]`.
            features: `[B, n, m * D]`, of the tokens before these.
        """
        places, count = emitted.shape
        anchors, lengths = self.anchors[:places], self.lengths[:places]
        written = stood + 1
        if self.context is not None and self.network is not None:
            self.context.reading(self._every[:places], written, width=count)
            self.network.read(features.flatten(0, 1), emitted.flatten(), self.context)
        if self.written is not None:
            self.written.write(self._every[:places], lengths + 1, emitted)
        anchors.copy_(emitted.gather(1, stood[:, None])[:, 0])
        # Ballast stays where it is, or it would come to its place's end.
        lengths.addcmul_(written, self.active[:places])
        if self.context is not None:
            self.context.read(lengths)
        self.emitted[:places, :count].copy_(emitted)
        self.emitted[:places, -1].copy_(written)

    def _propose(
        self, places: int, length: int, shown: int, sampled: bool, *, recorded: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The block's tokens, int64 `[B, G]`, and the rows `[B, Vd]` they were sampled from."""
        if self.proposer is None or not length:
            return self.anchors[:places, None][:, :0], []
        return self.proposer.chain(
            self.anchors[:places],
            length,
            shown=shown,
            temperatures=self.temperatures[:places] if sampled else None,
            uniforms=self.uniforms[:places],
            signals=self.signals[:places] if recorded else None,
        )

    def _propose_tree(self, plan: TreePlan, places: int, shown: int, noise: Tensor | None) -> Tensor:
        """The nodes' tokens, int64 `[B, N]`; of a greedy round without noise."""
        assert self.proposer is not None, "a tree is drafted"
        return self.proposer.tree(
            plan,
            self.anchors[:places],
            self.lengths[:places],
            shown=shown,
            temperatures=None if noise is None else self.temperatures[:places],
            noise=noise,
            written=self.written,
        )

    def _log_noise(self, places: int) -> Tensor:
        """Logarithms of the noise, fp32 `[B, D + 1, V]`."""
        assert self.noise is not None, "a sampled round with a tree has noise"
        return self.noise[:places].log().float()

    def _accept_sampled(self, tokens: Tensor, rows: list[Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Emitted tokens `[B, W]`, valid up to the one after those that stand, and how many stand, `[B]`."""
        places, block = tokens.shape
        return accept_sampled(
            tokens,
            torch.stack(rows, dim=1) if rows else None,
            torch.softmax(processed(logits, self.temperatures[:places, None, None], self.truncation), dim=-1),
            accepting=self._accepting(places, block),
            following=self.uniforms[:places, -1],
            vocabulary=None if self.network is None else self.network.vocabulary,
        )

    def _accepting(self, places: int, block: int) -> Tensor:
        """The numbers that accept a block, `[B, G]`: none that has drawn a token of it."""
        return self.uniforms[:places, self.block : self.block + block]

    def _reset(self, place: int, *, active: int) -> None:
        """A place of length 0."""
        # Filled, since a number that is assigned is copied from the host, which waits.
        self.lengths[place].fill_(0)
        self.active[place].fill_(active)
        if self.context is not None:
            self.context.clear(place)

    def _state(self) -> list[Tensor]:
        """What a round changes of its requests, besides the states that lie at their positions."""
        held = [] if self.context is None else self.context.state()
        return [self.anchors, self.lengths, self.active, *held]
