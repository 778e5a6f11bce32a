"""A step without numbers against the same step with them: operations, bytes held, and what a batch holds."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from distill.conversation import Sample
from distill.distillation import Distillation
from distill.drafts import pruned
from distill.feature_distillation import FeatureDistillation
from distill.objectives import forward_kl, lk, mix
from inference.attention import use_grouped_attention
from inference.feature_drafts import FeatureDraftConfig, dflash, dspark, eagle3, medusa
from inference.feature_networks import make_network
from inference.layers import keep_layers
from inference.model import CausalModel
from pipelines.planning.passes import Conversation, Meter, forward_flops, step_cost
from pipelines.planning.shapes import Sketch, Student, sketch_draft, sketch_target

PROMPT, RESPONSE = 20, 30
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = {"anchors": 12, "sequences_per_step": 3, "row_tokens": 110, "chunk_tokens": 64}
KINDS: dict[str, FeatureDraftConfig] = {
    "dspark": dspark.Config(**SMALL, vocabulary=0, markov_rank=8, prompt_share=0.25),
    "dflash": dflash.Config(**SMALL, vocabulary=128),
    "eagle3": eagle3.Config(**SMALL, vocabulary=128),
    "medusa": medusa.Config(**SMALL, vocabulary=0),
}


@pytest.fixture(scope="module")
def target() -> CausalModel:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).requires_grad_(False)
    use_grouped_attention(model)
    return CausalModel(model)


@pytest.fixture(scope="module")
def sketch() -> Sketch:
    return sketch_target(LlamaConfig(**SHAPE))


def samples(count: int) -> list[Sample]:
    length = PROMPT + RESPONSE
    return [
        Sample(
            id=str(index),
            domain="chat",
            source="made",
            split="train",
            tokens=torch.arange(length) % 512,
            mask=torch.arange(length) >= PROMPT,
            states=torch.randn(length - 1, 64).bfloat16(),
            text="",
        )
        for index in range(count)
    ]


def measured(task: Any, module: nn.Module, target: CausalModel) -> tuple[Meter, dict[str, torch.Tensor]]:
    """A real step: gradients there, then metered."""
    batch = task.batch(0, 0)
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    there = [*module.parameters(), *module.buffers(), *target.model.parameters(), *target.model.buffers()]
    meter = Meter([*there, *[p.grad for p in trained if p.grad is not None], *batch.values()])
    with meter:
        loss = task.loss(batch).loss
        loss.backward()
    return meter, batch


@pytest.mark.parametrize("name", KINDS)
def test_a_feature_draft_costs_without_numbers_what_it_costs_with_them(
    name: str, target: CausalModel, sketch: Sketch
) -> None:
    draft, objective = KINDS[name], lk.Config(mode="hybrid").build()
    vocabulary = torch.arange(draft.vocabulary) if draft.vocabulary else None
    network = make_network(draft, target, vocabulary, seed=0)
    features = torch.randn(PROMPT + RESPONSE, len(network.taps) * 64).bfloat16()
    task = FeatureDistillation(
        network, target, samples(3), features_of=lambda sample: features, objective=objective, seed=0
    )
    meter, batch = measured(task, network, target)
    student = sketch_draft(name, draft, sketch, dtype=torch.float32)
    cost = step_cost(
        student,
        draft,
        sketch,
        conversation=Conversation(PROMPT, RESPONSE),
        objective=objective,
        arithmetic="fp32",
        device="cpu",
    )
    assert [p.shape for p in student.trained] == [p.shape for p in network.parameters() if p.requires_grad]
    # What the mean number of supervised slots and the real one differ by: a few blocks at the end of a response.
    assert math.isclose(cost.supervised, batch["labels"].shape[0], rel_tol=0.1)
    assert math.isclose(cost.flops, meter.flops, rel_tol=0.1)
    assert math.isclose(cost.held, meter.peak, rel_tol=0.15)
    assert math.isclose(cost.batch, sum(tensor.nbytes for tensor in batch.values()), rel_tol=0.1)


def test_a_student_costs_without_numbers_what_it_costs_with_them(target: CausalModel, sketch: Sketch) -> None:
    objective = forward_kl.Config().build()
    draft = pruned.Config(layers=2, sequences_per_step=3, chunk_tokens=32)
    model = keep_layers(LlamaForCausalLM(LlamaConfig(**SHAPE)), [0, 3])
    use_grouped_attention(model)
    model.get_input_embeddings().requires_grad_(False)
    task = Distillation(
        CausalModel(model),
        target,
        samples(3),
        objective=objective,
        sequences_per_step=3,
        max_tokens=512,
        chunk_tokens=32,
        seed=0,
    )
    meter, batch = measured(task, model, target)
    student: Student = sketch_draft("pruned", draft, sketch, dtype=torch.float32)
    cost = step_cost(
        student,
        draft,
        sketch,
        conversation=Conversation(PROMPT, RESPONSE),
        objective=objective,
        arithmetic="fp32",
        device="cpu",
    )
    assert cost.supervised == batch["labels"].shape[0] == 3 * RESPONSE
    assert math.isclose(cost.flops, meter.flops, rel_tol=0.01)
    assert math.isclose(cost.held, meter.peak, rel_tol=0.1)
    assert cost.batch == sum(tensor.nbytes for tensor in batch.values())


def test_the_meter_counts_products_and_what_is_held() -> None:
    weight = torch.zeros(8, 4, requires_grad=True)
    given = torch.zeros(16, 4)
    meter = Meter([weight, given])
    with meter:
        product = given @ weight.T
        doubled = product * 2.0
        del product
        assert doubled.shape == (16, 8)
    # 2 * 16 * 4 * 8 operations; two results of 16 * 8 fp32 numbers, one of them let go after the other was made.
    assert meter.flops == 1024
    assert meter.peak == 2 * 16 * 8 * 4


def test_long_conversations_are_cut_at_their_end() -> None:
    assert Conversation.of(100, 500, longest=300) == Conversation(100, 200)
    assert Conversation.of(400, 500, longest=300) == Conversation(299, 1)
    assert Conversation.of(100.4, 60.6, longest=300) == Conversation(100, 61)


def test_half_the_numbers_take_less_room(sketch: Sketch) -> None:
    draft = KINDS["dspark"]
    held = {}
    for dtype, arithmetic in ((torch.float32, "fp32"), (torch.float32, "bf16"), (torch.bfloat16, "bf16")):
        cost = step_cost(
            sketch_draft("dspark", draft, sketch, dtype=dtype),
            draft,
            sketch,
            conversation=Conversation(PROMPT, RESPONSE),
            objective=mix.Config().build(),
            arithmetic=arithmetic,
            device="cpu",
        )
        held[dtype, arithmetic] = cost.held
    full, cast, halved = held.values()
    assert halved < cast and halved < full


def test_a_target_reads_in_two_operations_a_weight_and_token(sketch: Sketch) -> None:
    tokens = 16
    weights = sum(p.numel() for p in sketch.model.model.parameters() if p.dim() == 2)  # the head is the embedding
    attention = 4 * tokens * tokens * 64 * 4  # 4 layers, two products of 16 x 16 x 64, 2 operations each
    assert math.isclose(forward_flops(sketch, tokens), 2 * weights * tokens + attention, rel_tol=0.01)
