"""Which targets and drafts can be decoded by captured rounds, and their decoders.

Captured are target-only decoding and chains or trees of drafts that read the target's features, under targets that
`inference.graphed.target` takes; look-up, drafts mixed with it and standalone models are decoded as they are.
"""

from inference.drafters import Drafter
from inference.drafters.feature import FeatureDrafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.feature_networks import FeatureNetwork
from inference.feature_networks.medusa import Medusa
from inference.graphed.decode import GraphedDecoder, Timed
from inference.graphed.rounds import Rounds
from inference.graphed.target import ALIGNMENT
from inference.model import CausalModel
from inference.trees import Tree


def can_be_captured(drafter: Drafter) -> bool:
    """Whether rounds of a draft have a fixed shape; Medusa's keep no keys and values, which the buffers are for."""
    return isinstance(drafter, NoDrafter) or (
        isinstance(drafter, FeatureDrafter) and not isinstance(drafter.network, Medusa)
    )


def longest_block(drafter: Drafter) -> int:
    """Most tokens that captured rounds of a draft propose."""
    return drafter.network.block if isinstance(drafter, FeatureDrafter) else 0


def capacity_for(target: CausalModel, tokens: int, *, block: int) -> int:
    """Positions of a request of so many tokens, prompt and answer, in whole steps of what attention kernels want.

    A request ends at the context's end, whatever it proposes; only a block that is cut off there reaches beyond.

    Args:
        target: verifies.
        tokens: of the longest request.
        block: most tokens that a round proposes, in a chain or a tree.
    """
    needed = min(tokens, target.context_limit) + block
    return -(-needed // ALIGNMENT) * ALIGNMENT


def captured_decoder(
    target: CausalModel,
    drafter: Drafter,
    *,
    block: int,
    tokens: int,
    tree: Tree | None = None,
    tree_when_sampled: bool = False,
    timed: Timed | None = None,
    compiled: bool = False,
) -> GraphedDecoder:
    """A decoder of one request at a time. Nothing is captured before it is prepared, or decodes.

    Args:
        target: verifies; its weights are shared.
        drafter: see `can_be_captured`; its network's weights are shared.
        block: tokens proposed a round, at most `longest_block`; 0 without a draft.
        tokens: of the longest request, prompt and answer.
        tree: what greedy rounds propose in place of a chain; see `Rounds`.
        tree_when_sampled: whether sampled rounds propose it too; likewise.
        timed: see `GraphedDecoder`.
        compiled: see `Rounds`.

    Raises:
        InputError: a target or a draft that cannot be captured.
        ValueError: a tree that the draft cannot propose.
    """
    capacity = capacity_for(target, tokens, block=max(block, 0 if tree is None else tree.size))
    return decoder_of_capacity(
        target,
        drafter,
        block=block,
        capacity=capacity,
        tree=tree,
        tree_when_sampled=tree_when_sampled,
        timed=timed,
        compiled=compiled,
    )


def decoder_of_capacity(
    target: CausalModel,
    drafter: Drafter,
    *,
    block: int,
    capacity: int,
    tree: Tree | None = None,
    tree_when_sampled: bool = False,
    timed: Timed | None = None,
    compiled: bool = False,
) -> GraphedDecoder:
    """`captured_decoder` with so many positions: buffers of another length may round otherwise.

    Args:
        target: likewise.
        drafter: likewise.
        block: likewise.
        capacity: positions of a request, as `GraphedDecoder.rounds` had them.
        tree: likewise.
        tree_when_sampled: likewise.
        timed: likewise.
        compiled: likewise.

    Raises:
        InputError: a target or a draft that cannot be captured.
        ValueError: a tree that the draft cannot propose.
    """
    if not can_be_captured(drafter):
        raise InputError("rounds of this draft cannot be captured", where="draft", mend="decode it uncaptured")
    network: FeatureNetwork | None = drafter.network if isinstance(drafter, FeatureDrafter) else None
    rounds = Rounds(
        target,
        network,
        block=block,
        capacity=capacity,
        compiled=compiled,
        tree=tree,
        tree_when_sampled=tree_when_sampled,
    )
    return GraphedDecoder(rounds, timed=timed)
