"""On a GPU: captured rounds are the uncaptured ones, compiled ones too, and the ordinary decoder's tokens."""

from collections.abc import Iterator

import pytest
import torch

from inference.attention import use_grouped_attention
from inference.decoder import decode
from inference.drafters.feature import FeatureDrafter
from inference.drafters.none import NoDrafter
from inference.graphed.arms import captured_decoder, longest_block
from inference.graphed.decode import GraphedDecoder
from inference.graphed.likeliest import likeliest
from inference.graphed.rounds import Rounds
from inference.lean import use_lean_layers
from inference.lookahead import RecordingLookahead
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import explain_mismatch
from inference.trees import Tree
from tests.inference.families import family_model, lean_model
from tests.inference.test_feature_drafts import CONFIGS, network_for
from tests.inference.test_graphed import near, plainly, prompt
from tests.inference.test_trees import BUSHY, COPYING, replayed

pytestmark = pytest.mark.gpu
# More than a hundred nodes, as a measured tree has.
WIDE = Tree.of([(a,) for a in range(16)] + [(a, b) for a in range(12) for b in range(9)])
GREEDY = Request(settings=SamplingSettings(), max_new_tokens=40)
SAMPLED = Request(settings=SamplingSettings(temperature=0.7), max_new_tokens=40)


def model(dtype: torch.dtype, precision: str) -> CausalModel:
    """A tiny model on the GPU."""
    made = family_model("llama", max_position_embeddings=256).model.to("cuda", dtype)
    use_grouped_attention(made)
    use_lean_layers(made)
    return CausalModel(made, precision=precision)


@pytest.fixture(scope="module")
def exact() -> Iterator[CausalModel]:
    torch.backends.cuda.matmul.allow_tf32 = False
    yield model(torch.float32, "fp32")


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # exact is what is asked for here
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["none", "eagle3", "dspark"])
def test_captured_rounds_give_the_ordinary_decoders_tokens(exact: CausalModel, kind: str, compiled: bool) -> None:
    network = None if kind == "none" else network_for(CONFIGS[kind], family_on_cpu()).float().cuda()
    if network is not None:
        network.bind(exact)
    block = 0 if network is None else network.block
    decoder = GraphedDecoder(Rounds(exact, network, block=block, capacity=256, compiled=compiled))
    for seed in (3, 4, 5):
        tokens = prompt(20, seed=seed).cuda()
        wanted = plainly(exact, network, tokens, GREEDY)
        assert decoder.decode(tokens, request=GREEDY, seed=0).tokens == wanted.tokens


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("kind", "tree"),
    [("dflash", BUSHY), ("dspark", BUSHY), ("eagle3", BUSHY), ("dspark", COPYING), ("eagle3", COPYING)],
)
def test_captured_trees_give_the_targets_own_tokens(exact: CausalModel, kind: str, tree: Tree, compiled: bool) -> None:
    network = network_for(CONFIGS[kind], family_on_cpu()).float().cuda()
    network.bind(exact)
    decoder = GraphedDecoder(Rounds(exact, network, block=network.block, capacity=256, compiled=compiled, tree=tree))
    on_host = network_for(CONFIGS[kind], family_on_cpu())
    same = GraphedDecoder(
        Rounds(lean_model("llama", max_position_embeddings=256), on_host, block=network.block, capacity=256, tree=tree)
    )
    # Also a prompt that repeats itself, and one of one token.
    for tokens in (prompt(1), prompt(20, seed=3), prompt(20, seed=4), prompt(20, seed=5).repeat(4)):
        given = decoder.decode(tokens.cuda(), request=GREEDY, seed=0)
        assert given.tokens == plainly(exact, None, tokens.cuda(), GREEDY).tokens
        # Nor does the device propose other tokens than a CPU.
        assert given.passes == same.decode(tokens, request=GREEDY, seed=0).passes


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("kind", "lookup"), [("dspark", 0), ("eagle3", 0), ("eagle3", 16)])
def test_sampled_trees_emit_the_targets_draws_by_their_noise(
    exact: CausalModel, kind: str, lookup: int, compiled: bool
) -> None:
    network = network_for(CONFIGS[kind], family_on_cpu()).float().cuda()
    network.bind(exact)
    tree = Tree(WIDE.paths, lookup)
    rounds = Rounds(exact, network, block=0, capacity=256, compiled=compiled, tree=tree, tree_when_sampled=True)
    assert sum(replayed(exact, rounds, prompt(20).cuda(), temperature=1.0, seed=1)) > 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 1000, 8192, 12288, 49152])
