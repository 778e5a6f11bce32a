"""Formats of drafts that read the target's features: one module each, found by its name.

A module has

- `KINDS`: kinds of network that can be written in it,
- `ENGINES`: engines that load it, each with what they ask of a draft (`inapplicable`) and how they are started,
- `config(source)` and `tensors(source)`: what is written,
- `read(folder, target)`: the network that an engine makes of the files, by what their names and keys mean to it.

`read` never looks at how a thing was written: a mistake in one is to show in the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.exports.source import Source

SERVED_BY_VLLM = "0.32.0: served, on a CPU"
SERVED_BY_LLAMA_CPP = "the one in llama-cpp-python 0.3.36: converted and served"
LOADED_BY_VLLM = "0.32.0: its own classes load the files, not served without a GPU"
READ_BY_SGLANG = "0.5.23: not served; its own reader of configurations finds the right values"
GAMMA = "{tokens}"
"""Stands for the number of proposed tokens in a command; `TARGET` and `DRAFT` for the folders."""


@dataclass(frozen=True)
class Engine:
    """How one engine serves a format.

    Attributes:
        name: of the engine.
        command: that starts it, with `TARGET`, `DRAFT` and `{tokens}` to be filled in.
        refuses: why it cannot serve a draft, or what tells that of one; empty where it can.
        tried: the version it was tried with, and how; empty for not at all.
    """

    name: str
    command: str
    refuses: Callable[[Source], str] | str = ""
    tried: str = ""


def vllm(method: str, *, extra: str = "") -> str:
    """vLLM's command for a method."""
    settings = f'{{"method": "{method}", "model": "\'"$DRAFT"\'", "num_speculative_tokens": {GAMMA}{extra}}}'
    return f"vllm serve $TARGET --speculative-config '{settings}'"


def sglang(algorithm: str, *, rest: str) -> str:
    """SGLang's command for an algorithm."""
    launch = "python -m sglang.launch_server --model-path $TARGET"
    return f"{launch} --speculative-algorithm {algorithm} --speculative-draft-model-path $DRAFT {rest}"


def llama_cpp(spec_type: str) -> str:
    """Conversion and start of llama.cpp for a type of draft."""
    return (
        "python convert_hf_to_gguf.py $TARGET --outtype bf16 --outfile target.gguf && "
        "python convert_hf_to_gguf.py $DRAFT --target-model-dir $TARGET --outtype bf16 --outfile draft.gguf && "
        f"llama-server -m target.gguf -md draft.gguf --spec-type {spec_type} --spec-draft-n-max {GAMMA}"
    )
