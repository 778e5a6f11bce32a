"""How each kind of draft is made: one module per kind, each with a `Config`.

A kind that needs no training writes its folder at once (`write`). A kind that is trained hands out a `Student`, whose
model some training loop moves and which then saves itself. The folder either way is what `inference.drafters` loads.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from inference.drafters import DRAFT_FILE
from inference.loading import quiet_transformers
from inference.model import CausalModel

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_TOKENIZER_GLOBS = ("*.model", "vocab.*", "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class DraftContext:
    """What making a draft may need.

    Attributes:
        target_folder: the target's files.
        folder: where the draft is written.
        device: where a student is trained.
        num_target_layers: decoder layers of the target.
        other: folder of the draft that this one contains (`of` in its settings); None for all that contain none.
    """

    target_folder: Path
    folder: Path
    device: torch.device
    num_target_layers: int
    other: Path | None = None


@dataclass(frozen=True)
class Student:
    """A draft model in training.

    Attributes:
        model: its trainable parameters require a gradient, the others do not.
        save: writes the trained weights, configuration and `draft.json` into a folder.
    """

    model: CausalModel
    save: Callable[[Path], None]


@dataclass(kw_only=True)
class TrainedConfig:
    """What every trained kind has besides its own settings.

    Attributes:
        sequences_per_step: conversations in one micro-batch.
        max_tokens: longer conversations are cut, in tokens.
        chunk_tokens: positions whose vocabulary-wide rows exist at one time.
    """

    sequences_per_step: int = 4
    max_tokens: int = 512
    chunk_tokens: int = 128

    trained = True
    lr = 0.0
    """Peak learning rate in place of the optimizer's own; 0 keeps that."""
    training_weight = 1.0
    """Part of the time for training, by that of the other trained drafts."""
    training_overhead = 1.8
    """Time of a step over that of its products: attention, losses, evaluation. From runs on two CPUs."""

    def num_layers(self, num_target_layers: int) -> int:
        """Decoder layers of the student, for the time plan."""
        raise NotImplementedError

    def step_work(
        self, *, prompt_tokens: float, response_tokens: float, num_target_layers: int, vocab_size: int
    ) -> tuple[float, float]:
        """What one conversation costs in a step, for the time plan.

        Args:
            prompt_tokens: of a typical conversation.
            response_tokens: likewise.
            num_target_layers: decoder layers of the target.
            vocab_size: tokens of the target.

        Returns:
            token-layers, and positions that go through a head of the target's size.
        """
        tokens = min(self.max_tokens, prompt_tokens + response_tokens)
        return self.num_layers(num_target_layers) * tokens, response_tokens

    def __post_init__(self) -> None:
        for name in ("sequences_per_step", "max_tokens", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"draft.{name} is {getattr(self, name)}; use at least 1")


def write_spec(folder: Path, spec: dict[str, object]) -> None:
    """Write `draft.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DRAFT_FILE).write_text(json.dumps(spec, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the target's tokenizer files, so that the draft is a whole Hugging Face folder."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for glob in _TOKENIZER_GLOBS:
        for file in source.glob(glob):
            shutil.copyfile(file, folder / file.name)


def save_model(model: CausalModel, folder: Path, *, tokenizer_from: Path) -> None:
    """Save a student's weights as bf16 safetensors with its configuration, tokenizer and `draft.json`."""
    # Tied weights are one tensor and stay one, or the file would hold the embedding twice.
    halved: dict[int, torch.Tensor] = {}
    state = {
        name: halved.setdefault(tensor.data_ptr(), tensor.detach().to(torch.bfloat16))
        for name, tensor in model.model.state_dict().items()
    }
    with quiet_transformers():
        model.model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    # save_pretrained writes the dtype of the model in memory, which is not that of the file.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "dtype": "bfloat16"}, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    copy_tokenizer(tokenizer_from, folder)
    write_spec(folder, {"kind": "model"})
