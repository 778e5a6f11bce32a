"""A pair's exports run in serving engines, each beside our own decoder on the same prompts: what `dspark engines` does.

Which words it goes by is in `command`.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inference.errors import InputError
from inference.loading import load_causal_model
from inference.model import CausalModel
from inference.pair_files import read_draft_spec, read_pair
from inference.target import TargetConfig, stop_tokens, target_digest
from pipelines.engines import in_llama_cpp, in_transformers, in_vllm, ours
from pipelines.engines.compare import Row
from pipelines.engines.job import Job, Outcome, Place
from pipelines.exports.gguf_files import ENGINES_FOLDER
from pipelines.exports.source import model_folder
from pipelines.exports.write import SERVE_FOLDER, Export, read_exports, write_exports
from pipelines.files import read_json
from pipelines.publish import GOLDEN_FILE

ENGINES: dict[str, Any] = {"transformers": in_transformers, "vllm": in_vllm, "llama.cpp": in_llama_cpp}
NOT_HERE = ("sglang",)


def compared(words: argparse.Namespace) -> list[Row]:
    """Run what the words of the command line ask for: a row for each export and engine.

    Raises:
        InputError: no pair, no exports, another target, or an engine that fails.
    """
    version = Path(words.pair)
    info = read_pair(version)
    with tempfile.TemporaryDirectory() as made:
        work = Path(words.work) if words.work else Path(made)
        work.mkdir(parents=True, exist_ok=True)
        serve, draft = version / SERVE_FOLDER, version / "draft"
        if words.draft is not None:
            serve, draft = work / SERVE_FOLDER, words.draft
            write_exports(version, serve, cache=words.cache.expanduser(), target=words.target, draft=draft)
        exports = [export for export in read_exports(serve) if words.layout in (None, export.layout)]
        if not exports:
            mend = "publish it anew, or write them: python -m pipelines.exports.write"
            raise InputError("this version has no such exports", where=str(serve), mend=mend)
        target = _target(info, words)
        prompts = _prompts(version, target, most=words.prompts)
        engines = words.engines or ENGINES_FOLDER
        place = Place(engines / "venv" / "bin" / "python", engines / "llama.cpp", work.resolve())
        return _measure(serve, model_folder(draft)[0], exports, target, prompts, place, words)


def _target(info: dict[str, Any], words: argparse.Namespace) -> CausalModel:
    reference = info["target"]
    config = TargetConfig(path=words.target or reference["path"], revision=reference["revision"], device="cpu")
    folder = config.folder(words.cache.expanduser())
    if target_digest(folder) != reference["digest"]:
        raise InputError("this is not the target of the pair", where=str(folder), mend="name the one it was made for")
    return load_causal_model(folder, precision="fp32", device=torch.device("cpu"))


def _prompts(version: Path, target: CausalModel, *, most: int) -> list[list[int]]:
    """The scored greedy prompts, one of each domain before a second of any."""
    rows: list[dict[str, Any]] = read_json(version / GOLDEN_FILE)
    ranks: dict[str, int] = {}
    ordered = []
    for row in rows:
        ranks[row["domain"]] = ranks.get(row["domain"], 0) + 1
        ordered.append((ranks[row["domain"]], row))
    found = []
    for _, row in sorted(ordered, key=lambda pair: pair[0])[:most]:
        system = [] if row["system"] is None else [{"role": "system", "content": row["system"]}]
        messages = [*system, {"role": "user", "content": row["user"]}]
        text = str(target.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        found.append([int(token) for token in target.tokenizer(text, add_special_tokens=False)["input_ids"]])
    return found


def _measure(
    serve: Path,
    draft: Path,
    exports: Sequence[Export],
    target: CausalModel,
    prompts: list[list[int]],
    place: Place,
    words: argparse.Namespace,
) -> list[Row]:
    spec = read_draft_spec(draft)
    base = Job(
        target=str(target.folder),
        layout="",
        draft="",
        tokens=0,
        prompts=prompts,
        max_tokens=words.max_new_tokens,
        temperature=words.temperature,
        stop_tokens=sorted(stop_tokens(target)),
        threads=words.threads,
        settings={key: value for key, value in spec.items() if key in ("longest", "shortest")},
    )
    if words.threads:
        torch.set_num_threads(words.threads)
    compared = _Compared(draft, target, base)
    rows = []
    for export in exports:
        folder = str((serve / export.folder).resolve()) if export.folder else ""
        job = replace(base, layout=export.layout, draft=folder, tokens=export.tokens)
        for served in export.engines:
            reason = served.refuses or _not_run(served.engine, job, place, wanted=words.engine or list(ENGINES))
            if reason:
                rows.append(Row(job.layout, served.engine, None, None, None, reason))
                continue
            sys.stderr.write(f"{job.layout} in {served.engine}\n")
            alone = compared.alone(served.engine, place)
            outcome = ENGINES[served.engine].run(job, place)
            # Without files an engine drafts by its own rules, which are not ours to compare with.
            mine = compared.mine(job, served.engine) if folder else None
            rows.append(Row(job.layout, served.engine, outcome, alone, mine))
    return rows


def _not_run(engine: str, job: Job, place: Place, *, wanted: Sequence[str]) -> str:
    """Why an engine is not run, with what was found by loading alone where that can be done; empty where it runs."""
    if engine in NOT_HERE:
        return "it needs a GPU"
    if engine not in wanted:
        return "not asked for"
    reason = str(ENGINES[engine].refuses(job.layout))
    if engine == "vllm" and job.layout in in_vllm.LAYOUTS_ON_GPU:
        return f"{reason}; {in_vllm.checked(job, place)}"
    return reason


class _Compared:
    """What engines are compared with, run once and when first asked for: each alone, and our own decoder."""

    def __init__(self, draft: Path, target: CausalModel, base: Job) -> None:
        self._draft, self._target, self._base = draft, target, base
        self._alone: dict[str, Outcome] = {}
        self._mine: dict[tuple[int, bool], Outcome] = {}

    def alone(self, engine: str, place: Place) -> Outcome:
        """Target-only decoding in an engine."""
        if engine not in self._alone:
            self._alone[engine] = ENGINES[engine].run(self._base, place)
        return self._alone[engine]

    def mine(self, job: Job, engine: str) -> Outcome:
        """The job in our decoder, drafts drawn or taken greedily as the engine does."""
        sampled = not job.temperature or bool(ENGINES[engine].SAMPLES_DRAFTS)
        if (job.tokens, sampled) not in self._mine:
            own = ours.load_draft(self._draft, self._target, tokens=job.tokens)
            drafter = ours.as_engines_draft(own, sampled=sampled)
            self._mine[job.tokens, sampled] = ours.run(job, self._target, drafter)
        return self._mine[job.tokens, sampled]
