"""Feature-reading drafts: one computation with two faces, masks by brute force, files, and the families they fit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference.batch.contexts import DraftSlots
from inference.errors import InputError
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_drafts.dflash import Config as DFlash
from inference.feature_drafts.dspark import Config as DSpark
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import FeatureNetwork, PackedBatch, embedding_scale, make_network
from inference.feature_networks._checkpoint import load_network, save_network
from inference.model import CausalModel
from inference.precision import available_precisions, storage_dtype
from tests.inference.families import FAMILIES, VOCAB, family_model

BLOCK = 3
TAPS = [0, 1]
SMALL = {"block": BLOCK, "taps": TAPS, "vocabulary": 0}
CONFIGS: dict[str, FeatureDraftConfig] = {
    "dflash": DFlash(**SMALL),
    "dflash-random-one-layer": DFlash(**SMALL, init="random", layers=1, qk_norm=False),
    "dflash-token": DFlash(**SMALL, mask="token", mask_token=6),
    "dspark": DSpark(**SMALL, markov_rank=4),
    "dspark-gated": DSpark(**SMALL, markov_rank=4, markov_head="gated"),
    "dspark-rnn": DSpark(**SMALL, markov_rank=4, markov_head="rnn"),
    "eagle3": Eagle3(**SMALL),
    "eagle3-random": Eagle3(**SMALL, init="random", qk_norm=True),
    "eagle3-wide": Eagle3(**SMALL, intermediate=200),
    "eagle3-narrow": Eagle3(**SMALL, intermediate=8),
}
REDUCED = torch.tensor([1, 3, 4, 8, 20, 21, 40])


def network_for(config: FeatureDraftConfig, target: CausalModel, vocabulary: Tensor | None = None) -> FeatureNetwork:
    """A network in fp64 whose every part does something: what starts at zero is moved."""
    network = make_network(config, target, vocabulary, seed=1).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return network.eval()


def features_of(target: CausalModel, tokens: Tensor, taps: list[int]) -> Tensor:
    """Features `[T, m * D]` of one sequence, in one pass without a cache."""
    with torch.inference_mode(), target.tapped(taps) as features:
        target.model(input_ids=tokens[None], use_cache=False)
        return features.take()[0].clone()


def packed(target: CausalModel, taps: list[int], sequences: list[Tensor], anchors: list[list[int]]) -> PackedBatch:
    """All sequences in one row, every slot valid that lies inside its sequence; one padding anchor and column."""
    width = sum(s.shape[0] for s in sequences) + 1
    tokens, segments = torch.zeros(1, width, dtype=torch.long), torch.full((1, width), -1)
    positions = torch.zeros(1, width, dtype=torch.long)
    rows, columns, slots = [], [], []
    start = 0
    for index, sequence in enumerate(sequences):
        length = sequence.shape[0]
        tokens[0, start : start + length] = sequence
        segments[0, start : start + length] = index
        positions[0, start : start + length] = torch.arange(length)
        rows.append(features_of(target, sequence, taps))
        for anchor in anchors[index]:
            columns.append(start + anchor)
            slots.append([anchor + 1 + k < length for k in range(BLOCK)])
        start += length
    features = torch.cat([*rows, rows[0].new_zeros(1, rows[0].shape[1])])[None]
    return PackedBatch(
        tokens=tokens,
        segments=segments,
        positions=positions,
        features=features,
        anchors=torch.tensor([[*columns, columns[0]]]),
        slots=torch.tensor([[*slots, [False] * BLOCK]]),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def target(request: pytest.FixtureRequest) -> Iterator[CausalModel]:
    """A tiny model of each family."""
    yield family_model(request.param)


@pytest.fixture(scope="module")
def llama() -> CausalModel:
    return family_model("llama")


def sequence(length: int, *, seed: int) -> Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def stepwise(network: FeatureNetwork, features: Tensor, tokens: Tensor, chunks: list[int]) -> list[tuple[int, Tensor]]:
    """Logits `[G, V]` of the block after each prefix whose length is a partial sum of `chunks`, read as decoding does:
    in pieces, with a block drafted after every piece. Tokens of blocks are the sequence's own."""
    found = []
    cache = network.new_cache()
    with torch.inference_mode():
        for chunk in chunks:
            start = cache.length
            network.read(features[start : start + chunk], tokens[start + 1 : start + chunk + 1], cache)
            anchor = cache.length
            block = network.begin_block(tokens[anchor : anchor + 1], cache)
            logits = [
                network.step(block, slot, tokens[anchor + slot, None], confidence=False).logits[0]
                for slot in range(BLOCK)
            ]
            found.append((anchor, torch.stack(logits)))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_with_a_cache_equals_the_training_forward(target: CausalModel, name: str) -> None:
    assert_faces_are_equal(target, CONFIGS[name], None)


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_equal_over_a_reduced_vocabulary_too(llama: CausalModel, name: str) -> None:
    assert_faces_are_equal(llama, CONFIGS[name], REDUCED)


