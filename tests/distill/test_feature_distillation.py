"""Feature drafts in training: what a batch holds, the loss by plain sums, held-out figures by hand, and learning."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.corpus import Sample
from distill.distillation import capture_states
from distill.draft_vocabulary import covered_mass, draft_vocabulary
from distill.feature_distillation import FeatureDistillation, _pack
from distill.features import capture_features
from distill.objectives import Objective, cross_entropy, forward_kl, lk, mix, reads_labels
from inference.errors import InputError
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_drafts.dflash import Config as DFlash
from inference.feature_drafts.dspark import Config as DSpark
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import FeatureNetwork, PackedBatch, make_network
from inference.generation import generate_batch
from inference.model import CausalModel
from inference.sampling_settings import SamplingSettings
from tests.inference.families import VOCAB, family_model
from tests.inference.test_feature_drafts import BLOCK, SMALL, TAPS, features_of, network_for, stepwise

KINDS: dict[str, FeatureDraftConfig] = {
    "dflash": DFlash(**SMALL),
    "dspark": DSpark(**SMALL, markov_rank=4, confidence_weight=0.7),
    "eagle3": Eagle3(**SMALL),
}
OBJECTIVES: dict[str, Objective] = {
    "hybrid": lk.Config(mode="hybrid", eta=2.0).build(),
    "alpha": lk.Config(mode="alpha").build(),
    "forward_kl": forward_kl.Config().build(),
}
# Half of the tokens, so that about half of all labels are none of the draft's.
HALF = torch.arange(0, VOCAB, 2)
# Length of a conversation and its responses. Among them: several turns, a response from the second token on, one of a
# single token, one up to the end, and a template's tail behind it.
CONVERSATIONS: list[tuple[int, list[tuple[int, int]]]] = [
    (12, [(4, 9)]),
    (20, [(3, 6), (9, 10), (14, 20)]),
    (9, [(1, 4)]),
    (30, [(2, 8), (20, 30)]),
    (16, [(5, 7), (8, 11), (12, 15)]),
]


@pytest.fixture(scope="module")
def target() -> CausalModel:
    model = family_model("llama")
    model.model.requires_grad_(False)
    return model


def _sample(index: int, length: int, spans: list[tuple[int, int]], *, split: str = "train") -> Sample:
    mask = torch.zeros(length, dtype=torch.bool)
    for start, end in spans:
        mask[start:end] = True
    generator = torch.Generator().manual_seed(index)
    return Sample(
        id=f"p{index}",
        domain=("chat", "code")[index % 2],
        source="made",
        split=split,
        tokens=torch.randint(VOCAB, (length,), generator=generator),
        mask=mask,
        states=None,
        text="",
    )


def _samples(target: CausalModel, *, validation: int = 2) -> list[Sample]:
    """The conversations above, with the target's states; the last ones held out."""
    train = len(CONVERSATIONS) - validation
    return capture_states(
        target,
        [
            _sample(index, length, spans, split="train" if index < train else "validation")
            for index, (length, spans) in enumerate(CONVERSATIONS)
        ],
    )


def _network(config: FeatureDraftConfig, target: CausalModel, vocabulary: Tensor | None = None) -> FeatureNetwork:
    network = network_for(config, target, vocabulary).train()
    # Once more, now that it is in fp64: the head's rows to the last bit.
    network.bind(target, copy_head=True)
    return network


def _distillation(
    target: CausalModel,
    config: FeatureDraftConfig,
    samples: list[Sample],
    *,
    vocabulary: Tensor | None = None,
    objective: str = "hybrid",
    seed: int = 0,
) -> FeatureDistillation:
    return FeatureDistillation(
        _network(config, target, vocabulary),
        target,
        samples,
        features_of=partial(capture_features, target, taps=TAPS),
        objective=OBJECTIVES[objective],
        seed=seed,
    )


def _coded(sample: Sample) -> Sample:
    """The sample with states that say whose they are: 100 x conversation + the column they predicted."""
    columns = sample.mask.nonzero() + 100.0 * int(sample.id[1:])
    return replace(sample, states=columns.double().expand(-1, 32))


def _coded_features(sample: Sample) -> Tensor:
    """Features that say where they belong: 100 x conversation + column."""
    columns = torch.arange(sample.tokens.shape[0])[:, None] + 100.0 * int(sample.id[1:])
    return columns.double().expand(-1, 32 * len(TAPS))


