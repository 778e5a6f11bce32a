"""A target of any shape with random weights, as an ordinary model folder: for measuring times, never for quality."""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from inference.errors import InputError
from inference.loading import quiet_transformers
from inference.model import load_tokenizer
from inference.target import config_shape


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a llama.

    Attributes:
        layers: decoder layers.
        width: hidden size.
        heads: of queries.
        kv_heads: of keys and values.
        inner: of the feed-forward part.
        context: most positions.
    """

    layers: int = 28
    width: int = 2048
    heads: int = 16
    kv_heads: int = 8
    inner: int = 6144
    context: int = 4096

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1 or self.width % self.heads or self.heads % self.kv_heads:
            raise InputError(
                f"no llama has {self.layers} layers of {self.width} in {self.heads} heads over {self.kv_heads}",
                mend="let the width be a multiple of the heads, and these of those of keys and values",
            )

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"random-{self.layers}x{self.width}-{self.heads}-{self.kv_heads}-{self.inner}-{self.context}"


def random_target(root: Path, shape: Shape, *, like: Path, seed: int, device: torch.device) -> Path:
    """The folder of a random target, bf16, written when it is not there.

    Args:
        root: folder that gets it.
        shape: of the model.
        like: model folder whose tokenizer and vocabulary it has.
        seed: of the weights; the same give the same on devices of one kind.
        device: where they are drawn.

    Returns:
        The folder.
    """
    folder = root / f"{shape.name}-seed{seed}"
    if folder.is_dir():
        return folder
    tokenizer = load_tokenizer(like)
    config = LlamaConfig(
        vocab_size=int(str(config_shape(like)["vocab_size"])),
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    drawn_on = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(drawn_on), device, quiet_transformers():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    os.rename(aside, folder)
    return folder
