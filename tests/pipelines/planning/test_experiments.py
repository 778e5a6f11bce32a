"""The settings of the DSpark paper, planned for every target named there: their real sizes, without their files."""

import math

import pytest
import torch
from hydra import compose, initialize_config_module

from distill.objectives import _divergences
from inference.taps import default_taps
from pipelines import config
from pipelines.planning.figures import Planning
from pipelines.planning.report import as_data
from pipelines.planning.stage import make_planning, run_planning

# Published totals: https://huggingface.co/Qwen/Qwen3-4B and its like, 11.95e9 for Gemma 4 12B with its embedders.
PARAMETERS = {
    "dspark_qwen3_4b": 4.02e9,
    "dspark_qwen3_8b": 8.19e9,
    "dspark_qwen3_14b": 14.77e9,
    "dspark_gemma4_12b": 11.95e9,
}


def run_config(name: str, *words: str) -> config.RunConfig:
    config.register()
    with initialize_config_module("conf", version_base="1.3"):
        return config.typed(compose("config", overrides=[f"experiment={name}", *words]))


def planned(name: str, *words: str) -> Planning:
    return make_planning(run_config(name, *words))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_target_has_its_published_size_and_fits_a_node_of_eight(name: str) -> None:
    plan = planned(name)
    assert math.isclose(plan.target_parameters, PARAMETERS[name], rel_tol=0.01)
    draft = plan.drafts["dspark"]
    assert draft.trained == draft.parameters, "embedding and head are the target's"
    assert draft.steps == 25391 and draft.conversations == 512
    assert plan.misfits == []
    assert set(draft.memory) == {0, 1, 2, 3}
    sums = [sum(parts.values()) for parts in draft.memory.values()]
    assert sums == sorted(sums, reverse=True) and 0 < sums[3] < plan.memory
    assert draft.loading < plan.target_parameters * 2, "a draft that starts anew reads the target's ends alone"
    whole = planned(name, "draft.dspark.init=target").drafts["dspark"].loading
    assert plan.target_parameters * 4 < whole < plan.memory, "one that starts from it loads all of it in fp32"
    assert 0 < draft.memory[2]["target"] < plan.target_parameters * 2, "and then keeps its embedding and head"
    assert 0 < sum(plan.disk_parts.values()) < plan.disk
    assert plan.corpus.to_write == 975_000_000 and plan.hours > 1


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_recipe_is_the_papers(name: str) -> None:
    cfg = run_config(name)
    draft = cfg.draft["dspark"]
    assert (draft.layers, draft.block, draft.markov_rank, draft.vocabulary) == (5, 7, 256, 0)
    assert (draft.anchors, draft.max_tokens, draft.position_decay) == (512, 4096, 4.0)
    assert draft.sequences_per_step * cfg.trainer.accumulation == 512
    assert (cfg.optimizer.kind, cfg.optimizer.lr, draft.lr) == ("adamw", 6e-4, 0.0)
    trainer = cfg.trainer
    assert (trainer.precision, trainer.schedule, trainer.warmup_share) == ("bf16", "cosine", 0.04)
    assert len(draft.taps or default_taps(36)) == 5 and list(cfg.corpus.taps) == list(draft.taps)


def test_the_loss_is_the_papers_divided_by_1_9() -> None:
    cfg = run_config("dspark_recipe")
    draft, target = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(5)
    ours = cfg.objective.build()(draft, target, labels)
    distance = (draft.softmax(-1) - target.softmax(-1)).abs().sum(-1)
    paper = 0.1 * torch.nn.functional.cross_entropy(draft, labels, reduction="none") + 0.9 * distance
    assert torch.allclose(1.9 * ours, paper, rtol=1e-6)
    assert math.isclose(1.9 * cfg.draft["dspark"].confidence_weight, 1.0, rel_tol=1e-6)
    assert math.isclose(1.9 * cfg.trainer.clip_norm, 1.0, rel_tol=1e-6)
    tv = _divergences.total_variation(draft.log_softmax(-1), target.log_softmax(-1))
    assert torch.allclose(2 * tv, distance), "L1 is twice the total variation"


def test_the_cache_of_the_reference_for_the_smallest_has_38_terabytes() -> None:
    assert math.isclose(planned("dspark_qwen3_4b").corpus.reference_cache, 38e12, rel_tol=0.02)


def test_what_does_not_fit_is_said_with_its_largest_part_and_what_helps(caplog: pytest.LogCaptureFixture) -> None:
    words = ("plan.memory_gib=40", "plan.disk_gib=1000", "trainer.accumulation=100")
    [loading, *_] = planned("dspark_qwen3_14b", "draft.dspark.init=target", *words).misfits
    assert loading.endswith(" of 40.0 GiB of device memory to load the target: use devices with more, or a smaller one")
    words = ("plan.memory_gib=20", *words[1:])
    memory, disk, micros = planned("dspark_qwen3_4b", *words).misfits
    assert " of 20.0 GiB of device memory, most of it activations (" in memory
    assert "lower draft.dspark.sequences_per_step (with trainer.accumulation raised)" in memory
    assert "of 1,000.0 GiB, most of it features" in disk and "corpus.compress_features=true halves them" in disk
    assert micros.endswith("use a multiple of 8 for trainer.accumulation")
    assert run_planning(run_config("dspark_qwen3_4b", *words)) == 0.0
    assert [record.message for record in caplog.records if record.message.startswith("does not fit: ")]


def test_a_higher_stage_is_named_where_it_is_enough() -> None:
    fits = {stage: sum(parts.values()) for stage, parts in planned("dspark_qwen3_8b").drafts["dspark"].memory.items()}
    between = (fits[0] + fits[1]) / 2 / 2**30
    [line] = planned("dspark_qwen3_8b", "plan.zero_stage=0", f"plan.memory_gib={between}").misfits
    assert line.endswith(f"zero_stage=1 needs {fits[1] / 2**30:,.1f} GiB")


def test_all_figures_are_plain_data_with_sums() -> None:
    data = as_data(planned("dspark_qwen3_4b"))
    assert set(data["drafts"]["dspark"]["memory"]) == {"0", "1", "2", "3"}
    assert data["hours"] == data["corpus"]["hours"] + data["drafts"]["dspark"]["hours"]
    assert data["drafts"]["dspark"]["step_flops"] > 1e15