def _coded_distillation(target: CausalModel, *, seed: int = 0, **settings: int) -> FeatureDistillation:
    """All conversations are training samples; whatever a batch holds can be told from its numbers."""
    config = DFlash(**{**SMALL, **settings})
    samples = [_coded(_sample(index, length, spans)) for index, (length, spans) in enumerate(CONVERSATIONS)]
    network = make_network(config, target, None, seed=0)
    return FeatureDistillation(
        network, target, samples, features_of=_coded_features, objective=OBJECTIVES["hybrid"], seed=seed
    )


def _blocks(mask: list[bool]) -> dict[int, list[int]]:
    """The columns each possible anchor predicts, token by token."""
    found = {}
    for anchor in range(1, len(mask)):
        columns = []
        for column in range(anchor + 1, min(anchor + 1 + BLOCK, len(mask))):
            if not mask[column]:
                break
            columns.append(column)
        if columns:
            found[anchor] = columns
    return found


def _placed_blocks(batch: dict[str, Tensor]) -> dict[int, dict[int, list[int]]]:
    """The same for every conversation of a coded batch, out of its slots; columns counted in the conversation."""
    found: dict[int, dict[int, list[int]]] = {}
    for row, anchors in enumerate(batch["anchors"].tolist()):
        for place, column in enumerate(anchors):
            slots = batch["slots"][row, place]
            if not slots.any():
                continue
            conversation, anchor = divmod(int(batch["features"][row, column, 0]), 100)
            blocks = found.setdefault(conversation, {})
            assert anchor not in blocks, "an anchor twice"
            blocks[anchor] = [anchor + 1 + slot for slot in slots.nonzero()[:, 0].tolist()]
    return found


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Batches


def test_a_batch_is_a_pure_function_of_the_step(target: CausalModel) -> None:
    one, other = (_coded_distillation(target, sequences_per_step=2, anchors=3) for _ in range(2))
    for step in (5, 0, 3):
        one.batch(step + 1, 0)
        assert _equal(one.batch(step, 1, accumulation=2), other.batch(step, 1, accumulation=2))
        assert not _equal(one.batch(step, 0), one.batch(step + 1, 0))
    assert not _equal(one.batch(0, 0), _coded_distillation(target, seed=1, sequences_per_step=2).batch(0, 0))


def test_micro_batches_follow_each_other_like_steps(target: CausalModel) -> None:
    distillation = _coded_distillation(target, sequences_per_step=2, anchors=3)
    for position in range(6):
        step, micro = divmod(position, 3)
        assert _equal(distillation.batch(position, 0), distillation.batch(step, micro, accumulation=3))


def test_every_epoch_holds_every_conversation_once_in_another_order(target: CausalModel) -> None:
    distillation = _coded_distillation(target, sequences_per_step=1)
    visited = [next(iter(_placed_blocks(distillation.batch(step, 0)))) for step in range(4 * 5)]
    epochs = [tuple(visited[start : start + 5]) for start in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(epochs)) > 1
    other = _coded_distillation(target, seed=1, sequences_per_step=1)
    assert visited != [next(iter(_placed_blocks(other.batch(step, 0)))) for step in range(4 * 5)]


@pytest.mark.parametrize("max_tokens", [512, 22, 14, 6])
def test_anchors_and_slots_are_those_of_the_mask(target: CausalModel, max_tokens: int) -> None:
    distillation = _coded_distillation(target, sequences_per_step=5, anchors=100, max_tokens=max_tokens)
    usable = {}
    for index, sample in enumerate(_coded_distillation(target).train):
        if blocks := _blocks(sample.mask[:max_tokens].tolist()):
            usable[index] = blocks
    assert [int(sample.id[1:]) for sample in distillation.train] == list(usable)
    batch = distillation.collate(
        [distillation._piece(s, count=100, generator=torch.Generator()) for s in distillation.train]
    )
    assert _placed_blocks(batch) == usable


def test_the_first_token_of_a_response_is_predicted_from_its_prompt(target: CausalModel) -> None:
    blocks = _placed_blocks(_coded_distillation(target, sequences_per_step=5, anchors=100).batch(0, 0))
    # Column 3 ends the prompt; nothing behind the response is predicted, and a block stops where a turn does.
    assert blocks[0] == {3: [4, 5, 6], 4: [5, 6, 7], 5: [6, 7, 8], 6: [7, 8], 7: [8]}
    assert blocks[1][8] == [9]
    # Its response begins with the second token, but nothing lies before the first.
    assert blocks[2] == {1: [2, 3], 2: [3]}


