"""How each kind of draft is made: one module per kind, each with a `Config`.

A kind that needs no training writes its folder at once (`write`). A kind that is trained hands out a `Student`, whose
model some training loop moves and which then saves itself. The folder either way is what `inference.drafters` loads.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inference.pair_files import DRAFT_FILE

if TYPE_CHECKING:
    import torch

    from distill.on_policy import OnPolicy
    from inference.model import CausalModel

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_FORWARD = 1.0 / 3.0
"""Work of a pass alone over that of training: one product of three."""
_DECODED = 5.0 / 3.0
"""Work of a token written by the student over that of one trained: weights are read for few rows. From a run of four
conversations on one CPU core."""
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
    device: "torch.device"
    num_target_layers: int
    other: Path | None = None


@dataclass(frozen=True)
class Student:
    """A draft model in training.

    Attributes:
        model: its trainable parameters require a gradient, the others do not.
        save: writes the trained weights, configuration and `draft.json` into a folder.
    """

    model: "CausalModel"
    save: Callable[[Path], None]


@dataclass(kw_only=True)
class TrainedConfig:
    """What every trained kind has besides its own settings.

    Attributes:
        sequences_per_step: conversations in one micro-batch.
        max_tokens: longer conversations are cut, in tokens.
        chunk_tokens: positions whose vocabulary-wide rows exist at one time.
        bucket_batches: micro-batches sorted by length together, so that less of each is padding; 0 for none.
        on_policy_share: of the micro-batches, how many the student writes itself and the target scores; 0 to 1.
        on_policy_tokens: longest of its answers, in tokens.
        on_policy_temperature: at which it writes them; 0 is greedy.
        keep_share: share of a micro-batch's supervised tokens that is learned from: those where the student lags
            furthest behind the reference; 1 for all, whatever the reference.
        reference: a trained draft of the same target: a draft folder, or the name of a draft in the list of drafts.
    """

    sequences_per_step: int = 4
    max_tokens: int = 512
    chunk_tokens: int = 128
    bucket_batches: int = 16
    on_policy_share: float = 0.0
    on_policy_tokens: int = 64
    on_policy_temperature: float = 1.0
    keep_share: float = 1.0
    reference: str = ""

    trained = True
    lr = 0.0
    """Peak learning rate in place of the optimizer's own; 0 keeps that."""
    training_weight = 1.0
    """Part of the time for training, by that of the other trained drafts."""
    training_overhead = 1.8
    """Time of a step over that of its products: attention, losses, evaluation. From runs on two CPUs."""

    def on_policy(self, stop_tokens: frozenset[int]) -> "OnPolicy | None":
        """What the student writes itself, if anything.

        Args:
            stop_tokens: the target's; each ends an answer.
        """
        from distill.on_policy import OnPolicy

        if self.on_policy_share == 0.0:
            return None
        return OnPolicy(
            share=self.on_policy_share,
            max_new_tokens=self.on_policy_tokens,
            temperature=self.on_policy_temperature,
            stop_tokens=stop_tokens,
        )

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
        layers, share = self.num_layers(num_target_layers), self.on_policy_share
        tokens = min(self.max_tokens, prompt_tokens + response_tokens)
        own_tokens = min(self.max_tokens, prompt_tokens + self.on_policy_tokens)
        read = layers * tokens, response_tokens
        written = (
            layers * own_tokens + layers * self.on_policy_tokens * _DECODED + num_target_layers * own_tokens * _FORWARD,
            self.on_policy_tokens * (1.0 + _DECODED),
        )
        token_layers, positions = ((1.0 - share) * r + share * w for r, w in zip(read, written, strict=True))
        if self.keep_share == 1.0:
            return token_layers, positions
        # The reference reads what the student does; to find what is kept takes as many products as to learn from all.
        return token_layers * (1.0 + _FORWARD), positions * (1.0 + self.keep_share)

    def __post_init__(self) -> None:
        for name in ("sequences_per_step", "max_tokens", "chunk_tokens", "on_policy_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"draft.{name} is {getattr(self, name)}; use at least 1")
        if self.bucket_batches < 0:
            raise ValueError(f"draft.bucket_batches is {self.bucket_batches}; use 0 to sort nothing, or a number")
        if not 0.0 <= self.on_policy_share <= 1.0:
            raise ValueError(f"draft.on_policy_share is {self.on_policy_share}; use a share between 0 and 1")
        if not 0.0 <= self.on_policy_temperature < math.inf:
            raise ValueError(f"draft.on_policy_temperature is {self.on_policy_temperature}; use 0 or more")
        if not 0.0 < self.keep_share <= 1.0:
            raise ValueError(f"draft.keep_share is {self.keep_share}; use a share above 0, where 1 keeps all tokens")
        if self.keep_share < 1.0 and not self.reference:
            raise ValueError(
                f"draft.keep_share is {self.keep_share} without a draft.reference; name a trained draft of this "
                "target, a folder or one in the list of drafts, or keep all with 1"
            )


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


def save_model(model: "CausalModel", folder: Path, *, tokenizer_from: Path) -> None:
    """Save a student's weights as bf16 safetensors with its configuration, tokenizer and `draft.json`."""
    import torch

    from inference.loading import quiet_transformers

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
