"""A corpus on the device as a whole: batches of places learn the same as packed ones, and have few shapes."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.conversation import Sample
from distill.distillation import LossSums
from distill.feature_distillation import FeatureDistillation
from distill.features import capture_features
from distill.resident import resident_bytes
from inference.feature_networks import make_network
from inference.model import CausalModel
from tests.distill.test_feature_distillation import (
    HALF,
    KINDS,
    OBJECTIVES,
    _gradients,
    _network,
    _prompted,
    _samples,
)
from tests.distill.test_feature_distillation import target as target
from tests.inference.families import family_model
from tests.inference.test_feature_drafts import TAPS
from train.config import TrainerConfig
from train.loop import LossOutput, fit
from train.optimizers import adamw
from train.trackers.none import NoTracker

EVERY: dict[str, Any] = {"sequences_per_step": 3, "anchors": 4, "position_decay": 2.0}


def _pair(
    target: CausalModel,
    samples: list[Sample],
    kind: str,
    *,
    vocabulary: Tensor | None = None,
    objective: str = "hybrid",
    **changes: Any,
) -> tuple[FeatureDistillation, FeatureDistillation]:
    """Two trainings of one network each from the same start: packed rows, and a resident corpus."""
    config = replace(KINDS[kind], **{**EVERY, **changes})
    made = [
        FeatureDistillation(
            _network(config, target, vocabulary),
            target,
            samples,
            features_of=partial(capture_features, target, taps=TAPS),
            objective=OBJECTIVES[objective],
            seed=3,
        )
        for _ in range(2)
    ]
    made[1].keep_resident()
    return made[0], made[1]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("small", [False, True])
def test_places_learn_what_packed_rows_do(target: CausalModel, kind: str, small: bool) -> None:
    packed, resident = _pair(target, _samples(target), kind, vocabulary=HALF if small else None, prompt_share=0.25)
    assert resident.fixed_shapes and not packed.fixed_shapes
    for step in range(4):
        batches = packed.batch(step, 0), resident.batch(step, 0)
        sums = packed.loss(batches[0]), resident.loss(batches[1])
        for name in ("loss", "tokens", "acceptance"):
            one, other = (float(getattr(found, name).detach()) for found in sums)
            assert other == pytest.approx(one, rel=1e-6), name
        assert int(sums[0].supervised) == int(sums[1].supervised) > 0
        assert int(sums[0].fed) == int(sums[1].fed)
        assert resident.weight(batches[1]) == pytest.approx(packed.weight(batches[0]), rel=1e-6)
        grads = [_gradients(t.network, found.loss) for t, found in zip((packed, resident), sums, strict=True)]
        assert grads[0].keys() == grads[1].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_states_of_responses_alone_and_conversations_cut_short(target: CausalModel) -> None:
    samples = [replace(s, states=s.states_of(s.mask)) for s in _samples(target)]
    packed, resident = _pair(target, samples, "eagle3", max_tokens=22, prompt_share=0.5)
    for step in range(4):
        sums = packed.loss(packed.batch(step, 0)), resident.loss(resident.batch(step, 0))
        assert float(sums[1].loss.detach()) == pytest.approx(float(sums[0].loss.detach()), rel=1e-6)
        assert int(sums[1].supervised) == int(sums[0].supervised)


def test_slots_labels_and_states_are_those_of_their_places(target: CausalModel) -> None:
    """States and features bear the same numbers, so whatever is gathered can be told from them."""
    distillation = _prompted(target, sequences_per_step=5, anchors=6, prompt_share=0.5)
    distillation.keep_resident()
    for step in range(3):
        batch = distillation._on_device(distillation.batch(step, 0))
        block = batch["slots"].shape[-1]
        for row in range(batch["tokens"].shape[0]):
            length = int((batch["segments"][row] >= 0).sum())
            mine = distillation.train[int(batch["features"][row, 0, 0]) // 100]
            assert torch.equal(batch["tokens"][row, :length], mine.tokens)
            assert batch["positions"][row, :length].tolist() == list(range(length))
        valid = batch["valid"].reshape(batch["slots"].shape)
        assert torch.equal(valid, batch["slots"])
        for row, place, slot in batch["slots"].nonzero().tolist():
            number = (row * batch["slots"].shape[1] + place) * block + slot
            column = int(batch["anchors"][row, place]) + 1 + slot
            assert batch["labels"][number] == batch["tokens"][row, column]
            assert batch["places"][number] == slot
            assert batch["target_states"][number, 0] == batch["features"][row, column, 0]


def test_shapes_are_fixed_by_the_settings_and_by_few_widths(target: CausalModel) -> None:
    _, resident = _pair(target, _samples(target), "dspark")
    shapes = {tuple((n, tuple(t.shape)) for n, t in sorted(resident.batch(step, 0).items())) for step in range(12)}
    assert len(shapes) == 1
    assert resident.batch(0, 0)["columns"].shape == (64,)


def test_held_out_figures_do_not_depend_on_the_corpus_being_resident(target: CausalModel) -> None:
    packed, resident = _pair(target, _samples(target), "eagle3")
    assert packed.evaluate() == resident.evaluate() != {}


def test_bytes_are_foretold(target: CausalModel) -> None:
    _, resident = _pair(target, _samples(target), "eagle3", max_tokens=22)
    tokens = sum(min(s.num_tokens, 22) for s in resident.train)
    assert resident_bytes(resident.train, max_tokens=22, hidden=32, num_taps=2) == tokens * (3 * 64 + 10)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_train_a_draft_as_kernels_do(tmp_path: Path, kind: str, precision: str) -> None:
    """Eight steps of two micro-batches from one start, on a GPU: the same losses by graphs and kernel by kernel."""
    made = family_model("llama").model.to("cuda", torch.float32).requires_grad_(False)
    target = CausalModel(made, precision="fp32")
    samples = _samples(target)
    losses = {}
    for captured in ("off", "on"):
        network = make_network(replace(KINDS[kind], **EVERY), target, HALF.to("cuda"), seed=0).train()
        task = FeatureDistillation(
            network,
            target,
            samples,
            features_of=partial(capture_features, target, taps=network.taps),
            objective=OBJECTIVES["hybrid"],
            seed=3,
        )
        task.keep_resident()
        result = fit(
            network,
            batches=partial(task.batch, accumulation=2),
            loss=lambda batch, task=task: _output(task.loss(batch)),  # type: ignore[misc]
            optimizer=adamw.Config(lr=1e-3),
            cfg=TrainerConfig(steps=8, accumulation=2, captured=captured, precision=precision, log_every_steps=1),
            folder=tmp_path / captured,
            tracker=NoTracker(),
            evaluate=task.evaluate,
            ahead=True,
            fixed_shapes=True,
        )
        losses[captured] = [line["loss"] for line in result.history if "loss" in line]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4 if precision == "fp32" else 2e-2)
    assert losses["on"][-1] < losses["on"][0]


def _output(sums: LossSums) -> LossOutput:
    return LossOutput(sums.loss, sums.tokens, {"acceptance": (sums.acceptance, sums.tokens)}, fed=sums.fed)
