"""The stack of decoder layers of any causal LM: found, and cut down to some of them. Knows no family by name."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from inference.errors import InputError
from inference.memory import return_memory


class LayerNotLoaded(RuntimeError):
    """A pass has come to a layer that was left out when its model was loaded."""


class AbsentLayer(nn.Module):
    """In the place of a decoder layer that was not loaded."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Ends the pass."""
        raise LayerNotLoaded("this model was loaded without its layers")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers of any causal LM: the module list as long as the configuration says.

    Raises:
        InputError: no list of that length, so layers cannot be kept or skipped.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"found no stack of {count} decoder layers in {type(model).__name__}", mend="use another kind")


def drop_layers(model: PreTrainedModel) -> None:
    """Free all decoder layers of a model, in place, for who uses its embedding and its head alone."""
    del decoder_layers(model)[:]
    text = model.config.get_text_config(decoder=True)
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    return_memory()


def keep_layers(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """Cut a model down to some of its decoder layers, in place, configuration and cache indices included.

    Raises:
        InputError: a layer the model does not have, or none at all.
    """
    layers = decoder_layers(model)
    unknown = [i for i in kept if not 0 <= i < len(layers)]
    if unknown or not kept:
        what = f"layer {unknown[0]}" if unknown else "no layer"
        raise InputError(f"cannot keep {what} of {len(layers)}", mend="name layers that the model has")
    chosen = [layers[i] for i in kept]
    del layers[:]
    layers.extend(chosen)
    text = model.config.get_text_config(decoder=True)
    text.num_hidden_layers = len(kept)
    types = getattr(text, "layer_types", None)
    if types is not None:
        text.layer_types = [types[i] for i in kept]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010  (an int on a module, which nn.Module types as a tensor)
    return_memory()
    return model


def evenly_kept_layers(num_layers: int, num_kept: int) -> list[int]:
    """Indices of kept layers, evenly spread, the first and the last always among them (method section 2, `pruned`).

    Raises:
        ValueError: fewer than 1 or more than `num_layers` layers asked for.
    """
    if not 1 <= num_kept <= num_layers:
        raise ValueError(f"cannot keep {num_kept} of {num_layers} layers")
    if num_kept == 1:
        return [0]
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]
