"""The kernels that put keys and values into their places and attend to what these hold: said plainly, both are put in
their place on a CPU, where rounds must then read what they read without them; on a GPU they are held against that."""

import pytest
import torch
from torch import Tensor

from inference.graphed import contexts, target
from inference.graphed.attending import attend_held, can_attend
from inference.graphed.decode import GraphedDecoder
from inference.graphed.engine import GraphedEngine
from inference.graphed.held import Held
from inference.graphed.rounds import Rounds
from inference.graphed.turning import turn_held
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.trees import Tree
from tests.inference.families import lean_model
from tests.inference.test_feature_drafts import CONFIGS, network_for
from tests.inference.test_graphed import prompt

GREEDY = Request(settings=SamplingSettings(), max_new_tokens=24)
CROOKED = Tree.of([(1,), (3,), (3, 2), (3, 4), (3, 2, 0), (3, 4, 1)])


def attended(
    queries: Tensor,
    states: Tensor,
    layer: int,
    lengths: Tensor,
    rows: Tensor | None = None,
    among: Tensor | None = None,
    *,
    scale: float,
) -> Tensor:
    """What `attend_held` gives, request by request and head by head."""
    count, width, heads, _ = queries.shape
    groups = heads // states.shape[4]
    own = torch.ones(width, width, dtype=torch.bool).tril() if among is None else among.cpu()
    mixed = torch.zeros(queries.shape, dtype=torch.float32)
    for request in range(count):
        place = request if rows is None else int(rows[request])
        end = int(lengths[request]) + own.shape[1]
        seen = torch.cat([own.new_ones(width, int(lengths[request])), own], dim=1)
        for head in range(heads):
            key, value = states[:, layer, place, :end, head // groups].float().cpu()
            products = (queries[request, :, head].float().cpu() @ key.T * scale).masked_fill(~seen, -torch.inf)
            mixed[request, :, head] = products.softmax(-1).nan_to_num(0.0) @ value
    return mixed.to(queries)


def turned(
    rows: Tensor, cosine: Tensor, sine: Tensor, states: Tensor, layer: int, places: Tensor, *, heads: int
) -> Tensor:
    """What `turn_held` does and gives."""
    both, dim = rows.shape[1:]
    kv_heads = (both - heads) // 2
    numbers = rows.float()
    cosine, sine = cosine.float()[:, None], sine.float()[:, None]
    queries_keys = (numbers * cosine + numbers.roll(dim // 2, -1) * sine).to(rows.dtype)
    kept = queries_keys[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]
    for part, new in enumerate(kept):
        states[part, layer].view(-1, kv_heads, dim)[places] = new
    return queries_keys[:, :heads]


def test_the_kernel_is_for_16_bits_on_a_gpu() -> None:
    assert not can_attend(torch.zeros(1, dtype=torch.bfloat16), head_dim=64)


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (target, contexts):
        monkeypatch.setattr(module, "can_attend", lambda states, head_dim: True)
        monkeypatch.setattr(module, "attend_held", attended)
    monkeypatch.setattr(target, "turn_held", turned)


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("tree", [None, CROOKED], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", ["eagle3", "dspark"])
def test_rounds_ask_the_kernel_for_what_they_read_without_it(
    kind: str, tree: Tree | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lean_model("llama", max_position_embeddings=256)

    def decoder() -> GraphedDecoder:
        network = network_for(CONFIGS[kind], model)
        return GraphedDecoder(Rounds(model, network, block=network.block, capacity=256, tree=tree))

    # The last prompt is read in several pieces.
    prompts = [prompt(count, seed=count) for count in (1, 2, 20, 150)]
    kernel = decoder()
    found = [kernel.decode(tokens, request=GREEDY, seed=0) for tokens in prompts]
    monkeypatch.undo()
    plain = decoder()
    for tokens, own in zip(prompts, found, strict=True):
        wanted = plain.decode(tokens, request=GREEDY, seed=0)
        # The same proposals stand, so the draft read the same.
        assert (own.tokens, own.passes) == (wanted.tokens, wanted.passes)


@pytest.mark.usefixtures("by_kernel")
def test_many_requests_ask_the_kernel_for_their_own_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lean_model("llama", max_position_embeddings=256)
    prompts = [prompt(count, seed=count) for count in (9, 1, 70, 3, 2, 20, 5)]

    def answers() -> list[list[int]]:
        network = network_for(CONFIGS["eagle3"], model)
        engine = GraphedEngine(Rounds(model, network, block=network.block, batch=3, capacity=256))
        handles = [engine.submit(tokens, GREEDY, seed=0) for tokens in prompts]
        while not engine.idle:
            engine.step()
        return [handle.result.tokens for handle in handles]

    found = answers()
    monkeypatch.undo()
    assert found == answers()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("requests", "width", "heads", "groups", "dim", "capacity"),
    [
        (1, 1, 9, 3, 64, 128),
        (1, 145, 9, 3, 64, 512),
        (64, 5, 9, 3, 64, 320),
        (3, 7, 4, 2, 16, 64),
        (2, 37, 8, 1, 128, 200),
        (1, 512, 9, 3, 64, 1024),
        (2, 3, 4, 1, 24, 70),
        (1, 2, 8, 4, 256, 300),
    ],
)
def test_the_kernel_attends_as_said(
    dtype: torch.dtype, requests: int, width: int, heads: int, groups: int, dim: int, capacity: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    places = requests + 2
    queries = torch.randn(requests, heads, width, dim, generator=generator).to("cuda", dtype).transpose(1, 2)
    states = torch.randn(2, 3, places, capacity, heads // groups, dim, generator=generator).to("cuda", dtype)
    assert can_attend(queries, head_dim=dim)
    held = torch.randint(capacity - width - 2, (requests,), generator=generator).cuda()
    held[0] = 0
    rows = torch.randperm(places, generator=generator)[:requests].cuda()
    sees = (torch.rand(width + 1, width + 2, generator=generator) < 0.3).cuda()
    sees[1] = False  # a token that sees nothing but the context, of which the first request has none
    for own_rows in (None, rows):
        for among in (None, sees[1:]):
            given = {"rows": own_rows, "among": among, "scale": 0.7 * dim**-0.5}
            found = attend_held(queries, states, 1, held, **given)  # type: ignore[arg-type]
            wanted = attended(queries, states, 1, held, **given)  # type: ignore[arg-type]
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
            if among is not None:
                assert not found[0, 0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("count", "heads", "groups", "dim"), [(1, 9, 3, 64), (145, 9, 3, 64), (7, 4, 2, 24), (5, 8, 1, 128)]
)
def test_what_is_turned_is_kept(dtype: torch.dtype, count: int, heads: int, groups: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    rows, cosine, sine = numbers(count, heads + 2 * groups, dim), numbers(count, dim), numbers(count, dim)
    found = numbers(2, 3, 4, 80, groups, dim)
    wanted, places = found.clone(), torch.randperm(320, generator=generator)[:count].cuda()
    queries = turn_held(rows, cosine, sine, found, 1, places, heads=heads)
    close = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(
        queries, turned(rows, cosine, sine, wanted, 1, places, heads=heads), rtol=close, atol=close
    )
    torch.testing.assert_close(found, wanted, rtol=close, atol=close)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_written_lies_in_its_places(dtype: torch.dtype, *, transposed: bool) -> None:
    requests, width, capacity, heads, dim = 3, 5, 40, 3, 24
    held = Held(2, batch=4, capacity=capacity, kv_heads=heads, head_dim=dim, dtype=dtype, device=torch.device("cuda"))
    shape = (2, requests, width, heads, dim) if transposed else (2, requests, heads, width, dim)
    new = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    keys, values = new.transpose(2, 3) if transposed else new
    places = torch.randperm(4 * capacity, generator=torch.Generator().manual_seed(1))[: requests * width].cuda()
    held.write(1, keys, values, places)
    wanted = torch.zeros_like(held.states)
    for part, each in enumerate((keys, values)):
        wanted[part, 1].view(-1, heads, dim)[places] = each.transpose(1, 2).flatten(0, 1)
    assert torch.equal(held.states, wanted)