def assert_faces_are_equal(target: CausalModel, config: FeatureDraftConfig, vocabulary: Tensor | None) -> None:
    """Whatever the accepted lengths: the pieces in which features arrive, one to four at a time, change nothing."""
    network = network_for(config, target, vocabulary)
    tokens = sequence(16, seed=3)
    features = features_of(target, tokens, network.taps)
    for chunks in ([1, 1, 1, 4, 2, 1], [5, 3, 2], [2, 4, 1, 3]):
        steps = stepwise(network, features, tokens, chunks)
        batch = packed(target, network.taps, [sequence(7, seed=4), tokens], [[2], [anchor for anchor, _ in steps]])
        with torch.inference_mode():
            states = network.slot_states(batch)[0, 1 : 1 + len(steps)]
            expected = network.head(states.reshape(-1, states.shape[-1])).reshape(len(steps), BLOCK, -1)
        assert expected.shape[-1] == (VOCAB if vocabulary is None else len(vocabulary))
        for (_, logits), wanted in zip(steps, expected, strict=True):
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_requests_that_draft_together_get_what_each_gets_alone(llama: CausalModel, name: str) -> None:
    """Contexts of different lengths, read in pieces, with one that ends and one that sits a block out."""
    network = network_for(CONFIGS[name], llama)
    texts = [sequence(20, seed=seed) for seed in range(3)]
    features = [features_of(llama, text, network.taps) for text in texts]
    slots = DraftSlots(network.cached_layers, max_slots=3, max_tokens=40)
    held: list[list[int]] = [[slots.join(), 0] for _ in texts]  # by slot: which text, positions read
    pieces: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def read(counts: dict[int, int]) -> None:
        spans = [(held[slot][0], held[slot][1], count) for slot, count in counts.items()]
        with torch.inference_mode(), slots.reading(list(counts), list(counts.values()), torch.device("cpu")):
            network.read(
                torch.cat([features[text][start : start + count] for text, start, count in spans]),
                torch.cat([texts[text][start + 1 : start + count + 1] for text, start, count in spans]),
                slots,
            )
        for slot, count in counts.items():
            held[slot][1] += count
            pieces[held[slot][0]].append(count)

    def check(active: list[int]) -> None:
        mine = [held[slot] for slot in active]
        with torch.inference_mode(), slots.drafting(active):
            block = network.begin_block(torch.stack([texts[text][anchor] for text, anchor in mine]), slots)
            for slot in range(BLOCK):
                previous = torch.stack([texts[text][anchor + slot] for text, anchor in mine])
                step = network.step(block, slot, previous, confidence=True)
                for row, (text, _) in enumerate(mine):
                    _, alone = stepwise(network, features[text], texts[text], pieces[text])[-1]
                    torch.testing.assert_close(step.logits[row], alone[slot], rtol=0, atol=1e-9)

    read({0: 5, 1: 9, 2: 2})
    check([0, 1, 2])
    check([0, 2])
    read({1: 1, 2: 3})
    check([0, 1, 2])
    slots.leave(0)
    held[0] = held.pop()
    check([0, 1])
    read({0: 2, 1: 2})
    check([0, 1])
    check([1])


