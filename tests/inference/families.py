"""Tiny random models of several families in fp64: what must hold for any causal LM is tested on each of them."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from inference.attention import use_grouped_attention
from inference.lean import use_lean_layers
from inference.model import CausalModel

VOCAB = 48
CONTEXT = 96

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    # Wide, so that distributions are far from uniform.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    # One layer sees eight positions, the other all of them.
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "gpt_neox": {},
    "phi": {},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    # Learned positions: a pass beyond the context fails instead of going on.
    "gpt2": {},
    # No positions at all.
    "bloom": {},
}
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "gpt_neox", "phi")


def family_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny model of a family."""
    return AutoConfig.for_model(name, **{**_SHAPE, **_FAMILIES[name], **changes})


def family_model(name: str, *, seed: int = 0, **changes: Any) -> CausalModel:
    """A random model of a family, `changes` to its configuration applied."""
    config = family_config(name, **changes)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).double()
    return CausalModel(model)


def greedy_reference(model: CausalModel, prompt: torch.Tensor, tokens: int) -> list[int]:
    """Argmax after argmax, a whole uncached pass each."""
    written = prompt.tolist()
    with torch.inference_mode():
        for _ in range(tokens):
            logits = model.model(input_ids=torch.tensor([written]), use_cache=False).logits[0, -1]
            written.append(int(logits.argmax()))
    return written[prompt.shape[0] :]


def lean_model(name: str, **changes: Any) -> CausalModel:
    """`family_model` as targets are loaded: our attention, lean layers."""
    made = family_model(name, **changes)
    use_grouped_attention(made.model)
    use_lean_layers(made.model)
    return made