def _prompted(target: CausalModel, objective: Objective = OBJECTIVES["hybrid"], **settings: Any) -> FeatureDistillation:
    """Coded conversations whose states are known everywhere, and anchors drawn in prompts too."""
    samples = []
    for index, (length, spans) in enumerate(CONVERSATIONS):
        columns = torch.arange(1, length)[:, None] + 100.0 * index
        samples.append(replace(_sample(index, length, spans), states=columns.double().expand(-1, 32)))
    config = DFlash(**{**SMALL, "prompt_share": 0.5, **settings})
    return FeatureDistillation(
        make_network(config, target, None, seed=0),
        target,
        samples,
        features_of=_coded_features,
        objective=objective,
        seed=0,
    )


def test_a_share_of_the_anchors_lies_in_prompts_and_their_blocks_run_on(target: CausalModel) -> None:
    blocks = _placed_blocks(_prompted(target, sequences_per_step=5, anchors=200).batch(0, 0))
    for index, (length, spans) in enumerate(CONVERSATIONS):
        mask = _sample(index, length, spans).mask.tolist()
        expected = {
            anchor: [column for column in range(anchor + 1, min(anchor + 1 + BLOCK, length))]
            for anchor in range(1, length - 1)
            if not mask[anchor + 1]
        } | _blocks(mask)
        assert blocks[index] == expected


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_no_more_than_the_share_is_drawn_from_prompts(target: CausalModel, share: float) -> None:
    distillation = _prompted(target, sequences_per_step=5, anchors=4, prompt_share=share)
    for step in range(4):
        for index, found in _placed_blocks(distillation.batch(step, 0)).items():
            mask = distillation.train[index].mask.tolist()
            asked = sum(not mask[anchor + 1] for anchor in found)
            possible = sum(not mask[column] for column in range(2, len(mask)))
            assert asked == min(round(4 * share), possible)
            assert len(found) - asked == min(4 - asked, len(_blocks(mask)))


@pytest.mark.parametrize("kind", ["cross_entropy", "mix"])
def test_an_objective_that_reads_labels_keeps_to_the_targets_own_words(target: CausalModel, kind: str) -> None:
    objective = {"cross_entropy": cross_entropy.Config().build(), "mix": mix.Config().build()}[kind]
    batches = [
        _prompted(target, objective, sequences_per_step=5, anchors=6).batch(0, 0),
        _prompted(target, sequences_per_step=5, anchors=6, prompt_share=0.0).batch(0, 0),
    ]
    assert _equal(*batches)
    assert not reads_labels(mix.Config(weights={"total_variation": 1.0}).build())


def test_held_out_figures_keep_to_responses(target: CausalModel) -> None:
    samples = _samples(target)
    figures = [
        _distillation(target, replace(KINDS["eagle3"], prompt_share=share), samples).evaluate() for share in (0.0, 0.5)
    ]
    assert figures[0] == figures[1]


def test_fewer_anchors_are_drawn_anew_in_every_epoch(target: CausalModel) -> None:
    distillation = _coded_distillation(target, sequences_per_step=5, anchors=3)
    all_blocks = [_blocks(sample.mask.tolist()) for sample in distillation.train]
    seen = []
    for epoch in range(8):
        blocks = _placed_blocks(distillation.batch(epoch, 0))
        for index, found in blocks.items():
            assert len(found) == min(3, len(all_blocks[index]))
            assert found.items() <= all_blocks[index].items()
        seen.append(tuple(blocks[3]))
    assert len(set(seen)) > 4
    assert {anchor for anchors in seen for anchor in anchors} > set(seen[0])


@pytest.mark.parametrize("row_tokens", [1, 40, 1000])
@pytest.mark.parametrize("max_tokens", [512, 22])
def test_labels_and_states_are_those_of_their_slots(target: CausalModel, row_tokens: int, max_tokens: int) -> None:
    distillation = _coded_distillation(
        target, sequences_per_step=5, anchors=6, row_tokens=row_tokens, max_tokens=max_tokens
    )
    for batch in (*(distillation.batch(step, 0) for step in range(3)), _prompted(target, anchors=6).batch(0, 0)):
        slots = batch["slots"].nonzero().tolist()
        assert len(slots) == len(batch["labels"]) == len(batch["places"]) == len(batch["target_states"])
        for number, (row, place, slot) in enumerate(slots):
            column = int(batch["anchors"][row, place]) + 1 + slot
            assert batch["labels"][number] == batch["tokens"][row, column]
            assert batch["places"][number] == slot
            # State and feature bear the same number: conversation and column.
            assert batch["target_states"][number, 0] == batch["features"][row, column, 0]


