"""A student cut out of the target: evenly kept layers, first and last always among them, then distilled.

Embedding and output head are the target's and stay frozen, so training moves the kept layers and the final norm.
"""

from dataclasses import dataclass
from pathlib import Path

from distill.drafts import DraftContext, Student, TrainedConfig, save_model
from inference.errors import InputError


@dataclass(kw_only=True)
class Config(TrainedConfig):
    """A pruned student (method section 2).

    Attributes:
        kind: this kind.
        layers: decoder layers kept.
    """

    kind: str = "pruned"
    layers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"draft.layers is {self.layers}; keep at least 1 layer")

    def num_layers(self, num_target_layers: int) -> int:
        """Decoder layers of the student, for the time plan."""
        return self.layers

    def student(self, context: DraftContext) -> Student:
        """Load the target in fp32, keep some layers, freeze what both share.

        Raises:
            InputError: more layers than the target has.
        """
        from inference.layers import evenly_kept_layers
        from inference.loading import load_causal_model

        if self.layers > context.num_target_layers:
            raise InputError(
                f"cannot keep {self.layers} of {context.num_target_layers} layers",
                where="draft layers",
                mend="keep fewer",
            )
        kept = evenly_kept_layers(context.num_target_layers, self.layers)
        model = load_causal_model(context.target_folder, precision="fp32", device=context.device, kept_layers=kept)
        for embedding in (model.model.get_input_embeddings(), model.model.get_output_embeddings()):
            embedding.requires_grad_(False)

        def save(folder: Path) -> None:
            save_model(model, folder, tokenizer_from=context.target_folder)

        return Student(model, save)
