"""The target itself in NF4 or int8, optionally with layers skipped; quantized while loading, so nothing is trained."""

from dataclasses import dataclass

from distill.drafts import DraftContext, write_spec
from inference.errors import InputError


@dataclass(kw_only=True)
class Config:
    """A quantized self-draft.

    Attributes:
        kind: this kind.
        format: `nf4` or `int8` (bitsandbytes).
        layers: decoder layers kept, evenly spread, first and last among them; 0 keeps all.
    """

    kind: str = "quantized"
    format: str = "nf4"
    layers: int = 0

    trained = False

    def __post_init__(self) -> None:
        if self.format not in {"nf4", "int8"}:
            raise ValueError(f"draft.format is {self.format!r}; choose nf4 or int8")
        if self.layers < 0:
            raise ValueError(f"draft.layers is {self.layers}; use 0 for all layers or a positive count")

    def write(self, context: DraftContext) -> None:
        """Write `draft.json`.

        Raises:
            InputError: more layers than the target has, or bitsandbytes is missing.
        """
        import torch

        from inference.drafters.quantized import quantization_config
        from inference.layers import evenly_kept_layers

        quantization_config(self.format, compute_dtype=torch.float32)
        kept = None
        if self.layers:
            if self.layers > context.num_target_layers:
                raise InputError(
                    f"cannot keep {self.layers} of {context.num_target_layers} layers",
                    where="draft layers",
                    mend="keep fewer",
                )
            kept = evenly_kept_layers(context.num_target_layers, self.layers)
        write_spec(context.folder, {"kind": "quantized", "format": self.format, "kept_layers": kept})