@pytest.mark.parametrize("name", ["dspark", "dspark-gated", "dspark-rnn"])
def test_confidence_of_a_step_equals_that_of_training(llama: CausalModel, name: str) -> None:
    network = network_for(CONFIGS[name], llama)
    tokens = sequence(12, seed=3)
    cache = network.new_cache()
    with torch.inference_mode():
        network.read(features_of(llama, tokens, TAPS)[:5], tokens[1:6], cache)
        block = network.begin_block(tokens[5:6], cache)
        chances = [
            network.step(block, slot, tokens[5 + slot, None], confidence=True).confidence for slot in range(BLOCK)
        ]
        states = network.slot_states(packed(llama, TAPS, [tokens], [[5]]))[0, 0]
        logits = network.confidence_logits(states)
    assert logits is not None
    # In decoding the chance is given in fp32.
    torch.testing.assert_close(torch.cat([c for c in chances if c is not None]), logits.sigmoid().float())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_slot_sees_what_it_must_and_nothing_else(llama: CausalModel, name: str) -> None:
    """Change every input in turn: the states of a block change exactly where the method says they may."""
    network = network_for(CONFIGS[name], llama)
    tokens, other, anchor = sequence(12, seed=3), sequence(6, seed=8), 5
    batch = packed(llama, TAPS, [other, tokens], [[2], [anchor, 8]])
    start = other.shape[0]

    def states(features: Tensor, changed: Tensor) -> Tensor:
        with torch.inference_mode():
            made = network.slot_states(
                PackedBatch(changed, batch.segments, batch.positions, features, batch.anchors, batch.slots)
            )
        return made[0, 1]  # shape: [G, S], the first anchor of the second conversation

    before = states(batch.features, batch.tokens)
    for column in range(batch.tokens.shape[1]):
        features = batch.features.clone()
        features[0, column] += 1.0
        seen = bool((states(features, batch.tokens) - before).abs().max() > 1e-9)
        assert seen == (start <= column < start + anchor), f"features of column {column}"
    eagle, sequential = name.startswith("eagle3"), name.startswith("dspark")
    for column in range(batch.tokens.shape[1]):
        changed = batch.tokens.clone()
        changed[0, column] = (changed[0, column] + 1) % VOCAB
        moved = (states(batch.features, changed) - before).abs().amax(-1) > 1e-9
        place = column - start - anchor
        for slot in range(BLOCK):
            # The anchor's own token reaches all slots. A later one reaches the slot after it through the sequential
            # head, and all after that through a chain or a recurrence. EAGLE-3 reads the context's tokens as well.
            expected = (
                place == 0
                or (eagle and start < column < start + anchor)
                or (sequential and place == slot)
                or ((eagle or name == "dspark-rnn") and 0 < place <= slot)
            )
            assert bool(moved[slot]) == expected, f"token of column {column}, slot {slot}"


def test_padding_anchors_and_rows_leave_gradients_finite(llama: CausalModel) -> None:
    for config in CONFIGS.values():
        network = network_for(config, llama).train()
        batch = packed(llama, TAPS, [sequence(6, seed=1)], [[1, 3]])
        network.slot_states(batch)[batch.slots].square().sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), name


def test_a_network_comes_back_from_its_files(llama: CausalModel, tmp_path: Path) -> None:
    for number, (name, config) in enumerate(CONFIGS.items()):
        vocabulary = REDUCED if number % 2 else None
        network = network_for(config, llama, vocabulary)
        save_network(network, tmp_path / name)
        loaded = load_network(tmp_path / name, llama, precision="fp32")
        assert loaded.taps == network.taps and type(loaded) is type(network)
        for key, tensor in network.own_tensors().items():
            assert torch.equal(loaded.own_tensors()[key], tensor.to(torch.bfloat16).float()), key
        assert (loaded.vocabulary is None) == (vocabulary is None)
        if vocabulary is not None:
            assert loaded.vocabulary is not None and torch.equal(loaded.vocabulary, vocabulary)


@pytest.mark.parametrize("precision", available_precisions(torch.device("cpu")))
def test_loaded_networks_decode_in_every_arithmetic(precision: str, tmp_path: Path) -> None:
    target = CausalModel(family_model("llama").model.float())
    dtype = storage_dtype(precision)
    for number, (name, config) in enumerate(CONFIGS.items()):
        save_network(network_for(config, target, REDUCED if number % 2 else None), tmp_path / name)
        bound = CausalModel(family_model("llama").model.to(dtype))
        network = load_network(tmp_path / name, bound, precision=precision)
        cache = network.new_cache()
        with torch.inference_mode():
            network.read(torch.ones(4, 64, dtype=dtype), torch.tensor([1, 2, 3, 4]), cache)
            block = network.begin_block(torch.tensor([4]), cache)
            steps = [network.step(block, slot, torch.tensor([slot]), confidence=True) for slot in range(BLOCK)]
        assert all(bool(torch.isfinite(step.logits).all()) for step in steps), name