@pytest.mark.parametrize("row_tokens", [1, 40, 1000])
def test_rows_hold_whole_conversations_one_after_the_other(target: CausalModel, row_tokens: int) -> None:
    distillation = _coded_distillation(target, sequences_per_step=5, row_tokens=row_tokens)
    batch = distillation.batch(0, 0)
    assert batch["tokens"].shape[0] == {1: 5, 40: 3, 1000: 1}[row_tokens]
    found = []
    for row in range(batch["tokens"].shape[0]):
        segments = batch["segments"][row]
        used = int((segments >= 0).sum())
        assert segments[:used].diff().ge(0).all() and segments[used:].eq(-1).all()
        for segment in range(int(segments.max()) + 1):
            mine = segments == segment
            sample = distillation.train[int(batch["features"][row][mine][0, 0]) // 100]
            assert torch.equal(batch["tokens"][row][mine], sample.tokens)
            assert torch.equal(batch["features"][row][mine], _coded_features(sample))
            assert batch["positions"][row][mine].tolist() == list(range(len(sample.tokens)))
            found.append(sample.id)
    assert sorted(found) == [f"p{index}" for index in range(5)]


def test_conversations_go_longest_first_into_the_first_row_with_room() -> None:
    # 9 and 7 open a row each, 5 fits neither, 3 goes beside 7.
    assert _pack([5, 9, 3, 7], capacity=10) == [[1], [3, 2], [0]]
    # What is longer than a row has one of its own; equal lengths keep their order.
    assert _pack([4, 30, 4, 4], capacity=8) == [[1], [0, 2], [3]]
    assert _pack([3], capacity=1) == [[0]]


@pytest.mark.parametrize("capacity", [1, 7, 20, 64, 1000])
def test_packing_places_each_conversation_once_and_overfills_no_row(capacity: int) -> None:
    lengths = torch.randint(1, 40, (50,), generator=torch.Generator().manual_seed(capacity)).tolist()
    rows = _pack(lengths, capacity=capacity)
    assert sorted(index for row in rows for index in row) == list(range(50))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert all(total <= capacity or len(row) == 1 for total, row in zip(sums, rows, strict=True))
    # No two rows could be one.
    assert all(one + other > capacity for i, one in enumerate(sums) for other in sums[:i])


def test_a_corpus_without_anchors_is_refused(target: CausalModel) -> None:
    message = r"no training sample has a response \[corpus\]: build a larger corpus"
    unusable = [(9, []), (9, [(0, 2)]), (12, [(6, 9)])]
    samples = [_sample(index, length, spans) for index, (length, spans) in enumerate(unusable)]
    held_out = _sample(7, 9, [(3, 6)], split="validation")
    # Nothing supervised; nothing before the only anchor; nothing left of the response after a cut.
    for chosen in (samples[:1], samples[1:2], samples, [held_out], []):
        with pytest.raises(InputError, match=message):
            _distillation(target, DFlash(**SMALL, max_tokens=6), chosen)
    assert len(_distillation(target, DFlash(**SMALL, max_tokens=7), samples).train) == 1


# Loss


def _divergence(name: str, draft: Tensor, teacher: Tensor) -> Tensor:
    """One slot's loss from the two distributions, by the formulas of the papers."""
    kl = (teacher * (teacher / draft).log()).sum()
    accepted = torch.minimum(draft, teacher).sum()
    if name == "alpha":
        return -accepted.log()
    if name == "forward_kl":
        return kl
    share = torch.exp(-2.0 * accepted.detach())
    return share * kl + (1 - share) * (draft - teacher).abs().sum() / 2


def _plain_sums(
    distillation: FeatureDistillation, batch: dict[str, Tensor], *, objective: str, confidence_weight: float
) -> tuple[Tensor, float, float]:
    """Loss, weight and acceptance, a slot at a time with all its logits."""
    network, target = distillation.network, distillation.target
    vocabulary = torch.arange(VOCAB) if network.vocabulary is None else network.vocabulary
    names = ("tokens", "segments", "positions", "features", "anchors", "slots")
    packed = PackedBatch(**{name: batch[name].double() if name == "features" else batch[name] for name in names})
    states = network.slot_states(packed)
    loss, weights, acceptance = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for number, (row, place, slot) in enumerate(batch["slots"].nonzero().tolist()):
        if int(batch["labels"][number]) not in vocabulary.tolist():
            continue
        state = states[row, place, slot]
        draft = network.head(state[None])[0].softmax(-1)
        teacher = target.head(batch["target_states"][number].double()[None])[0, vocabulary].softmax(-1)
        weight = math.exp(-slot / network.config.position_decay) if network.config.position_decay else 1.0
        accepted = torch.minimum(draft, teacher).sum().detach()
        loss = loss + weight * _divergence(objective, draft, teacher)
        chance = network.confidence_logits(state[None])
        if chance is not None:
            chance = chance[0].sigmoid()
            entropy = -accepted * chance.log() - (1 - accepted) * (1 - chance).log()
            loss = loss + confidence_weight * weight * entropy
        weights, acceptance = weights + weight, acceptance + weight * float(accepted)
    return loss, weights, acceptance


def _gradients(network: FeatureNetwork, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_plain_sums_over_slots(
    target: CausalModel, kind: str, reduced: bool, objective: str
) -> None:
    # Chunks smaller than a batch, several rows, and a decay under which slots differ.
    config = replace(KINDS[kind], chunk_tokens=5, row_tokens=40, position_decay=2.0, sequences_per_step=3, anchors=4)
    distillation = _distillation(
        target, config, _samples(target), vocabulary=HALF if reduced else None, objective=objective
    )
    batch = distillation.batch(1, 0)
    sums = distillation.loss(batch)
    loss, weights, acceptance = _plain_sums(distillation, batch, objective=objective, confidence_weight=0.7)
    # Weights are in fp32.
    assert float(sums.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert sums.tokens == pytest.approx(weights, rel=1e-6)
    assert sums.acceptance == pytest.approx(acceptance, rel=1e-6)
    found, expected = (_gradients(distillation.network, value) for value in (sums.loss, loss))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_soft_caps_and_scales_of_the_targets_head_are_the_teachers_too(family: str) -> None:
    model = family_model(family)
    for vocabulary in (None, HALF):
        distillation = _distillation(model, KINDS["dflash"], _samples(model), vocabulary=vocabulary)
        batch = distillation.batch(0, 0)
        loss, _, _ = _plain_sums(distillation, batch, objective="hybrid", confidence_weight=0.0)
        assert float(distillation.loss(batch).loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("decay", [0.0, 2.0])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_of_a_batch_is_known_before_the_loss(
    target: CausalModel, kind: str, reduced: bool, decay: float
) -> None:
    config = replace(KINDS[kind], position_decay=decay, sequences_per_step=3, anchors=4)
    distillation = _distillation(target, config, _samples(target), vocabulary=HALF if reduced else None)
    for step in range(3):
        batch = distillation.batch(step, 0)
        assert distillation.weight(batch) == pytest.approx(float(distillation.loss(batch).tokens), rel=1e-6)


def test_what_is_left_out_and_cut_is_counted(target: CausalModel) -> None:
    # The responses begin at 4, 3, 1, 2 and 5, in conversations of 12, 20, 9, 30 and 16; at 5 the fifth has none, and
    # nothing lies before the third's first token, but it goes on until 4.
    assert _coded_distillation(target, max_tokens=5).counts == {
        "samples": 4,
        "validation_samples": 0,
        "samples_without_response": 1,
        "samples_cut": 4,
        "tokens_cut": 7 + 15 + 4 + 25,
    }


def test_without_a_decay_all_slots_weigh_alike(target: CausalModel) -> None:
    distillation = _distillation(target, replace(KINDS["dflash"], position_decay=0.0), _samples(target))
    batch = distillation.batch(0, 0)
    assert distillation.loss(batch).tokens == batch["labels"].shape[0]


def test_labels_outside_the_vocabulary_weigh_nothing(target: CausalModel) -> None:
    config = replace(KINDS["dspark"], position_decay=0.0)
    distillation = _distillation(target, config, _samples(target), vocabulary=HALF)
    batch = distillation.batch(0, 0)
    sums = distillation.loss(batch)
    assert 0 < sums.tokens == int((batch["labels"] % 2 == 0).sum()) < batch["labels"].shape[0]
    # No slot's loss depends on which token outside it was.
    batch["labels"] = torch.where(batch["labels"] % 2 == 0, batch["labels"], 1)
    assert float(distillation.loss(batch).loss.detach()) == float(sums.loss.detach())


def test_a_teacher_cut_to_the_vocabulary_is_renormalised(target: CausalModel) -> None:
    # A draft whose states are the target's own gives the target's rows over the vocabulary: nothing is left to learn.
    distillation = _distillation(target, KINDS["dflash"], _samples(target), vocabulary=HALF, objective="forward_kl")
    batch = distillation.batch(0, 0)
    distillation._slot_states = lambda batch: batch["target_states"].double()  # type: ignore[method-assign]
    sums = distillation.loss(batch)
    assert abs(float(sums.loss)) < 1e-9
    assert sums.acceptance == pytest.approx(sums.tokens)


def test_the_confidence_head_learns_from_its_own_term_alone(target: CausalModel) -> None:
    gradients = {}
    for weight in (0.0, 1.0, 2.0):
        config = replace(KINDS["dspark"], confidence_weight=weight)
        distillation = _distillation(target, config, _samples(target))
        gradients[weight] = _gradients(distillation.network, distillation.loss(distillation.batch(0, 0)).loss)
    names = {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    assert gradients[1.0].keys() - gradients[0.0].keys() == names
    for name in names:
        assert bool(gradients[1.0][name].any())
        torch.testing.assert_close(gradients[2.0][name], 2 * gradients[1.0][name])
    # The wanted chance is detached: the sequential head's output matrix gets nothing from it.
    torch.testing.assert_close(
        gradients[1.0]["markov_head.markov_w2.weight"], gradients[0.0]["markov_head.markov_w2.weight"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_draft_learns_and_the_target_does_not(target: CausalModel, kind: str) -> None:
    distillation = _distillation(target, KINDS[kind], _samples(target), vocabulary=HALF)
    gradients = _gradients(distillation.network, distillation.loss(distillation.batch(0, 0)).loss)
    wanted = {name for name, p in distillation.network.named_parameters() if p.requires_grad}
    assert gradients.keys() == wanted and not any(name.startswith("lm_head") for name in wanted)
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in gradients.values())
    assert all(p.grad is None for p in target.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduced", [False, True])
def test_packing_changes_neither_loss_nor_gradients(target: CausalModel, kind: str, reduced: bool) -> None:
    samples, vocabulary = _samples(target, validation=0), HALF if reduced else None
    found = []
    for row_tokens, rows in ((1, 5), (40, 3), (1000, 1)):
        config = replace(KINDS[kind], row_tokens=row_tokens, sequences_per_step=5, anchors=5)
        distillation = _distillation(target, config, samples, vocabulary=vocabulary)
        batch = distillation.batch(2, 0)
        assert batch["tokens"].shape[0] == rows
        sums = distillation.loss(batch)
        found.append((sums, _gradients(distillation.network, sums.loss)))
    (alone, gradients), *others = found
    for sums, same in others:
        assert float(sums.tokens) == pytest.approx(float(alone.tokens), rel=1e-6)
        assert abs(float(sums.loss.detach()) - float(alone.loss.detach())) < 1e-9
        for name, gradient in gradients.items():
            torch.testing.assert_close(same[name], gradient, rtol=0, atol=1e-9)


# Held-out figures


def _figures(network: FeatureNetwork, target: CausalModel, samples: list[Sample]) -> dict[str, float]:
    """The same figures by decoding: a block drafted at every anchor, all rows of the target's head at hand."""
    vocabulary = torch.arange(VOCAB) if network.vocabulary is None else network.vocabulary
    accepted: list[list[float]] = [[] for _ in range(BLOCK)]
    taus: list[tuple[str, float, float]] = []
    for sample in samples:
        blocks = _blocks(sample.mask.tolist())
        assert len(blocks) <= 24, "evaluation draws no more than so many anchors"
        anchors = sorted(blocks)
        chunks = [now - before for before, now in zip([0, *anchors], anchors, strict=False)]
        padded = torch.cat([sample.tokens, torch.zeros(BLOCK, dtype=torch.long)])
        features = features_of(target, sample.tokens, TAPS).bfloat16().double()
        with torch.inference_mode():
            rows = target.head(sample.states_of(sample.mask).double()).softmax(-1)
        for anchor, logits in stepwise(network, features, padded, chunks):
            survival = greedy = 1.0
            tau, tau_greedy = 1.0, 1.0
            for slot, column in enumerate(blocks[anchor]):
                teacher = rows[int(sample.mask[:column].sum())]
                draft = torch.zeros_like(teacher)
                draft[vocabulary] = logits[slot].softmax(-1)
                overlap = float(torch.minimum(draft, teacher).sum())
                accepted[slot].append(overlap)
                survival, greedy = survival * overlap, greedy * float(draft.argmax() == teacher.argmax())
                tau, tau_greedy = tau + survival, tau_greedy + greedy
            taus.append((sample.domain, tau, tau_greedy))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "acceptance": mean(accepted[0]),
        "tau": mean([tau for _, tau, _ in taus]),
        "tau_greedy": mean([greedy for _, _, greedy in taus]),
        **{f"tau_{name}": mean([tau for domain, tau, _ in taus if domain == name]) for name, _, _ in taus},
        **{f"acceptance_{slot + 1}": mean(values) for slot, values in enumerate(accepted)},
    }


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_held_out_figures_are_those_of_decoding_block_by_block(target: CausalModel, kind: str, reduced: bool) -> None:
    distillation = _distillation(
        target,
        replace(KINDS[kind], chunk_tokens=7),
        _samples(target, validation=3),
        vocabulary=HALF if reduced else None,
    )
    expected = _figures(distillation.network, target, distillation.validation)
    assert {"tau_chat", "tau_code"} <= expected.keys()
    # Probabilities are in fp32.
    assert distillation.evaluate() == pytest.approx(expected, rel=1e-5)


def test_what_the_draft_cannot_propose_is_never_accepted(target: CausalModel) -> None:
    # A draft in the target's own states: over the whole vocabulary it is the target, over half of it the accepted share
    # is the target's mass there.
    figures = {}
    for name, vocabulary in (("whole", None), ("half", HALF)):
        distillation = _distillation(target, KINDS["dflash"], _samples(target), vocabulary=vocabulary)
        distillation._slot_states = lambda batch: batch["target_states"].double()  # type: ignore[method-assign]
        figures[name] = distillation.evaluate()
    assert figures["whole"]["acceptance"] == pytest.approx(1.0) == pytest.approx(figures["whole"]["acceptance_3"])
    assert figures["whole"]["tau"] == pytest.approx(figures["whole"]["tau_greedy"])
    masses = []
    for sample in distillation.validation:
        mass = target.head(sample.states_of(sample.mask).double()).softmax(-1)[:, HALF].sum(-1)
        masses += [float(mass[int(sample.mask[: a + 1].sum())]) for a in _blocks(sample.mask.tolist())]
    assert figures["half"]["acceptance"] == pytest.approx(sum(masses) / len(masses), rel=1e-5)
    assert figures["half"]["acceptance"] < 0.9


def test_evaluation_leaves_the_network_as_it_was(target: CausalModel) -> None:
    distillation = _distillation(target, KINDS["dspark"], _samples(target), vocabulary=HALF)
    network = distillation.network
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in network.named_parameters()}
    state = torch.random.get_rng_state()
    slot_states, made = distillation._slot_states, list[Tensor]()

    def kept(batch: dict[str, Tensor]) -> Tensor:
        made.append(slot_states(batch))
        return made[-1]

    distillation._slot_states = kept  # type: ignore[method-assign]
    assert distillation.evaluate() == distillation.evaluate()
    assert made and not any(states.requires_grad for states in made)
    assert torch.is_grad_enabled() and network.training
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in network.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1])


def test_without_validation_samples_there_is_nothing_to_report(target: CausalModel) -> None:
    samples = _samples(target, validation=0)
    assert _distillation(target, KINDS["dflash"], samples).evaluate() == {}
    # Nor with one that has no anchor.
    unusable = _sample(6, 8, [], split="validation")
    assert _distillation(target, KINDS["dflash"], [*samples, unusable]).evaluate() == {}


# Vocabularies


def test_the_vocabulary_is_the_most_frequent_tokens_of_the_training_responses(target: CausalModel) -> None:
    samples = _samples(target)
    counts = Counter[int]()
    for sample in samples:
        if sample.split == "train":
            counts.update(sample.tokens[sample.mask].tolist())
    # Ties go to the lower id, and tokens that never occur come last, so that they fill up.
    order = sorted(range(VOCAB), key=lambda token: (-counts[token], token))
    assert len(counts) < 40
    for size in (1, 5, len(counts), 40, VOCAB - 1):
        chosen = draft_vocabulary(samples, size=size, vocab_size=VOCAB)
        assert chosen is not None and chosen.dtype == torch.long
        assert chosen.tolist() == sorted(order[:size])


@pytest.mark.parametrize("size", [0, VOCAB, VOCAB + 1])
def test_the_whole_vocabulary_is_none(target: CausalModel, size: int) -> None:
    assert draft_vocabulary(_samples(target), size=size, vocab_size=VOCAB) is None


def test_covered_mass_is_the_targets_probability_on_a_vocabulary(target: CausalModel) -> None:
    samples = _samples(target)
    states = torch.cat([s.states_of(s.mask) for s in samples if s.split == "validation"])
    mass = target.head(states.double()).softmax(-1)[:, HALF].sum(-1)
    assert covered_mass(target, samples, HALF) == pytest.approx(float(mass.mean()), rel=1e-5)
    assert covered_mass(target, samples, HALF, limit=4) == pytest.approx(float(mass[:4].mean()), rel=1e-5)
    assert covered_mass(target, samples, HALF) + covered_mass(target, samples, HALF + 1) == pytest.approx(1.0)
    assert covered_mass(target, samples, None) == 1.0
    assert covered_mass(target, _samples(target, validation=0), HALF) == 1.0


# Learning


@dataclass(frozen=True)
class _OwnWords:
    """A tiny target in fp32, conversations it wrote itself, and the features it left behind."""

    target: CausalModel
    samples: list[Sample]
    features: dict[str, Tensor]


@pytest.fixture(scope="module")
def own_words() -> _OwnWords:
    few, length = 8, 28
    model = CausalModel(family_model("llama", vocab_size=few, initializer_range=0.1).model.float())
    model.model.requires_grad_(False)
    # Every token has a successor it likes: something to learn besides how frequent tokens are.
    successors = torch.arange(few).roll(1)
    model.model.get_output_embeddings().weight[successors] = model.model.get_input_embeddings().weight.mul_(3.0)
    prompts = torch.randint(few, (20, 4), generator=torch.Generator().manual_seed(0)).tolist()
    responses = generate_batch(
        model,
        prompts,
        settings=SamplingSettings(temperature=1.0),
        max_new_tokens=length - 4,
        stop_tokens=frozenset(),
        seed=0,
        keep_states=True,
        taps=TAPS,
    )
    samples, features = [], {}
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        sample = _sample(index, length, [(4, length)], split="train" if index < 16 else "validation")
        samples.append(replace(sample, tokens=torch.tensor([*prompt, *response.tokens]), states=response.states))
        assert response.features is not None
        features[sample.id] = response.features
    return _OwnWords(model, samples, features)


def _tau_without_context(own: _OwnWords) -> float:
    """What a draft has that always proposes from the mean of the target's distributions."""
    rows = {
        split: torch.cat(
            [own.target.head(s.states).softmax(-1) for s in own.samples if s.split == split and s.states is not None]
        )
        for split in ("train", "validation")
    }
    accepted = float(torch.minimum(rows["train"].mean(0), rows["validation"]).sum(-1).mean())
    return sum(accepted**slot for slot in range(BLOCK + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_training_raises_acceptance_on_held_out_conversations(own_words: _OwnWords, kind: str) -> None:
    config = replace(KINDS[kind], init="random", layers=1, sequences_per_step=4, anchors=12, row_tokens=64)
    network = make_network(config, own_words.target, None, seed=0).train()
    distillation = FeatureDistillation(
        network,
        own_words.target,
        own_words.samples,
        features_of=lambda sample: own_words.features[sample.id],
        objective=OBJECTIVES["hybrid"],
        seed=0,
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    before = distillation.evaluate()
    losses = []
    for step in range(50):
        sums = distillation.loss(distillation.batch(step, 0))
        optimizer.zero_grad()
        (sums.loss / sums.tokens).backward()
        optimizer.step()
        losses.append(float(sums.loss.detach()) / sums.tokens)
    after = distillation.evaluate()
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert after["tau"] > before["tau"] + 0.3
    assert after["tau"] > _tau_without_context(own_words) + 0.1
