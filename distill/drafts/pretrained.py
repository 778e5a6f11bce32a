"""Any smaller checkpoint with the target's tokenizer, distilled fully, by LoRA, or by QLoRA (peft)."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.drafts import DraftContext, Student, TrainedConfig, save_model
from inference.errors import InputError

if TYPE_CHECKING:
    import torch

    from inference.model import CausalModel

_ADAPTERS = ("none", "lora", "qlora")
_PROBED_TOKENS = 32
_MERGE_TOLERANCE = 1e-4
"""Of the largest logit: a merge adds two fp32 products in another order."""


@contextmanager
def _newer_transformers() -> Iterator[None]:
    """Keep a notice to peft's authors off the user's terminal: peft 0.21 asks transformers 5.23 by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def _probed(model: "torch.nn.Module") -> "torch.Tensor":
    """Logits `[T, V]` of some tokens, without dropout."""
    import torch

    model.eval()
    config: Any = model.config
    tokens = torch.arange(_PROBED_TOKENS, device=next(model.parameters()).device) % config.vocab_size
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens[None]).logits[0]
    return logits


def _check_merged(before: "torch.Tensor", after: "torch.Tensor", *, where: Path) -> None:
    """Refuse a merge that changed what the model says.

    Raises:
        InputError: logits differ by more than rounding.
    """
    scale = float(before.abs().max())
    off = float((before - after).abs().max())
    if not off <= _MERGE_TOLERANCE * max(scale, 1.0):
        raise InputError(
            f"merged adapters give other logits, off by {off:.2g} of {scale:.2g}",
            where=str(where),
            mend="report this; the adapters themselves are in the last checkpoint",
        )


@dataclass(kw_only=True)
class Config(TrainedConfig):
    """A pretrained student.

    Attributes:
        kind: this kind.
        path: folder of the checkpoint; its tokenizer must be the target's.
        adapter: `none` moves all weights; `lora` trains adapters on the frozen checkpoint; `qlora` the same on an NF4
            copy of it. Adapters are merged into the full-precision checkpoint when saved.
        rank: adapter rank.
        alpha: adapter scale, divided by the rank.
        dropout: adapter dropout.
    """

    kind: str = "pretrained"
    path: str = ""
    adapter: str = "none"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter not in _ADAPTERS:
            raise ValueError(f"draft.adapter is {self.adapter!r}; choose one of {', '.join(_ADAPTERS)}")
        if self.rank < 1:
            raise ValueError(f"draft.rank is {self.rank}; use at least 1")

    def num_layers(self, num_target_layers: int) -> int:
        """Decoder layers of the student, for the time plan; unknown before it is loaded, so half the target's."""
        return max(1, num_target_layers // 2)

    def student(self, context: DraftContext) -> Student:
        """Load the checkpoint and put adapters on it where asked.

        Raises:
            InputError: no path, no such folder, or a broken checkpoint.
        """
        from inference.loading import load_causal_model

        if not self.path:
            raise InputError(
                "a pretrained draft needs a checkpoint", where="draft.pretrained.path", mend="set it to a model folder"
            )
        base = Path(self.path)
        if self.adapter == "none":
            model = load_causal_model(base, precision="fp32", device=context.device)
        else:
            model = self._adapted(base, context)

        def save(folder: Path) -> None:
            if self.adapter == "none":
                save_model(model, folder, tokenizer_from=base)
            else:
                self._save_merged(model, base, folder, context)

        return Student(model, save)

    def _adapted(self, base: Path, context: DraftContext) -> "CausalModel":
        """The checkpoint, frozen (in NF4 for QLoRA), with trainable adapters on its linear layers."""
        import torch
        from peft import LoraConfig, TaskType, get_peft_model

        from inference.loading import load_causal_model

        quantization: Any = None
        if self.adapter == "qlora":
            from inference.drafters.quantized import quantization_config

            compute = torch.float32 if context.device.type == "cpu" else torch.bfloat16
            quantization = quantization_config("nf4", compute_dtype=compute)
        model = load_causal_model(base, precision="fp32", device=context.device, quantization=quantization)
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="all-linear",
        )
        # get_peft_model puts adapters into the model in place and freezes the rest.
        with _newer_transformers():
            self._peft: Any = get_peft_model(model.model, config)
        return model

    def _save_merged(self, model: "CausalModel", base: Path, folder: Path, context: DraftContext) -> None:
        """Merge adapters into the full-precision checkpoint, whatever they were trained on.

        Raises:
            InputError: the merged model says something else than checkpoint and adapters, each by itself.
        """
        from peft import PeftModel

        from inference.loading import load_causal_model
        from inference.model import CausalModel

        adapter = folder / ".adapter"
        self._peft.save_pretrained(adapter, safe_serialization=True)
        full = load_causal_model(base, precision="fp32", device=context.device)
        with _newer_transformers():
            adapted = PeftModel.from_pretrained(full.model, adapter)
            before = _probed(adapted)
            merged = adapted.merge_and_unload()
        _check_merged(before, _probed(merged), where=folder)
        save_model(CausalModel(merged, folder=base), folder, tokenizer_from=base)
        shutil.rmtree(adapter)
