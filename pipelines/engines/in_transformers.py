"""transformers' own assisted generation, in this environment; target passes are counted as they are made."""

import importlib.metadata
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipelines.engines.job import Job, Outcome, Place

SAMPLES_DRAFTS = True
"""Whether proposals are drawn from the draft's rows at temperatures above 0, or are its likeliest tokens."""
LAYOUTS = ("transformers", "lookup")


def refuses(layout: str) -> str:
    """Why a format is not run here; empty where it is."""
    return "" if layout in LAYOUTS else "transformers assists by whole models and look-up alone"


def run(job: Job, place: Place) -> Outcome:
    """See `pipelines.engines`. Every target pass verifies a proposal here, the first one included."""
    target = _load(Path(job.target))
    options: dict[str, Any] = {}
    if job.layout == "lookup" and job.tokens:
        options = {"prompt_lookup_num_tokens": job.tokens, "max_matching_ngram_size": job.settings["longest"]}
    elif job.tokens:
        draft = _load(Path(job.draft))
        draft.generation_config.num_assistant_tokens = job.tokens
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        options = {"assistant_model": draft}
    passes = _Counted(target)
    answers, seconds = [], []
    for index, prompt in enumerate([job.prompts[0], *job.prompts]):  # the first once more, not counted
        torch.manual_seed(job.seed + index - 1)
        if index == 1:
            passes.count = 0
        started = time.perf_counter()
        answer = _answer(target, prompt, job, options)
        if index:
            answers.append(answer)
            seconds.append(time.perf_counter() - started)
    emitted = sum(map(len, answers))
    rounds = passes.count if job.tokens else 0
    version = importlib.metadata.version("transformers")
    return Outcome(f"transformers {version}", answers, seconds, rounds, 0, emitted - rounds if rounds else 0)


class _Counted:
    """Counts a model's passes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


def _load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    model.eval()
    return model


def _answer(target: PreTrainedModel, prompt: list[int], job: Job, options: dict[str, Any]) -> list[int]:
    sampled: dict[str, Any] = {"do_sample": False}
    if job.temperature:
        sampled = {"do_sample": True, "temperature": job.temperature, "top_k": 0, "top_p": 1.0}
    generate: Any = target.generate
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        written = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job.max_tokens,
            eos_token_id=job.stop_tokens or None,
            **sampled,
            **options,
        )
    answer: list[int] = written[0, len(prompt) :].tolist()
    return answer