def test_a_draft_for_another_shape_is_refused(llama: CausalModel, tmp_path: Path) -> None:
    save_network(network_for(CONFIGS["dspark"], llama), tmp_path)
    with pytest.raises(InputError, match="the draft was made for a target of shape"):
        load_network(tmp_path, family_model("llama", hidden_size=16), precision="fp32")


def test_damaged_files_are_refused(llama: CausalModel, tmp_path: Path) -> None:
    save_network(network_for(CONFIGS["dspark"], llama), tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(InputError, match="unreadable draft"):
        load_network(tmp_path, llama, precision="fp32")
    weights.write_bytes(content)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"kind": "dspark"', '"kind": "dflash"'))
    with pytest.raises(InputError):
        load_network(tmp_path, llama, precision="fp32")


def test_drafts_start_from_the_target_where_shapes_allow_it() -> None:
    # qwen2 has biases, the gemmas other norms, the last two other parts altogether.
    for family in ("llama", "qwen3", "qwen2", "gemma2", "gemma3_text", "gpt_neox", "phi"):
        model = family_model(family)
        for config in (DSpark(**SMALL, init="random"), Eagle3(**SMALL, init="random")):
            fresh = make_network(config, model, None, seed=1)
            before = {name: tensor.clone() for name, tensor in fresh.own_tensors().items()}
            starts = fresh.init_from(model)
            assert starts is (family in ("llama", "qwen3")), family
            changed = [name for name, tensor in fresh.own_tensors().items() if not torch.equal(tensor, before[name])]
            assert bool(changed) is starts, family


def test_a_copied_layer_does_to_the_states_it_knows_what_it_did_in_the_target(llama: CausalModel) -> None:
    """With no context and one slot a copied layer is the target's own, its norms of queries and keys left out."""
    network = make_network(DFlash(**{**SMALL, "taps": [0]}, layers=1, qk_norm=False), llama, None, seed=1).double()
    [layer] = network.stack  # type: ignore[attr-defined]
    states = torch.randn(1, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    empty = torch.zeros(1, 2, 0, 8, dtype=torch.float64)
    position = torch.tensor([[3]])
    with torch.inference_mode():
        found = layer(states, layer.self_attn.rope(position, states), (empty, empty), None)
        rope = llama.model.model.rotary_emb(states, position)
        expected = llama.model.model.layers[-1](states, position_embeddings=rope, attention_mask=None)
    # transformers computes the rotation's angles in fp32.
    torch.testing.assert_close(found, expected[0] if isinstance(expected, tuple) else expected, rtol=0, atol=1e-4)


def test_embedding_scales_are_measured() -> None:
    assert embedding_scale(family_model("llama")) == 1.0
    assert embedding_scale(family_model("granite", embedding_multiplier=3.0)) == pytest.approx(3.0, rel=1e-6)
    # These scale inside their embedding module already.
    assert embedding_scale(family_model("gemma2")) == embedding_scale(family_model("gemma3_text")) == 1.0


def test_taps_the_target_does_not_have_are_refused(llama: CausalModel) -> None:
    for taps in ([2], [0, 0], [-2]):
        with pytest.raises(InputError, match="cannot tap"):
            make_network(DSpark(**{**SMALL, "taps": taps}), llama, None, seed=0)


def test_a_wider_feed_forward_part_adds_nothing_at_first(llama: CausalModel) -> None:
    networks = [make_network(Eagle3(**SMALL, intermediate=width), llama, None, seed=1) for width in (0, 200)]
    assert networks[1].layer_shape.intermediate == 200 and networks[1].shape == networks[0].shape
    sizes = [sum(p.numel() for p in network.parameters() if p.requires_grad) for network in networks]
    assert sizes[1] > sizes[0]
    tokens = sequence(16, seed=3)
    batch = packed(llama, networks[0].taps, [tokens], [[3, 8]])
    with torch.inference_mode():
        plain, wide = (network.double().slot_states(batch) for network in networks)
    torch.testing.assert_close(plain, wide)
    with pytest.raises(ValueError, match="use 0 or more"):
        Eagle3(**SMALL, intermediate=-1)
