"""Stage 1: the target answers prompts. Held-out prompts are only listed; their answers are made while scoring.

The prompts are fixed first, in one file; every shard after that depends on the prompts, the settings and its own
number alone, so a killed run goes on after its last shard and ends with the same bytes, whichever of several processes
writes it (`pipelines.corpus_shards`).
"""

import json
import logging
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from distill.chat import follow_up, messages_for, render_prompt
from distill.corpus import read_shard, shard_written
from distill.features import bytes_per_token, feature_bytes, features_path
from distill.prompts import Prompt, SourceContext, rank
from distill.responses import check_answers
from distill.responses.local import Config as LocalResponses
from distill.splits import PromptSet, prepare_prompts, prompts_digest
from inference.answers import Answering
from inference.batch.responses import Wanted
from inference.errors import InputError
from inference.model import CausalModel, load_tokenizer
from inference.placement import TENSOR
from inference.sampling_settings import SamplingSettings
from inference.taps import check_taps
from inference.target import config_shape, stop_tokens
from pipelines import lineage
from pipelines.artifacts import Artifact, Spec, Work
from pipelines.company import Company
from pipelines.config import RunConfig
from pipelines.context import RunContext
from pipelines.corpus_shards import Shards, is_compressed, sharing_group, write_missing
from pipelines.files import content_digest, plain, write_json, write_text

logger = logging.getLogger(__name__)

PROMPTS_FILE = "prompts.jsonl"
REPORT_FILE = "report.json"
VALIDATION_SHARE = 0.06
MAX_PROMPT_TOKENS = 512
# How a server is reached decides nothing about what it answers.
_TRANSPORT = {"concurrency", "retries", "timeout_s", "backoff_s"}


@dataclass(frozen=True)
class SplitPrompt:
    """A prompt and the split it belongs to: `train`, `validation` or `heldout`."""

    prompt: Prompt
    split: str


def corpus_spec(context: RunContext) -> Spec:
    """What the corpus is made from. Files and folders of prompts count by their content, wherever they lie."""
    cfg = context.cfg
    sources = {name: plain(source) for name, source in cfg.prompts.items()}
    files = {
        name: digest
        for name, source in sources.items()
        if source.get("path") and (digest := content_digest(Path(source["path"])))
    }
    return Spec(
        "corpus",
        config={
            "prompts": {name: source | ({"path": ""} if name in files else {}) for name, source in sources.items()},
            "corpus": {name: value for name, value in asdict(cfg.corpus).items() if name not in _TRANSPORT},
            "responses": context.plan.responses,
            "precision": context.plan.generation_precision,
        },
        inputs={"target": context.target_digest, **{f"prompts/{name}": digest for name, digest in files.items()}},
        seed=cfg.seed,
    )


def run_corpus(context: RunContext) -> Artifact:
    """Write the corpus, or find it.

    Raises:
        InputError: a source or a server fails, no prompt is left, or the disk is full; or greedy answers are to differ.
    """
    _check_answers(context.cfg)
    spec = corpus_spec(context)
    settings = {"responses": context.plan.responses, "seed": spec.seed}
    return lineage.obtain(context, spec, name="", make=lambda work, _: _make(context, work), settings=settings)


def read_prompts(folder: Path) -> list[SplitPrompt]:
    """Prompts of a corpus folder, all splits."""
    rows = [json.loads(line) for line in (folder / PROMPTS_FILE).read_text(encoding="utf-8").splitlines()]
    return [
        SplitPrompt(Prompt(**{**row["prompt"], "turns": tuple(row["prompt"]["turns"])}), row["split"]) for row in rows
    ]


