"""Pairs whose draft is nothing that could be copied: engines have it themselves, or need no draft."""

from collections.abc import Callable, Mapping

from pipelines.exports.layouts import GAMMA, Engine


def none(spec: Mapping[str, object]) -> list[Engine]:
    """Target-only decoding won."""
    return [
        Engine("vllm", "vllm serve $TARGET"),
        Engine("sglang", "python -m sglang.launch_server --model-path $TARGET"),
        Engine("transformers", "target.generate(**inputs)"),
        Engine(
            "llama.cpp", "python convert_hf_to_gguf.py $TARGET --outfile target.gguf && llama-server -m target.gguf"
        ),
    ]


def lookup(spec: Mapping[str, object]) -> list[Engine]:
    """Look-up in the context: every engine has its own."""
    longest, shortest = spec.get("longest", 4), spec.get("shortest", 2)
    ngram = (
        f'{{"method": "ngram", "num_speculative_tokens": {GAMMA}, "prompt_lookup_max": {longest}, '
        f'"prompt_lookup_min": {shortest}}}'
    )
    generate = f"target.generate(**inputs, prompt_lookup_num_tokens={GAMMA}, max_matching_ngram_size={longest})"
    return [
        Engine("vllm", f"vllm serve $TARGET --speculative-config '{ngram}'"),
        Engine("transformers", generate),
        Engine(
            "sglang",
            "python -m sglang.launch_server --model-path $TARGET --speculative-algorithm NGRAM "
            f"--speculative-num-draft-tokens {GAMMA}",
        ),
        Engine(
            "llama.cpp",
            "python convert_hf_to_gguf.py $TARGET --outfile target.gguf && "
            f"llama-server -m target.gguf --spec-type ngram-simple --spec-draft-n-max {GAMMA}",
        ),
    ]


def quantized(spec: Mapping[str, object]) -> list[Engine]:
    """The target's own weights in fewer bits: quantized while they are loaded, so there is nothing to copy."""
    bits = "load_in_8bit=True" if spec.get("format") == "int8" else 'load_in_4bit=True, bnb_4bit_quant_type="nf4"'
    skipped = "" if spec.get("kept_layers") is None else "it cannot skip layers of the target"
    quantize = f'AutoModelForCausalLM.from_pretrained("$TARGET", quantization_config=BitsAndBytesConfig({bits}))'
    config = (
        f'{{"method": "draft_model", "model": "\'"$TARGET"\'", "num_speculative_tokens": {GAMMA}, '
        '"quantization": "bitsandbytes"}'
    )
    return [
        Engine("transformers", f"target.generate(**inputs, assistant_model={quantize})", skipped),
        Engine("vllm", f"vllm serve $TARGET --speculative-config '{config}'", skipped),
        Engine(
            "llama.cpp",
            "python convert_hf_to_gguf.py $TARGET --outfile target.gguf && llama-quantize target.gguf draft.gguf Q4_0 "
            f"&& llama-server -m target.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max {GAMMA}",
            skipped,
        ),
    ]


KINDS: dict[str, Callable[[Mapping[str, object]], list[Engine]]] = {
    "none": none,
    "lookup": lookup,
    "quantized": quantized,
}
"""Kind of drafter -> engines that have it themselves, from its `draft.json`."""
