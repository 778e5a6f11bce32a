"""How drafts are made: what is trained, what is frozen, and that the folder written is the draft that was trained."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from distill.drafts import DraftContext, Student, TrainedConfig, copy_tokenizer, pretrained, pruned, save_model
from distill.drafts import lookup as lookup_draft
from distill.drafts import made as made_draft
from distill.drafts import none as no_draft
from distill.drafts import quantized as quantized_draft
from distill.on_policy import OnPolicy
from inference.drafters import Drafter, LoadContext, load_drafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.layers import decoder_layers
from inference.loading import load_causal_model
from inference.model import CausalModel
from tests.pipelines.tiny import LAYERS, write_model

CPU = torch.device("cpu")
TOKENS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("checkpoint"), layers=1, seed=5)


@pytest.fixture
def context(target: Path, tmp_path: Path) -> DraftContext:
    return DraftContext(target_folder=target, folder=tmp_path / "draft", device=CPU, num_target_layers=LAYERS)


def _load(folder: Path, target: Path) -> Drafter:
    model = load_causal_model(target, precision="fp32", device=CPU)
    return load_drafter(LoadContext(folder, target, model, "fp32", CPU))


def _spec(folder: Path) -> dict[str, object]:
    spec: dict[str, object] = json.loads((folder / "draft.json").read_text(encoding="utf-8"))
    return spec


def _named(model: CausalModel, *, trainable: bool) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.model.named_parameters() if p.requires_grad == trainable)


def _train(student: Student, steps: int = 3) -> tuple[float, float]:
    """A few steps of next-token prediction on one batch; first and last loss."""
    optimizer = torch.optim.Adam([p for _, p in _named(student.model, trainable=True)], lr=0.02)
    losses = []
    for _ in range(steps):
        logits = student.model.head(student.model.states(TOKENS))[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def _logits(model: CausalModel) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.head(model.states(TOKENS)).float()
    return logits


def _close_as_bf16(got: torch.Tensor, expected: torch.Tensor) -> None:
    # Weights rounded to 8 bits: agreement is judged against the spread of the logits.
    assert float((got - expected).abs().max() / expected.std()) < 0.1


def test_drafts_without_weights_are_a_spec_alone(context: DraftContext, target: Path) -> None:
    no_draft.Config().write(context)
    assert isinstance(_load(context.folder, target), NoDrafter)
    lookup_draft.Config(longest=5, shortest=3).write(context)
    drafter = _load(context.folder, target)
    assert isinstance(drafter, LookupDrafter) and (drafter.settings.longest, drafter.settings.shortest) == (5, 3)
    assert [file.name for file in context.folder.iterdir()] == ["draft.json"]


def test_lookup_settings_are_checked_when_they_are_made() -> None:
    with pytest.raises(ValueError, match="need 1 <= shortest <= longest, got 4 and 2"):
        lookup_draft.Config(longest=2, shortest=4)


@pytest.mark.parametrize(("layers", "kept"), [(0, None), (2, [0, 2]), (3, [0, 1, 2])])
@pytest.mark.parametrize("weight_format", ["nf4", "int8"])
def test_a_quantized_draft_is_a_spec_over_the_targets_own_weights(
    context: DraftContext, target: Path, weight_format: str, layers: int, kept: list[int] | None
) -> None:
    quantized_draft.Config(format=weight_format, layers=layers).write(context)
    assert _spec(context.folder) == {"kind": "quantized", "format": weight_format, "kept_layers": kept}
    drafter = _load(context.folder, target)
    assert isinstance(drafter, ModelDrafter)
    assert len(decoder_layers(drafter.model.model)) == (len(kept) if kept else LAYERS)


def test_quantized_settings_out_of_range_are_refused(context: DraftContext) -> None:
    with pytest.raises(ValueError, match=r"draft.format is 'nf3'; choose nf4 or int8"):
        quantized_draft.Config(format="nf3")
    with pytest.raises(ValueError, match=r"draft.layers is -1; use 0 for all layers"):
        quantized_draft.Config(layers=-1)
    with pytest.raises(InputError, match=f"cannot keep 9 of {LAYERS} layers .*: keep fewer"):
        quantized_draft.Config(layers=9).write(context)
    assert not context.folder.exists()


def test_a_pruned_student_is_the_target_with_some_layers_and_a_frozen_vocabulary(
    context: DraftContext, target: Path
) -> None:
    student = pruned.Config(layers=2).student(context)
    whole = load_causal_model(target, precision="fp32", device=CPU)
    kept, source = decoder_layers(student.model.model), decoder_layers(whole.model)
    assert len(kept) == 2
    for mine, theirs in zip(kept, (source[0], source[2]), strict=True):
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, other) and one.requires_grad
    assert {name for name, _ in _named(student.model, trainable=False)} == {"model.embed_tokens.weight"}


def test_a_trained_pruned_student_is_what_its_folder_loads(context: DraftContext, target: Path) -> None:
    student = pruned.Config(layers=2).student(context)
    before = student.model.model.get_input_embeddings().weight.detach().clone()
    first, last = _train(student, steps=5)
    assert last < first
    assert torch.equal(student.model.model.get_input_embeddings().weight, before)
    student.save(context.folder)
    drafter = _load(context.folder, target)
    assert isinstance(drafter, ModelDrafter) and drafter.kind == "model"
    assert drafter.model.model.config.num_hidden_layers == 2
    _close_as_bf16(_logits(drafter.model), _logits(student.model))


def test_pruned_settings_out_of_range_are_refused(context: DraftContext) -> None:
    with pytest.raises(ValueError, match=r"draft.layers is 0; keep at least 1 layer"):
        pruned.Config(layers=0)
    with pytest.raises(ValueError, match=r"draft.max_tokens is 0; use at least 1"):
        pruned.Config(max_tokens=0)
    with pytest.raises(InputError, match=f"cannot keep 4 of {LAYERS} layers .*: keep fewer"):
        pruned.Config(layers=4).student(context)


@pytest.mark.parametrize("field", ["sequences_per_step", "max_tokens", "chunk_tokens", "on_policy_tokens"])
def test_every_trained_kind_checks_its_batch(field: str) -> None:
    for kind in (TrainedConfig, pruned.Config, pretrained.Config):
        with pytest.raises(ValueError, match=f"draft.{field} is 0; use at least 1"):
            kind(**{field: 0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bucket_batches": -1}, "draft.bucket_batches is -1; use 0 to sort nothing"),
        ({"on_policy_share": 1.5}, "draft.on_policy_share is 1.5; use a share between 0 and 1"),
        ({"on_policy_temperature": -0.1}, "draft.on_policy_temperature is -0.1; use 0 or more"),
        ({"on_policy_temperature": math.inf}, "draft.on_policy_temperature is inf; use 0 or more"),
        ({"keep_share": 0.0, "reference": "pruned"}, "draft.keep_share is 0.0; use a share above 0"),
        ({"keep_share": math.nan}, "draft.keep_share is nan; use a share above 0"),
        ({"keep_share": 0.4}, "draft.keep_share is 0.4 without a draft.reference; name a trained draft"),
    ],
)
def test_every_trained_kind_checks_what_it_learns_from(settings: dict[str, Any], message: str) -> None:
    for kind in (TrainedConfig, pruned.Config, pretrained.Config):
        with pytest.raises(ValueError, match=message):
            kind(**settings)


def test_a_student_writes_itself_only_where_it_is_asked_to() -> None:
    assert TrainedConfig().on_policy(frozenset({1})) is None
    made = TrainedConfig(on_policy_share=0.25, on_policy_tokens=9, on_policy_temperature=0.7).on_policy(frozenset({1}))
    assert made == OnPolicy(share=0.25, max_new_tokens=9, temperature=0.7, stop_tokens=frozenset({1}))


def test_what_a_step_costs_counts_the_passes_beside_the_students() -> None:
    def work(**settings: Any) -> tuple[float, float]:
        return pruned.Config(layers=2, on_policy_tokens=30, **settings).step_work(
            prompt_tokens=60, response_tokens=40, num_target_layers=12, vocab_size=100
        )

    assert work() == (2 * 100, 40)
    # A third more for a reference of as many layers; the head for all tokens, and once more for those kept.
    assert work(keep_share=0.25, reference="x") == pytest.approx((2 * 100 * 4 / 3, 40 * 1.25))
    # Prompt and 30 tokens through the student, these decoded at 5/3 each, and all through the target, at a third.
    own = (2 * 90 + 2 * 30 * 5 / 3 + 12 * 90 / 3, 30 * 8 / 3)
    assert work(on_policy_share=1.0) == pytest.approx(own)
    assert work(on_policy_share=0.5) == pytest.approx(((200 + own[0]) / 2, (40 + own[1]) / 2))


def test_a_saved_student_is_a_whole_folder_in_bf16(
    context: DraftContext, target: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pruned.Config(layers=1).student(context).save(context.folder)
    names = {file.name for file in context.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "draft.json"} <= names
    assert "chat_template.jinja" in names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
    assert _spec(context.folder) == {"kind": "model"}
    config = json.loads((context.folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    with safe_open(context.folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        assert {str(file.get_tensor(key).dtype) for key in keys} == {"torch.bfloat16"}
    # Tied to the embedding, the head is not written a second time.
    assert "lm_head.weight" not in keys and "model.embed_tokens.weight" in keys
    # No progress bar.
    assert "".join(capfd.readouterr()) == ""


def test_the_tokenizer_is_copied_file_by_file(target: Path, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "copy"
    for made in (source, folder):
        made.mkdir()
    for name in ("tokenizer.json", "merges.txt", "vocab.json", "spiece.model", "model.safetensors", "README.md"):
        (source / name).write_text(name, encoding="utf-8")
    copy_tokenizer(source, folder)
    copied = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    assert copied == {name: name for name in ("tokenizer.json", "merges.txt", "vocab.json", "spiece.model")}


def test_a_full_pretrained_student_moves_every_weight(context: DraftContext, checkpoint: Path, target: Path) -> None:
    student = pretrained.Config(path=str(checkpoint)).student(context)
    assert not list(_named(student.model, trainable=False))
    first, last = _train(student, steps=5)
    assert last < first
    student.save(context.folder)
    drafter = _load(context.folder, target)
    assert isinstance(drafter, ModelDrafter)
    _close_as_bf16(_logits(drafter.model), _logits(student.model))
    # The checkpoint itself is not touched.
    untouched = load_causal_model(checkpoint, precision="fp32", device=CPU)
    assert float((_logits(untouched) - _logits(student.model)).abs().max()) > 0.1


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[CausalModel]:
    """The models that were saved, before their weights were rounded to bf16."""
    saved: list[CausalModel] = []

    def save(model: CausalModel, folder: Path, *, tokenizer_from: Path) -> None:
        saved.append(model)
        save_model(model, folder, tokenizer_from=tokenizer_from)

    monkeypatch.setattr(pretrained, "save_model", save)
    return saved


def test_lora_trains_adapters_alone_and_saves_them_merged(
    context: DraftContext, checkpoint: Path, target: Path, merged: list[CausalModel]
) -> None:
    student = pretrained.Config(path=str(checkpoint), adapter="lora", rank=4, alpha=8).student(context)
    start = _logits(student.model)
    names = [name for name, _ in _named(student.model, trainable=True)]
    assert names and all("lora_" in name for name in names)
    frozen = {name: p.detach().clone() for name, p in _named(student.model, trainable=False)}
    first, last = _train(student, steps=5)
    assert last < first
    assert all(torch.equal(frozen[name], p) for name, p in _named(student.model, trainable=False))
    adapted = _logits(student.model)
    assert float((adapted - start).abs().max()) > 0.1
    student.save(context.folder)
    torch.testing.assert_close(_logits(merged[0]), adapted, rtol=0.0, atol=1e-4)
    drafter = _load(context.folder, target)
    assert isinstance(drafter, ModelDrafter)
    _close_as_bf16(_logits(drafter.model), adapted)
    # What is published is a plain model: no trace of adapters.
    assert not [file.name for file in context.folder.rglob("*adapter*")]
    with safe_open(context.folder / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "lora" in key or "base_layer" in key]


def test_qlora_trains_on_nf4_and_merges_into_the_full_precision_checkpoint(
    context: DraftContext, checkpoint: Path, target: Path, merged: list[CausalModel]
) -> None:
    student = pretrained.Config(path=str(checkpoint), adapter="qlora", rank=4, alpha=8).student(context)
    assert [m for m in student.model.model.modules() if type(m).__name__ == "Linear4bit"]
    first, last = _train(student, steps=5)
    assert last < first
    adapters = dict(_named(student.model, trainable=True))
    assert adapters and all("lora_" in name for name in adapters)
    # Merged by hand: weight + alpha / rank * B A, for one layer.
    stem = "model.layers.0.mlp.up_proj"
    a, b = (next(p for n, p in adapters.items() if n.startswith(f"{stem}.lora_{s}")) for s in "AB")
    base = load_causal_model(checkpoint, precision="fp32", device=CPU)
    expected = base.model.get_parameter(f"{stem}.weight") + 8 / 4 * b @ a
    student.save(context.folder)
    torch.testing.assert_close(merged[0].model.get_parameter(f"{stem}.weight"), expected, rtol=0.0, atol=1e-6)
    # NF4 rounds the checkpoint, so merged and adapted logits are near, not equal.
    both = torch.stack([_logits(merged[0]).flatten(), _logits(student.model).flatten()])
    assert 0.9 < float(both.corrcoef()[0, 1]) < 1.0
    assert isinstance(_load(context.folder, target), ModelDrafter)


def test_a_draft_saved_twice_is_the_same(context: DraftContext, checkpoint: Path, tmp_path: Path) -> None:
    student = pretrained.Config(path=str(checkpoint), adapter="lora").student(context)
    student.save(tmp_path / "one")
    student.save(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter": "magic"}, "draft.adapter is 'magic'; choose one of none, lora, qlora"),
        ({"rank": 0}, "draft.rank is 0; use at least 1"),
    ],
)
def test_pretrained_settings_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained.Config(**values)  # type: ignore[arg-type]


def test_a_pretrained_student_needs_a_checkpoint(context: DraftContext, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs a checkpoint \[draft.pretrained.path\]: set it to a model folder"):
        pretrained.Config().student(context)
    with pytest.raises(InputError, match="no such model folder"):
        pretrained.Config(path=str(tmp_path / "nowhere"), adapter="lora").student(context)


@pytest.mark.parametrize("make", [lambda path: pruned.Config(layers=2), lambda path: pretrained.Config(path=str(path))])
def test_layers_of_a_student_are_known_for_the_time_plan(
    checkpoint: Path, make: Callable[[Path], pruned.Config | pretrained.Config]
) -> None:
    assert 1 <= make(checkpoint).num_layers(12) <= 12


def test_a_draft_made_before_is_taken_as_it_is(context: DraftContext, tmp_path: Path, target: Path) -> None:
    lookup_draft.Config().write(DraftContext(target, tmp_path / "pair" / "draft", CPU, LAYERS))
    for path in (tmp_path / "pair", tmp_path / "pair" / "draft"):
        made_draft.Config(path=str(path)).write(context)
        assert _spec(context.folder) == _spec(tmp_path / "pair" / "draft")
        assert isinstance(_load(context.folder, target), LookupDrafter)


def test_a_made_draft_needs_a_draft(context: DraftContext, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"which draft\? \[draft.made.path\]: set it to a folder with draft.json"):
        made_draft.Config().write(context)
    with pytest.raises(InputError, match="no draft here"):
        made_draft.Config(path=str(tmp_path / "nowhere")).write(context)
    assert not context.folder.exists()


def test_a_merge_that_changes_what_the_model_says_is_refused(tmp_path: Path) -> None:
    before = torch.linspace(-20.0, 20.0, 64).view(4, 16)
    pretrained._check_merged(before, before + 1e-4, where=tmp_path)
    with pytest.raises(InputError, match=r"merged adapters give other logits, off by 0\.1 of 20"):
        pretrained._check_merged(before, before + 0.1, where=tmp_path)
    with pytest.raises(InputError, match="off by nan"):
        pretrained._check_merged(before, before * float("nan"), where=tmp_path)