class _LazyTarget:
    """The target in its generation arithmetic, loaded when first needed.

    Args:
        load: gives it.
    """

    def __init__(self, load: Callable[[], CausalModel]) -> None:
        self._load = load
        self._model: CausalModel | None = None
        self._answering: tuple[tuple[Wanted, int], Answering] | None = None

    @property
    def model(self) -> CausalModel:
        if self._model is None:
            self._model = self._load()
        return self._model

    def sample(
        self, prompt_ids: list[list[int]], max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """See `SourceContext.sample`."""
        wanted = Wanted(
            settings=SamplingSettings(temperature=temperature),
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens(self.model),
        )
        key = wanted, len(prompt_ids)
        if self._answering is None or self._answering[0] != key:
            self._answering = key, Answering(self.model, wanted, max_running=len(prompt_ids))
        responses = self._answering[1].answer(prompt_ids, seed=seed)
        return [r.tokens[:-1] if r.stopped else r.tokens for r in responses]

    def has_sampled(self) -> None:
        """No prompt is sampled any more: let go what that took."""
        self._answering = None


def _make(context: RunContext, work: Work) -> None:
    cfg, precision = context.cfg, context.plan.generation_precision
    group = sharing_group(cfg, context.target_folder, precision=precision)
    way = TENSOR if cfg.corpus.needs_target() else ""  # of several processes that do not share out the shards
    shards = Shards(
        folder=work.folder,
        target_folder=context.target_folder,
        target=cfg.target,
        precision=precision,
        corpus=cfg.corpus,
        seed=cfg.seed,
    )
    target = _LazyTarget(
        lambda: shards.load(Company(group)) if group else cfg.target.load(cfg.paths.cache, precision=precision, way=way)
    )
    tokenizer = load_tokenizer(context.target_folder)
    if not (work.folder / PROMPTS_FILE).is_file():
        source_context = SourceContext(tokenizer=tokenizer, seed=cfg.seed, sample=target.sample)
        prompts = prepare_prompts(cfg.prompts, source_context, validation_share=VALIDATION_SHARE, seed=cfg.seed)
        _write_prompts(work.folder, prompts, chosen=_choose(prompts, context, tokenizer))
        target.has_sampled()
    lines = read_prompts(work.folder)
    chosen = [row for row, line in enumerate(lines) if line.split != "heldout"]
    chosen.sort(key=lambda row: (_rendered_length(lines[row].prompt, tokenizer), lines[row].prompt.id))
    size = cfg.corpus.conversations_per_shard()
    rows = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    prompts_of = [lines[row].prompt for row in chosen]
    taps = _affordable_taps(context, prompts_of, tokenizer, work.folder, num_shards=len(rows))
    shares = write_missing(replace(shards, taps=taps, rows=rows), lambda: target.model, group=group)
    if len(shares) > 1:
        logger.info("corpus: %s", ", ".join(f"{share.shards} shards in {share.seconds:.0f} s" for share in shares))
    work.metrics.update(_metrics(work.folder, len(rows)))
    if taps:
        hidden, metrics = int(str(config_shape(context.target_folder)["hidden_size"])), work.metrics
        ours, theirs = bytes_per_token(
            tokens=metrics["tokens"],
            stated=metrics["stated_tokens"],
            hidden=hidden,
            num_taps=len(taps),
            compressed=is_compressed(cfg.corpus),
        )
        work.metrics["feature_bytes_per_token"] = {"kept": round(ours), "reference_cache": round(theirs)}
        logger.info("features: %.0f bytes a token kept, %.0f in the layout of DeepSpec's cache", ours, theirs)


def _affordable_taps(
    context: RunContext, prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, folder: Path, *, num_shards: int
) -> list[int]:
    """Layers whose features are kept with the responses: what the settings want, if there is room for it.

    The size is said and checked before anything is written.

    Raises:
        InputError: a layer the target does not have.
    """
    cfg = context.cfg.corpus
    if not isinstance(cfg, LocalResponses):
        return []
    shape = config_shape(context.target_folder)
    num_layers = int(str(shape["num_hidden_layers"]))
    taps = cfg.tapped_layers(num_layers)
    if not taps:
        return []
    check_taps(taps, num_layers, where="corpus.taps")
    written = next((index for index in range(num_shards) if shard_written(folder, index)), None)
    if written is not None:  # decided by the run that was interrupted, with another disk before it
        return taps if features_path(folder, written).is_file() else []
    longest = sum(_longest(p, tokenizer, answer=cfg.max_new_tokens) for p in prompts)
    hidden = int(str(shape["hidden_size"]))
    size = feature_bytes(tokens=longest, hidden=hidden, num_taps=len(taps), compressed=cfg.compress_features)
    room = min(cfg.features_gib * 2**30, shutil.disk_usage(folder).free / 2)
    said = f"features of layers {', '.join(map(str, taps))}: at most {size / 2**20:.0f} MiB"
    if size > room:
        logger.warning("%s, more than the %.0f MiB there is room for: not kept", said, room / 2**20)
        # A run killed before a first shard was whole may have left the features of some.
        for index in range(num_shards):
            features_path(folder, index).unlink(missing_ok=True)
        return []
    logger.info("%s", said)
    return taps


def _choose(prompts: PromptSet, context: RunContext, tokenizer: PreTrainedTokenizerBase) -> list[SplitPrompt]:
    """The plan's number of prompts, the same count per domain as far as there are prompts, validation on top. Where a
    domain has too few to train on, it is gone through again, for as many answers as the corpus or a prompt's source
    allows.

    Raises:
        InputError: no prompt to train on or none to validate on is short enough.
    """
    wanted, too_long = context.plan.responses, 0
    room = int(AutoConfig.from_pretrained(context.target_folder).get_text_config(decoder=True).max_position_embeddings)
    validation = max(len(prompts.by_domain("validation")), round(wanted * VALIDATION_SHARE))
    chosen: list[SplitPrompt] = []
    for split, count in (("train", wanted - validation), ("validation", validation)):
        answers = _answers_each(context.cfg, split)
        queues = [
            _again(sorted(group, key=lambda p: rank(p.id, seed=context.cfg.seed)), answers)
            for group in prompts.by_domain(split).values()
        ]
        kept = 0
        while kept < count and any(queues):
            for queue in queues:
                while queue and not _fits(queue[0], tokenizer, room=room, answer=context.cfg.corpus.max_new_tokens):
                    queue.popleft()
                    too_long += 1
                if queue and kept < count:
                    chosen.append(SplitPrompt(queue.popleft(), split))
                    kept += 1
    if too_long:
        logger.info("%d prompts left out as too long for %d tokens or the context", too_long, MAX_PROMPT_TOKENS)
    for split in ("train", "validation"):
        if not any(p.split == split for p in chosen):
            raise InputError(
                f"no {split} prompt left for {wanted} responses: {too_long} are longer than "
                f"{min(MAX_PROMPT_TOKENS, room - 1)} tokens",
                where="prompts",
                mend="add prompts (each domain needs two or more), shorten them, or raise budget.responses",
            )
    return chosen


def _check_answers(cfg: RunConfig) -> None:
    """Refuse several greedy answers to a source's prompts."""
    hottest = max([cfg.corpus.temperature, *getattr(cfg.corpus, "temperatures", ())])
    for name, source in cfg.prompts.items():
        try:
            check_answers(source.answers or 1, temperature=hottest, name=f"prompts.{name}.answers")
        except ValueError as error:
            raise InputError(str(error), where="configuration") from None


def _answers_each(cfg: RunConfig, split: str) -> dict[str, int]:
    """Most answers to one prompt, by its source."""
    if split != "train":
        return dict.fromkeys(cfg.prompts, 1)
    return {name: source.answers or cfg.corpus.answers for name, source in cfg.prompts.items()}


def _again(prompts: list[Prompt], answers: dict[str, int]) -> deque[Prompt]:
    """Prompts, and all that may have one again for every further answer, each time under ids of their own."""
    further = [
        replace(p, id=f"{p.id}#{number}")
        for number in range(2, max(answers.values()) + 1)
        for p in prompts
        if number <= answers[p.source]
    ]
    return deque([*prompts, *further])


def _fits(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, room: int, answer: int) -> bool:
    """Whether the first turn is short enough, and the last one still fits when every answer takes all its tokens.

    Each turn is rendered by itself, which counts the template's opening once too often and so errs on the safe side.
    """
    lengths = [len(render_prompt(tokenizer, messages_for([turn], system=prompt.system))) for turn in prompt.turns]
    return lengths[0] <= MAX_PROMPT_TOKENS and sum(lengths) + answer * (len(lengths) - 1) < room


def _rendered_length(prompt: Prompt, tokenizer: Any) -> int:
    return len(render_prompt(tokenizer, messages_for(prompt.turns, system=prompt.system)))


def _longest(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, answer: int) -> int:
    """Tokens of a conversation in which every answer takes all its tokens."""
    messages = messages_for(prompt.turns, system=prompt.system)
    length = len(render_prompt(tokenizer, messages)) + answer
    for turn in prompt.turns[1:]:
        messages = [*messages, {"role": "assistant", "content": "x"}]
        length += len(follow_up(tokenizer, messages, response_ids=[], user=turn)) + answer
        messages = [*messages, {"role": "user", "content": turn}]
    return length


def _write_prompts(folder: Path, prompts: PromptSet, *, chosen: list[SplitPrompt]) -> None:
    """Fix the prompts of all splits in one file, and beside it how they came about."""
    rows = [*chosen, *(SplitPrompt(p, "heldout") for p in prompts.heldout)]
    write_json(
        folder / REPORT_FILE,
        {
            "available": prompts.counts,
            "digests": {
                s: prompts_digest([r.prompt for r in rows if r.split == s]) for s in ("train", "validation", "heldout")
            },
            "contamination": asdict(prompts.report),
        },
    )
    lines = [json.dumps({"split": row.split, "prompt": asdict(row.prompt)}, sort_keys=True) for row in rows]
    write_text(folder / PROMPTS_FILE, "\n".join(lines) + "\n")


def _metrics(folder: Path, num_shards: int) -> dict[str, Any]:
    """Counts for the manifest and the summary."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    supervised = stated = total = 0
    for index in range(num_shards):
        for sample in read_shard(folder, index):
            cell = counts.setdefault(sample.split, {}).setdefault(sample.domain, {"samples": 0, "response_tokens": 0})
            response = int(sample.mask.sum())
            cell["samples"] += 1
            cell["response_tokens"] += response
            supervised += response
            stated += int(sample.stated.sum())
            total += sample.tokens.shape[0]
    return {"splits": counts, "response_tokens": supervised, "stated_tokens": stated, "tokens": total}