def test_the_likeliest_are_those_torch_selects(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator(device="cuda").manual_seed(1)
    for count in (1, 2, 7, 16):
        if count > width:
            continue
        rows = torch.randn(2, 5, width, device="cuda", generator=generator).to(dtype)
        rows[0, 0] = -torch.inf  # all alike
        rows[0, 1, :3] = torch.inf
        given = likeliest(rows, count)
        assert given.shape == (2, 5, count) and given.dtype == torch.long
        # Of equals any will do, but each once.
        assert torch.equal(rows.gather(-1, given), rows.topk(count, dim=-1).values)
        assert all(len(set(row)) == count and max(row) < width for row in given.flatten(0, 1).tolist())


def family_on_cpu() -> CausalModel:
    return family_model("llama", max_position_embeddings=256)


def test_one_seed_gives_one_sampled_answer(exact: CausalModel) -> None:
    decoder = GraphedDecoder(Rounds(exact, None, block=0, capacity=256))
    tokens = prompt(20).cuda()
    first = decoder.decode(tokens, request=SAMPLED, seed=5).tokens
    decoder.decode(prompt(30, seed=9).cuda(), request=GREEDY, seed=0)
    assert decoder.decode(tokens, request=SAMPLED, seed=5).tokens == first
    assert decoder.decode(tokens, request=SAMPLED, seed=6).tokens != first


@pytest.mark.parametrize("kind", ["none", "eagle3", "dspark"])
def test_once_prepared_nothing_is_captured_within_an_answer(exact: CausalModel, kind: str) -> None:
    network = None if kind == "none" else network_for(CONFIGS[kind], family_on_cpu()).float().cuda()
    if network is not None:
        network.bind(exact)
    drafter = NoDrafter() if network is None else FeatureDrafter(network)
    longest = captured_decoder(exact, drafter, block=longest_block(drafter), tokens=200)
    timed = [longest.timed(block, sampled=False) for block in range(longest.rounds.block + 1)]
    assert all(0.0 <= each.draft < each.whole and 0.0 < each.verify <= each.whole for each in timed)
    decoder = longest.of_block(min(1, longest.rounds.block))
    decoder.prepare(longest_prompt=150, sampled=[False, True])
    there = decoder.rounds.programs.names
    for length in (1, 2, 65, 150):
        for request in (GREEDY, SAMPLED):
            decoder.decode(prompt(length).cuda(), request=request, seed=0)
    assert decoder.rounds.programs.names == there
    wanted = plainly(exact, network, prompt(20).cuda(), GREEDY).tokens
    assert decoder.decode(prompt(20).cuda(), request=GREEDY, seed=0).tokens == wanted


@pytest.mark.parametrize("kind", ["eagle3", "dspark"])
def test_recorded_rounds_are_captured_and_note_what_the_ordinary_decoder_knows(exact: CausalModel, kind: str) -> None:
    network = network_for(CONFIGS[kind], family_on_cpu()).float().cuda()
    network.bind(exact)
    decoder = GraphedDecoder(Rounds(exact, network, block=network.block, capacity=256))
    for seed in (3, 4, 5):
        tokens = prompt(20, seed=seed).cuda()
        given, wanted = RecordingLookahead(network.block), RecordingLookahead(network.block)
        source = TorchSource.seeded(0, device="cuda")
        drafter = FeatureDrafter(network)
        decode(exact, drafter, tokens, request=GREEDY, lookahead=wanted, generator=source)
        decoder.decode(tokens, request=GREEDY, seed=0, recording=given)
        assert [(len(s), stood) for s, stood in given.rounds] == [(len(s), stood) for s, stood in wanted.rounds]
        assert all(near(a, b, within=1e-3) for (a, _), (b, _) in zip(given.rounds, wanted.rounds, strict=True))
        sampled = decoder.decode(tokens, request=SAMPLED, seed=seed, recording=given).tokens
        assert decoder.decode(tokens, request=SAMPLED, seed=seed).tokens == sampled


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tree", [None, BUSHY, WIDE, COPYING], ids=["chain", "bushy", "wide", "copying"])
def test_half_precision_leaves_greedy_tokens_at_near_ties_alone(tree: Tree | None, compiled: bool) -> None:
    target = model(torch.bfloat16, "bf16")
    network = network_for(CONFIGS["eagle3"], family_on_cpu()).to("cuda", torch.bfloat16)
    network.bind(target)
    drafted = GraphedDecoder(Rounds(target, network, block=network.block, capacity=256, tree=tree, compiled=compiled))
    alone = GraphedDecoder(Rounds(target, None, block=0, capacity=256, compiled=compiled))
    for seed in range(6):
        tokens = prompt(20, seed=seed).cuda()
        mine = drafted.decode(tokens, request=GREEDY, seed=0).tokens
        reference = alone.decode(tokens, request=GREEDY, seed=0).tokens
        mismatch = explain_mismatch(target, tokens, mine, reference, reference_precision="bf16")
        assert mismatch is None or mismatch.near_tie


def test_the_ordinary_decoder_runs_there(exact: CausalModel) -> None:
    tokens = prompt(12).cuda()
    wanted = plainly(exact, None, tokens, GREEDY).tokens
    network = network_for(CONFIGS["eagle3"], family_on_cpu()).float().cuda()
    network.bind(exact)
    assert plainly(exact, network, tokens, GREEDY).tokens == wanted
