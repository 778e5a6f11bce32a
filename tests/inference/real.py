"""The embedded target for tests that need a real model: one copy per process, prompts of three domains, references."""

import functools
import json
import os
from pathlib import Path

import torch
from filelock import FileLock

from distill.chat import messages_for, render_prompt
from distill.prompts import SourceContext, choose
from distill.prompts.package import Config as PackageSource
from inference.embedded import embedded_target
from inference.generation import generate_batch
from inference.loading import load_causal_model
from inference.model import CausalModel
from inference.precision import available_precisions
from inference.sampling_settings import SamplingSettings
from inference.target import stop_tokens

CPU = torch.device("cpu")
PROMPTS_PER_DOMAIN = 8
TOKENS = 128
DOMAINS = {"code": "human_eval", "maths": "gsm8k_heldout", "chat": "mt_bench"}


def cache() -> Path:
    """The model cache of this machine, as the command line uses it."""
    return Path(os.environ.get("DSPARK_CACHE", "~/.cache/dspark")).expanduser()


@functools.cache
def target_folder() -> Path:
    """Folder of the embedded target, converted on first use."""
    return embedded_target(cache())


@functools.cache
def fp32_target() -> CausalModel:
    """The target in fp32, with blocked weights where the CPU library has them: the same arithmetic, faster."""
    precision = "fp32_packed" if "fp32_packed" in available_precisions(CPU) else "fp32"
    return load_causal_model(target_folder(), precision=precision, device=CPU)


@functools.cache
def prompts(domain: str) -> tuple[torch.Tensor, ...]:
    """Held-out prompts of one domain in tokens, the shortest of a seeded choice, so that tests stay short."""
    tokenizer = fp32_target().tokenizer
    source = PackageSource(dataset=DOMAINS[domain], domain=domain, heldout=True)
    found = choose(source.read(SourceContext(tokenizer=tokenizer, seed=0)), limit=24, seed=0)
    ids = sorted((render_prompt(tokenizer, messages_for(p.turns)) for p in found), key=len)
    return tuple(torch.tensor(i) for i in ids[:PROMPTS_PER_DOMAIN])


def greedy_reference(domain: str, shared: Path) -> list[list[int]]:
    """Target-only greedy answers of a domain's prompts in fp32, made once for all processes of a test run."""
    path = shared / f"greedy-{domain}.json"
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            target = fp32_target()
            responses = generate_batch(
                target,
                [p.tolist() for p in prompts(domain)],
                settings=SamplingSettings(),
                max_new_tokens=TOKENS,
                stop_tokens=stop_tokens(target),
                seed=0,
            )
            path.write_text(json.dumps([r.tokens for r in responses]), encoding="utf-8")
    found: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))
    return found
