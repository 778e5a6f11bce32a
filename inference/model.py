"""One causal language model, loaded from a Hugging Face folder and run with a cache that can roll back.

Knows tokens, logits and the state before the head; knows nothing of drafting. Works for any causal LM transformers
loads, by its public forward alone.
"""

import json
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from inference.cache import RollbackCache
from inference.errors import InputError
from inference.precision import apply_precision, model_nbytes, storage_dtype

logger = logging.getLogger(__name__)


class CausalModel:
    """A model ready to decode.

    Attributes:
        model: the transformers model, in evaluation mode.
        folder: where it was loaded from; None for a model made in memory.
        precision: its arithmetic.
        head: from the last hidden states to logits.
    """

    def __init__(self, model: PreTrainedModel, *, folder: Path | None = None, precision: str = "fp32") -> None:
        self.model = model.eval()
        self.folder = folder
        self.precision = precision
        text = model.config.get_text_config(decoder=True)
        self.vocab_size: int = text.vocab_size
        self.context_limit: int = text.max_position_embeddings
        self.head = OutputHead(model)
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        device: torch.device = self.model.device
        return device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder.

        Raises:
            InputError: the folder holds none.
        """
        if self._tokenizer is None:
            if self.folder is None:
                raise InputError("this model has no folder and so no tokenizer", mend="load it from a folder")
            self._tokenizer = load_tokenizer(self.folder)
        return self._tokenizer

    def new_cache(self) -> RollbackCache:
        """An empty cache."""
        return RollbackCache.for_config(self.model.config)

    @torch.inference_mode()
    def logits(self, tokens: torch.Tensor, cache: RollbackCache, *, num_rows: int) -> torch.Tensor:
        """Feed tokens after what the cache holds.

        Args:
            tokens: int64 `[n]`.
            cache: extended by n positions.
            num_rows: rows of logits wanted, counted from the end, at least 1.

        Returns:
            `[num_rows, V]`, in the model's own dtype.
        """
        output = self.model(
            input_ids=tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=num_rows, return_dict=True
        )
        rows: torch.Tensor = output.logits[0]
        return rows

    def states(self, tokens: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The head's inputs `[batch, T, D]` for whole sequences, int64 `[batch, T]`, without a cache."""
        output = self.model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
        states: torch.Tensor = output.last_hidden_state
        return states

    def nbytes(self) -> int:
        """Bytes of weights."""
        return model_nbytes(self.model)

    def check_same_vocabulary(self, draft: "CausalModel", *, where: str) -> None:
        """Refuse a draft whose token ids mean something else.

        Raises:
            InputError: another vocabulary size or another tokenizer.
        """
        if draft.vocab_size != self.vocab_size:
            raise InputError(
                f"the draft has {draft.vocab_size} tokens, the target {self.vocab_size}",
                where=where,
                mend="use a draft with the target's own tokenizer and vocabulary size",
            )
        mine, other = self.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
        if mine != other:
            token = next(t for t in (*mine, *other) if mine.get(t) != other.get(t))
            raise InputError(
                f"the draft's tokenizer differs, for example at {token!r}",
                where=where,
                mend="use a draft with the target's own tokenizer",
            )

    @contextmanager
    def captured_states(self) -> Iterator[list[torch.Tensor]]:
        """Collect what enters the output head in every pass: `[batch, rows, D]`, final norm included."""
        states: list[torch.Tensor] = []

        def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            states.append(inputs[0].detach())

        handle = self.model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield states
        finally:
            handle.remove()


class OutputHead(nn.Module):
    """The map from last hidden states `[n, D]` to logits `[n, V]`: the output embedding, with the soft-cap or the scale
    that some families put behind it. Shares the model's parameters."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.linear = model.get_output_embeddings()
        text = model.config.get_text_config(decoder=True).to_dict()
        self.scale = float(text.get("logit_scale") or 1.0) / float(text.get("logits_scaling") or 1.0)
        self.soft_cap = float(text.get("final_logit_softcapping") or 0.0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Returns `[n, V]`."""
        logits: torch.Tensor = self.linear(states)
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.soft_cap * torch.tanh(logits / self.soft_cap) if self.soft_cap else logits


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


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        InputError: none there, or unreadable.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"cannot load a tokenizer: {_first_line(error)}", where=str(folder), mend="put the tokenizer files there"
        ) from None
    return tokenizer


def load_causal_model(
    folder: Path,
    *,
    precision: str,
    device: torch.device,
    attention: str = "sdpa",
    quantization: Any = None,
    kept_layers: list[int] | None = None,
) -> CausalModel:
    """Load an ordinary Hugging Face causal LM folder (safetensors only, no remote code).

    Args:
        folder: the model folder.
        precision: see `inference.precision`.
        device: where it runs.
        attention: transformers' attention implementation.
        quantization: a transformers quantization configuration, or None.
        kept_layers: decoder layers to keep, in order; None keeps all.

    Raises:
        InputError: missing folder, missing, truncated, incomplete or non-finite weights.
    """
    check_model_folder(folder)
    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                output_loading_info=True,
                dtype=storage_dtype(precision),
                attn_implementation=attention,
                quantization_config=quantization,
                device_map={"": str(device)} if quantization is not None else None,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                f"cannot load the model: {_first_line(error)}",
                where=str(folder),
                mend="check or fetch the folder again",
            ) from None
    model: PreTrainedModel = loaded[0]
    # transformers would fill what is missing with random numbers and say so in a notice.
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise InputError(
            f"the weights lack {len(missing)} tensors, for example {missing[0]}",
            where=str(folder),
            mend="fetch or build the folder again",
        )
    check_finite(model, where=str(folder))
    if kept_layers is not None:
        keep_layers(model, kept_layers)
    if quantization is None:
        nn.Module.to(model, device)
        apply_precision(model, precision)
    return CausalModel(model, folder=folder, precision=precision)


def check_model_folder(folder: Path) -> None:
    """Refuse, before anything is loaded, a folder that is no whole model.

    Raises:
        InputError: no folder, no configuration, no safetensors, or a file shorter than its own header says.
    """
    if not folder.is_dir():
        raise InputError("no such model folder", where=str(folder), mend="give a folder or an id that exists")
    if not (folder / "config.json").is_file():
        raise InputError("no config.json here", where=str(folder), mend="point at a Hugging Face model folder")
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"config.json is off: {_first_line(error)}", where=str(folder), mend="fetch it again"
        ) from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError("no safetensors weights here", where=str(folder), mend="convert the weights to safetensors")
    for file in files:
        expected, actual = _safetensors_bytes(file), file.stat().st_size
        if expected is None:
            raise InputError("not a safetensors file", where=str(file), mend="fetch or build it again")
        if expected != actual:
            raise InputError(
                f"truncated weights: {actual} bytes where its header promises {expected}",
                where=str(file),
                mend="fetch or build it again",
            )


def check_finite(model: nn.Module, *, where: str) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        InputError: naming the first such tensor.
    """
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"NaN or infinite weights in {name}", where=where, mend="fetch or build it again")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and notices off the terminal while a model loads."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _safetensors_bytes(file: Path) -> int | None:
    """Size a safetensors file must have by its own header; None when the header itself is off."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return None
        (length,) = struct.unpack("<Q", prefix)
        if length > file.stat().st_size:
            return 8 + int(length)
        try:
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None
    return 8 + int(length) + max(ends, default=0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
