"""The target and the trained drafts without weights: built by the code that builds them for real, on fake tensors.

A fake tensor has shape, dtype and device and no memory behind it, so that counts and a whole training step of a model
of any size are had in seconds. Nothing is loaded and nothing is fetched but a configuration.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from distill.drafts import pretrained, pruned
from inference.attention import use_grouped_attention
from inference.errors import InputError, first_line
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_networks import Borrowed, FeatureNetwork
from inference.feature_networks._layers import DraftShape
from inference.layers import evenly_kept_layers, keep_layers
from inference.loading import quiet_transformers
from inference.model import CausalModel
from inference.taps import check_taps
from inference.target import EMBEDDED
from pipelines.config import RunConfig

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Sketch:
    """A target without weights.

    Attributes:
        config: its configuration.
        shape: what a draft takes over of it.
        model: on fake tensors, fp32, frozen.
        mode: under which its tensors, and everything that meets them, exist.
    """

    config: PreTrainedConfig
    shape: DraftShape
    model: CausalModel
    mode: FakeTensorMode


@dataclass(frozen=True)
class Student:
    """A trained draft without weights.

    Attributes:
        module: what the training loop is given.
        language: the student as a language model; None for a network that reads features.
    """

    module: nn.Module
    language: CausalModel | None

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters that training moves."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def frozen(self) -> list[nn.Parameter]:
        """Its own parameters that training does not move."""
        return [p for p in self.module.parameters() if not p.requires_grad]


def count(parameters: Iterable[Tensor]) -> int:
    """Numbers in some tensors."""
    return sum(parameter.numel() for parameter in parameters)


def target_config(cfg: RunConfig) -> PreTrainedConfig:
    """The target's configuration: `plan.shape`, else that of `target.path`; of a hub id only config.json is fetched.

    Raises:
        InputError: a shape that transformers does not know, or no configuration to be had.
    """
    if shape := dict(cfg.plan.shape):
        kind = str(shape.pop("model_type"))
        if kind not in CONFIG_MAPPING:
            raise InputError(f"transformers knows no model type {kind!r}", where="plan.shape.model_type")
        try:
            with quiet_transformers():
                config: PreTrainedConfig = CONFIG_MAPPING[kind](**shape)
        except (TypeError, ValueError) as error:
            raise InputError(f"no {kind} has this shape: {first_line(error)}", where="plan.shape") from None
        return config
    path: str | Path = cfg.target.folder(cfg.paths.cache) if cfg.target.path == EMBEDDED else cfg.target.path
    return _read_config(path, revision=cfg.target.revision, where="target.path", mend="check it, or set plan.shape")


def _read_config(path: str | Path, *, revision: str = "", where: str, mend: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, revision=revision or None, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"no configuration of {path}: {first_line(error)}", where=where, mend=mend) from None
    return config


def sketch_target(config: PreTrainedConfig) -> Sketch:
    """Build a target without weights.

    Raises:
        InputError: transformers builds no causal language model from it.
    """
    mode = FakeTensorMode()
    with mode, quiet_transformers():
        model = CausalModel(_built(config))
        model.model.requires_grad_(False)
        return Sketch(config, DraftShape.of(config), model, mode)


def _built(config: PreTrainedConfig) -> Any:
    """An fp32 model of a configuration, as `inference.loading` leaves one."""
    try:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"no causal language model of this shape: {first_line(error)}", where="plan.shape") from None
    use_grouped_attention(model)
    return model


class _Lent(Borrowed):
    """The target's embedding and head, without the run of the target that measures what lies between."""

    def __init__(self, target: CausalModel) -> None:
        self._embedding, self.head, self.scale = target.embedding, target.head, 1.0


def sketch_draft(name: str, draft: Any, target: Sketch, *, dtype: torch.dtype) -> Student:
    """Build a trained draft for a target without weights.

    Args:
        name: of the draft in the configuration.
        draft: its settings.
        target: the target.
        dtype: of its weights in training.

    Raises:
        InputError: settings the target does not allow, or a kind that cannot be sketched.
    """
    with target.mode, quiet_transformers():
        if isinstance(draft, FeatureDraftConfig):
            return Student(_stored(_network(draft, target), dtype), None)
        if isinstance(draft, pruned.Config):
            model = _pruned(draft, target)
        elif isinstance(draft, pretrained.Config) and draft.adapter == "none":
            where = f"draft.{name}.path"
            model = _built(_read_config(draft.path, where=where, mend="set it to a model folder"))
        else:
            raise InputError(f"{draft.kind} cannot be planned", where=f"draft.{name}", mend="leave it out of draft=[]")
        return Student(_stored(model, dtype), CausalModel(model))


def _stored(module: Module, dtype: torch.dtype) -> Module:
    """A module with weights of another dtype."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _network(draft: FeatureDraftConfig, target: Sketch) -> FeatureNetwork:
    """As `inference.feature_drafts.make_network`, without initial values."""
    taps = draft.tapped_layers(target.shape.target_layers)
    check_taps(taps, target.shape.target_layers, where=f"draft.{draft.kind}.taps")
    size = draft.vocabulary
    vocabulary = torch.arange(size) if 0 < size < target.shape.vocab else None
    network = draft.build(target.shape, taps, vocabulary)
    network._borrowed = (_Lent(target.model),)
    return network


def _pruned(draft: pruned.Config, target: Sketch) -> Any:
    """As `distill.drafts.pruned` cuts a student out of the target."""
    layers = target.shape.target_layers
    if draft.layers > layers:
        raise InputError(f"cannot keep {draft.layers} of {layers} layers", where="draft layers", mend="keep fewer")
    config = type(target.config).from_dict(target.config.to_dict())
    model = keep_layers(_built(config), evenly_kept_layers(layers, draft.layers))
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.requires_grad_(False)
    return model
