"""Runs a job in vLLM. A program for vLLM's own environment: it imports nothing of ours.

python vllm_program.py job.json outcome.json
"""

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def speculative(job: dict[str, Any]) -> dict[str, Any] | None:
    """vLLM's own settings for a format.

    Drafts are left greedy, its default: with `draft_sample_method: probabilistic` the CPU build of 0.32.0 answers with
    tokens that the target would not say.
    """
    if not job["tokens"]:
        return None
    methods = {"transformers": "draft_model", "lookup": "ngram"}
    found = {"method": methods.get(job["layout"], job["layout"].split("_")[0]), "num_speculative_tokens": job["tokens"]}
    if job["draft"]:
        found["model"] = job["draft"]
    if job["layout"] == "lookup":
        found |= {"prompt_lookup_max": job["settings"]["longest"], "prompt_lookup_min": job["settings"]["shortest"]}
    return found


def counters(llm: Any) -> dict[str, Any]:
    """Counts of speculative decoding so far."""
    found: dict[str, Any] = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0, "accepted_tokens_per_pos": []}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:spec_decode_num_")
        if name in found and name != metric.name:
            found[name] = metric.values if name.endswith("per_pos") else metric.value
    return found


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Answer every prompt, one at a time; see `pipelines.engines.job.Outcome`."""
    vllm = importlib.import_module("vllm")
    longest = max(map(len, job["prompts"])) + job["max_tokens"] + job["tokens"] + 1
    llm = vllm.LLM(
        model=job["target"],
        dtype="float32",
        max_model_len=longest,
        max_num_seqs=1,
        speculative_config=speculative(job),
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )

    def answer(prompt: list[int], seed: int) -> list[int]:
        params = vllm.SamplingParams(
            temperature=job["temperature"],
            max_tokens=job["max_tokens"],
            seed=seed if job["temperature"] else None,
            stop_token_ids=job["stop_tokens"],
            detokenize=False,
        )
        [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    answer(job["prompts"][0], 0)  # what is made on first use is not timed
    before = counters(llm)
    tokens, seconds = [], []
    for index, prompt in enumerate(job["prompts"]):
        started = time.perf_counter()
        tokens.append(answer(prompt, job["seed"] + index))
        seconds.append(time.perf_counter() - started)
    after = counters(llm)
    at = before["accepted_tokens_per_pos"] or [0] * len(after["accepted_tokens_per_pos"])
    return {
        "engine": f"vllm {vllm.__version__}",
        "tokens": tokens,
        "seconds": seconds,
        "rounds": after["drafts"] - before["drafts"],
        "proposed": after["draft_tokens"] - before["draft_tokens"],
        "accepted": after["accepted_tokens"] - before["accepted_tokens"],
        "accepted_at": [int(b - a) for a, b in zip(at, after["accepted_tokens_per_pos"], strict=True)],
    }


def load(job: dict[str, Any]) -> dict[str, Any]:
    """Load the draft alone with vLLM's own classes: names and shapes are checked by its loader, nothing is decoded.

    The runner that a method needs is not asked for, which is what keeps the method from being served here.
    """
    torch: Any = importlib.import_module("torch")
    arguments = importlib.import_module("vllm.engine.arg_utils").EngineArgs
    config: Any = importlib.import_module("vllm.config")
    distributed: Any = importlib.import_module("vllm.distributed")
    config.VllmConfig._validate_v1_model_runner = lambda self: None
    torch.accelerator.empty_cache = lambda: None  # there is none
    wanted = arguments(
        model=job["target"], dtype="float32", max_model_len=512, enforce_eager=True, speculative_config=speculative(job)
    ).create_engine_config()
    draft = wanted.speculative_config
    with tempfile.TemporaryDirectory() as folder, config.set_current_vllm_config(wanted):
        distributed.init_distributed_environment(1, 0, f"file://{folder}/group", 0, backend="gloo")
        distributed.initialize_model_parallel(1, 1)
        get_model = importlib.import_module("vllm.model_executor.model_loader").get_model
        model = get_model(vllm_config=wanted, model_config=draft.draft_model_config)
    layers = importlib.import_module("vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils")
    return {
        "engine": f"vllm {importlib.import_module('vllm').__version__}",
        "model": type(model).__name__,
        "parameters": sum(1 for _ in model.parameters()),
        "aux_layers": list(layers.get_eagle3_aux_layers_from_config(draft)),
        "tokens": draft.num_speculative_tokens,
    }


if __name__ == "__main__":
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    work = load if sys.argv[3:] == ["load"] else run
    Path(sys.argv[2]).write_text(json.dumps(work(wanted)), encoding="utf-8")
