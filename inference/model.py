"""One causal language model, loaded from a Hugging Face folder and run with a cache that can roll back.

Knows tokens, logits and the state before the head; knows nothing of drafting. Works for any causal LM transformers
loads, by its public forward alone.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from inference.attention import GROUPED, masked_siblings
from inference.cache import RollbackCache
from inference.errors import InputError, first_line
from inference.features import Features, tapped
from inference.precision import model_nbytes

if TYPE_CHECKING:
    from inference.batch.cache import SlotCache


class CausalModel:
    """A model ready to decode.

    Attributes:
        model: the transformers model, in evaluation mode.
        folder: where it was loaded from; None for a model made in memory.
        precision: its arithmetic.
    """

    def __init__(self, model: PreTrainedModel, *, folder: Path | None = None, precision: str = "fp32") -> None:
        self.model = model.eval()
        self.folder = folder
        self.precision = precision
        text = model.config.get_text_config(decoder=True)
        self.vocab_size: int = text.vocab_size
        self.context_limit: int = text.max_position_embeddings
        self._head = OutputHead(model, linear=model.get_output_embeddings())
        self._parameters = inspect.signature(model.forward).parameters
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

    @property
    def head(self) -> "OutputHead":
        """From the last hidden states to logits."""
        return self._head

    @property
    def embedding(self) -> nn.Module:
        """From token ids to what the first layer reads."""
        module: nn.Module = self.model.get_input_embeddings()
        return module

    def whole(self, module: nn.Module) -> nn.Module:
        """A part of the model with all of its weights: the part itself, unless they lie in several processes."""
        return module

    def new_cache(self) -> RollbackCache:
        """An empty cache."""
        return RollbackCache.for_config(self.model.config)

    def new_slots(self, *, max_slots: int, max_tokens: int) -> "SlotCache":
        """An empty cache of many requests; see `inference.batch`.

        Args:
            max_slots: most requests at once.
            max_tokens: most positions of a request.
        """
        from inference.batch.cache import SlotCache  # which imports this module by way of the engine

        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        return SlotCache(layers, max_slots=max_slots, max_tokens=max_tokens)

    @property
    def takes_siblings(self) -> bool:
        """Whether `logits` can be asked about siblings: the attention must take our masks, the model positions."""
        return self.model.config._attn_implementation == GROUPED and "position_ids" in self._parameters

    @torch.inference_mode()
    def logits(
        self, tokens: torch.Tensor, cache: RollbackCache, *, num_rows: int, slots: Sequence[int] = ()
    ) -> torch.Tensor:
        """Feed tokens after what the cache holds.

        Args:
            tokens: int64 `[n]`: an anchor and a chain, then siblings, if there are any.
            cache: extended by n positions.
            num_rows: rows of logits wanted, counted from the end, at least 1.
            slots: for each sibling, the place in the chain (from 0) whose token it stands in for: it gets that token's
                position, and sees what that token sees but itself in its place. Nothing sees a sibling.

        Returns:
            `[num_rows, V]`, in the model's own dtype.

        Raises:
            InputError: siblings, of a model that cannot be asked about them.
        """
        options: dict[str, torch.Tensor] = {}
        if slots:
            if not self.takes_siblings:
                raise InputError(
                    "this target cannot be asked about siblings",
                    where="lookahead.siblings",
                    mend="use target.attention=sdpa, or no siblings",
                )
            chain = torch.arange(tokens.shape[0] - len(slots))
            positions = torch.cat([chain, torch.tensor(slots) + 1]) + cache.length
            options["position_ids"] = positions.to(tokens.device)[None]
        with masked_siblings(slots):
            output = self.model(
                input_ids=tokens[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=num_rows,
                return_dict=True,
                **options,
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

    def tapped(self, taps: Sequence[int]) -> AbstractContextManager[Features]:
        """Collect the outputs of some decoder layers in every pass inside the block; see `inference.features`."""
        return tapped(self.model, taps)

    @contextmanager
    def captured_states(self) -> Iterator[list[torch.Tensor]]:
        """Collect the last states of every pass: `[batch, n, D]`, final norm included, at every position fed, also
        where the output head was not asked for logits."""
        states: list[torch.Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            states.append(output[0].detach())

        handle = self.model.base_model.register_forward_hook(keep)
        try:
            yield states
        finally:
            handle.remove()


class OutputHead(nn.Module):
    """The map from last hidden states `[n, D]` to logits `[n, V]`: the output embedding, with the soft-cap or the scale
    that some families put behind it. Shares the model's parameters."""

    def __init__(self, model: PreTrainedModel, *, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        text = model.config.get_text_config(decoder=True).to_dict()
        self.scale = float(text.get("logit_scale") or 1.0) / float(text.get("logits_scaling") or 1.0)
        self.soft_cap = float(text.get("final_logit_softcapping") or 0.0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Returns `[n, V]`."""
        logits: torch.Tensor = self.linear(states)
        return self.after(logits)

    def after(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and soft-cap alone, for logits of some of the head's rows."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.soft_cap * torch.tanh(logits / self.soft_cap) if self.soft_cap else logits


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        InputError: none there, or unreadable.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"cannot load a tokenizer: {first_line(error)}", where=str(folder), mend="put the tokenizer files there"
        ) from None
    return tokenizer
