"""Medusa heads: one computation with two faces, what a slot sees, how they start, their files, and the output law."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference.drafters.feature import FeatureDrafter
from inference.feature_drafts.medusa import Config
from inference.feature_networks import FeatureNetwork, make_network
from inference.feature_networks._checkpoint import load_network, save_network
from inference.model import CausalModel
from inference.precision import available_precisions, storage_dtype
from tests.inference.families import FAMILIES, VOCAB, family_model
from tests.inference.law import MemoModel, distance, speculative_law, target_law, tiny_model
from tests.inference.test_feature_drafts import (
    BLOCK,
    REDUCED,
    TAPS,
    features_of,
    network_for,
    packed,
    sequence,
    stepwise,
)
from tests.inference.test_lossless_enumeration import EXACT, POLICIES, SETTINGS

CONFIGS = {
    "one block": Config(block=BLOCK, taps=TAPS, vocabulary=0),
    "two blocks, random": Config(block=BLOCK, taps=TAPS, vocabulary=0, layers=2, init="random"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def target(request: pytest.FixtureRequest) -> Iterator[CausalModel]:
    """A tiny model of each family."""
    yield family_model(request.param)


@pytest.fixture(scope="module")
def llama() -> CausalModel:
    return family_model("llama")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("reduced", [False, True])
def test_decoding_with_a_cache_equals_the_training_forward(target: CausalModel, name: str, reduced: bool) -> None:
    """Whatever the accepted lengths: the pieces in which features arrive change nothing."""
    network = network_for(CONFIGS[name], target, REDUCED if reduced else None)
    tokens = sequence(16, seed=3)
    features = features_of(target, tokens, TAPS)
    for chunks in ([1, 1, 1, 4, 2, 1], [5, 3, 2], [2, 4, 1, 3]):
        steps = stepwise(network, features, tokens, chunks)
        batch = packed(target, TAPS, [sequence(7, seed=4), tokens], [[2], [anchor for anchor, _ in steps]])
        with torch.inference_mode():
            states = network.slot_states(batch)[0, 1 : 1 + len(steps)]
            expected = network.head(states.reshape(-1, states.shape[-1])).reshape(len(steps), BLOCK, -1)
        assert expected.shape[-1] == (len(REDUCED) if reduced else VOCAB)
        for (_, logits), wanted in zip(steps, expected, strict=True):
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-9)


def test_a_cache_counts_positions_and_forgets_them(llama: CausalModel) -> None:
    network = network_for(CONFIGS["one block"], llama)
    tokens, other = sequence(9, seed=3), sequence(9, seed=4)
    cache = network.new_cache()

    def first_slot(tokens: Tensor, lengths: list[int]) -> Tensor:
        with torch.inference_mode():
            features = features_of(llama, tokens, TAPS)
            for length in lengths:
                start = cache.length
                network.read(features[start : start + length], tokens[start + 1 : start + 1 + length], cache)
                assert cache.length == start + length
            block = network.begin_block(tokens[cache.length, None], cache)
            return network.step(block, 0, tokens[cache.length, None], confidence=False).logits[0]

    alone = first_slot(tokens, [2, 4])
    cache.clear()
    assert cache.length == 0
    first_slot(other, [7])
    cache.clear()
    assert torch.equal(first_slot(tokens, [6]), alone), "nothing of another request is left"
    # Keys and values have no width: only the last position is kept, however long the context.
    assert cache.nbytes() == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_slot_sees_the_feature_before_the_anchor_and_the_anchor_alone(llama: CausalModel, name: str) -> None:
    """Change every input in turn: the states of a block change exactly where the method says they may."""
    network = network_for(CONFIGS[name], llama)
    tokens, other, anchor = sequence(12, seed=3), sequence(6, seed=8), 5
    batch = packed(llama, TAPS, [other, tokens], [[2], [anchor, 8]])
    place = other.shape[0] + anchor

    def moved(features: Tensor, changed: Tensor) -> list[bool]:
        with torch.inference_mode():
            after = network.slot_states(replace(batch, features=features, tokens=changed))
            # The first anchor of the second conversation; [G].
            return ((after - network.slot_states(batch))[0, 1].abs().amax(-1) > 1e-9).tolist()

    for column in range(batch.tokens.shape[1]):
        features, changed = batch.features.clone(), batch.tokens.clone()
        features[0, column] += torch.arange(1.0, 1.0 + features.shape[-1])
        changed[0, column] = (changed[0, column] + 1) % VOCAB
        assert moved(features, batch.tokens) == [column == place - 1] * BLOCK, f"features of column {column}"
        assert moved(batch.features, changed) == [column == place] * BLOCK, f"token of column {column}"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gemma2", "granite"])
@pytest.mark.parametrize("reduced", [False, True])
def test_it_starts_as_the_targets_head_on_the_last_tap(family: str, reduced: bool) -> None:
    # With the target's last layer as the last tap, every slot gives the target's own row before the anchor, whatever
    # way a family stores its norm and scales its logits.
    model = family_model(family)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    network = make_network(CONFIGS["one block"], model, REDUCED if reduced else None, seed=1).double()
    tokens = sequence(9, seed=3)
    with torch.inference_mode():
        rows = model.model(input_ids=tokens[None], use_cache=False).logits[0]
    for anchor, logits in stepwise(network, features_of(model, tokens, TAPS), tokens, [1, 3, 2]):
        row = rows[anchor - 1, REDUCED] if reduced else rows[anchor - 1]
        # A new network is in fp32.
        torch.testing.assert_close(logits, row.expand(BLOCK, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_learns_from_the_start(target: CausalModel, name: str) -> None:
    """Parts that start at zero, and a padding anchor in the batch, leave no gradient dead or infinite."""
    network = make_network(CONFIGS[name], target, REDUCED, seed=1).double().train()
    batch = packed(target, TAPS, [sequence(7, seed=1)], [[1, 3]])
    states = network.slot_states(batch)[batch.slots]
    network.head(states).log_softmax(-1)[:, 0].sum().backward()
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), key
            assert float(parameter.grad.abs().max()) > 0, key


@pytest.mark.parametrize("reduced", [False, True])
def test_heads_come_back_from_their_files(llama: CausalModel, tmp_path: Path, reduced: bool) -> None:
    network = network_for(CONFIGS["two blocks, random"], llama, REDUCED if reduced else None)
    save_network(network, tmp_path)
    loaded = load_network(tmp_path, llama, precision="fp32")
    assert loaded.config == network.config and loaded.taps == network.taps and type(loaded) is type(network)
    # The files are bf16.
    kept = {key: tensor.to(torch.bfloat16).float() for key, tensor in network.own_tensors().items()}
    assert loaded.own_tensors().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[key]) for key, tensor in loaded.own_tensors().items())
    assert (loaded.vocabulary is not None) == reduced
    if loaded.vocabulary is not None:
        assert torch.equal(loaded.vocabulary, REDUCED)


@pytest.mark.parametrize("precision", available_precisions(torch.device("cpu")))
def test_loaded_heads_decode_in_every_arithmetic(llama: CausalModel, tmp_path: Path, precision: str) -> None:
    save_network(network_for(CONFIGS["one block"], llama, REDUCED), tmp_path)
    target = family_model("llama")
    target.model.to(storage_dtype(precision))
    network = load_network(tmp_path, target, precision=precision)
    tokens = sequence(9, seed=3)
    exact = network_for(CONFIGS["one block"], llama, REDUCED)
    wanted = stepwise(exact, features_of(llama, tokens, TAPS), tokens, [4])
    found = stepwise(network, features_of(target, tokens, TAPS), tokens, [4])
    # Weights lose up to 2^-8 of themselves in the file, and in bf16 every product does too.
    torch.testing.assert_close(found[0][1].double(), wanted[0][1], rtol=0.1, atol=0.1)


def test_work_is_counted_in_products() -> None:
    config = Config(block=4, layers=2, taps=[0, 1, 2], vocabulary=10, anchors=16)
    # 16 anchors, each with 3 + 1 products before and 4 * 2 in the slots, a tenth of a layer each; 16 * 4 slots go
    # through a tenth of a head. A long prompt adds nothing.
    for prompt_tokens in (10, 10_000):
        work = config.step_work(prompt_tokens=prompt_tokens, response_tokens=96, num_target_layers=30, vocab_size=100)
        assert work == pytest.approx((0.1 * 16 * 12, 6.4))
    # Six response tokens have six anchors.
    short = config.step_work(prompt_tokens=10, response_tokens=6, num_target_layers=30, vocab_size=100)
    assert short == pytest.approx((0.1 * 6 * 12, 2.4))


def test_settings_that_mean_nothing_here_are_refused() -> None:
    with pytest.raises(ValueError, match=r"draft\.medusa\.layers is 0; use at least 1"):
        Config(layers=0)


# The output law


def drafter(*, reduced: bool) -> FeatureDrafter:
    """Untrained heads whose proposals depend on everything they read, and are far from uniform."""
    config = Config(block=2, taps=[0, 1], vocabulary=0)
    network: FeatureNetwork = make_network(config, tiny_model(0), torch.tensor([0, 2]) if reduced else None, seed=3)
    network.double()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return FeatureDrafter(network.eval())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("reduced", [False, True], ids=["all tokens", "two of three tokens"])
def test_output_law_equals_the_targets(reduced: bool, policy: str, settings: str) -> None:
    target = MemoModel(tiny_model(0))
    law = speculative_law(target, drafter(reduced=reduced), POLICIES[policy], SETTINGS[settings])
    assert distance(law, target_law(target, SETTINGS[settings])) < EXACT
    # Every path was walked: the probabilities of all outputs add up to one.
    assert sum(law.values()) == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize("reduced", [False, True], ids=["all tokens", "two of three tokens"])
def test_output_law_holds_with_real_caches_and_hooks(reduced: bool) -> None:
    target, settings = tiny_model(0), SETTINGS["T=1"]
    law = speculative_law(target, drafter(reduced=reduced), POLICIES["fixed"], settings)
    # Passes of different widths round differently in the last bits.
    assert distance(law, target_law(MemoModel(tiny_model(0)), settings)) < 1e-6
