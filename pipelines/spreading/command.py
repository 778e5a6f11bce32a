"""The command: options, what is measured in which order, `spreading.json`, and lines for people.

    python -m pipelines.spreading --processes 2 --parts passes batch --precisions fp32 bf16

Called plainly it starts itself under torchrun; the first of the processes there measures, the others serve it.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distill.chat import messages_for, render_prompt
from distill.prompts import Prompt, SourceContext, choose
from distill.prompts.stdlib import Config as StandardLibrary
from distill.responses.local import Config as LocalResponses
from inference import parallel, processes
from inference.device_profile import device_name, library_versions
from inference.errors import InputError, ProcessLost
from inference.loading import load_causal_model
from inference.model import load_tokenizer
from inference.parallel import load_target
from inference.placement import TENSOR, undivided
from inference.precisions import PRECISIONS
from inference.target import TargetConfig, config_shape
from pipelines import corpus_shards, launch
from pipelines.files import write_json
from pipelines.spreading.corpora import measure_corpus
from pipelines.spreading.decoding import Both, measure_batch, measure_passes
from pipelines.spreading.random_target import Shape, random_target

PARTS = ("passes", "batch", "corpus")
RESULT_FILE = "spreading.json"
_MOST_PROMPT_TOKENS = 256
_TRIED = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code. Under torchrun the process ends here."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(words)
    if "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        size = options.processes or max(2, torch.cuda.device_count())
        command = [*launch.torchrun(size, 1, 0, "")[:-1], "pipelines.spreading", *words]
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
    try:
        tasks = {corpus_shards.TASK: corpus_shards.come}
        code = parallel.run(lambda: _measured(options), tasks)
    except (InputError, ProcessLost) as error:
        sys.stderr.write(f"spreading: {error}\n")
        code = 2 if isinstance(error, InputError) else 1
    processes.leave(code)


def _measured(options: argparse.Namespace) -> int:
    """On the first process: all parts, in order, each written down as soon as it is there."""
    group = processes.current()
    assert group is not None, "this runs under torchrun"
    device = TargetConfig().torch_device()
    result: dict[str, Any] = {
        "processes": group.size,
        "device": device_name(device),
        "versions": library_versions(),
        "options": {name: str(value) for name, value in vars(options).items()},
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    embedded = TargetConfig(path=str(options.like)).folder(options.cache.expanduser())
    if {"passes", "batch"} & set(options.parts):
        folder = options.target or _written(options, embedded, device)
        result |= {"target": str(folder), "weights": "the folder's own" if options.target else "random"}
        _line(f"target {folder}, weights: {result['weights']}; {result['device']}")
        for precision in options.precisions:
            result[precision] = _decoding(options, group, folder, device, precision)
            write_json(options.folder / RESULT_FILE, result)
    if "corpus" in options.parts:
        result["corpus"] = _corpus(options, group, options.corpus_target or embedded)
        write_json(options.folder / RESULT_FILE, result)
    return 0


def _written(options: argparse.Namespace, embedded: Path, device: torch.device) -> Path:
    """The folder of the random target that the options describe."""
    shape = Shape(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        kv_heads=options.kv_heads,
        inner=options.inner,
    )
    return random_target(options.folder, shape, like=embedded, seed=options.seed, device=device)


def _decoding(
    options: argparse.Namespace, group: processes.Group, folder: Path, device: torch.device, precision: str
) -> dict[str, Any]:
    """Single requests and loads, in one arithmetic."""
    if reason := undivided(folder, size=group.size):
        raise InputError(reason, where=str(folder), mend="take another number of processes, or another --target")
    both = Both(
        whole=load_causal_model(folder, precision=precision, device=device),
        spread=load_target(folder, precision=precision, device=device, way=TENSOR),
        block=options.block,
    )
    prompts = [
        torch.tensor(ids, device=both.whole.device)
        for _, ids in _prompts(folder, options.prompts, seed=options.seed, answer=options.tokens + options.block)
    ]
    found: dict[str, Any] = {}
    common = {"tokens": options.tokens, "rounds": options.rounds, "seed": options.seed}
    if "passes" in options.parts:
        found["passes"] = measure_passes(both, group, prompts, **common)
        _say_passes(precision, found["passes"])
    if "batch" in options.parts:
        found["batch"] = measure_batch(both, prompts, loads=options.loads, **common)
        _say_batch(precision, found["batch"])
    return found


def _corpus(options: argparse.Namespace, group: processes.Group, folder: Path) -> dict[str, Any]:
    """The same shards, by one process and shared out."""
    count = options.shards * options.shard
    rendered = _prompts(folder, count, seed=options.seed, answer=options.corpus_tokens)
    prompts = [prompt for prompt, _ in sorted(rendered, key=lambda pair: len(pair[1]))]
    shards = corpus_shards.Shards(
        folder=options.folder / "corpus",
        target_folder=folder,
        target=TargetConfig(),
        precision=options.corpus_precision,
        corpus=LocalResponses(max_new_tokens=options.corpus_tokens, batch_size=options.shard, keep_features=False),
        seed=options.seed,
        rows=[list(range(start, start + options.shard)) for start in range(0, len(prompts), options.shard)],
    )
    found = measure_corpus(group, shards, prompts, rounds=options.rounds, seed=options.seed)
    ratio = found["shared_out_over_one"]
    speeds = ", ".join(f"{arm} {speed['value']:.0f}" for arm, speed in found["tokens_per_s"].items())
    _line(
        f"corpus, {options.corpus_precision}: {found['tokens']} tokens in {found['shards']} shards, same bytes: "
        f"{found['same_bytes']}; tokens/s {speeds}; {group.size} processes over one {_interval(ratio)}, "
        f"{ratio['value'] / group.size:.0%} of {group.size}x"
    )
    return found


def _prompts(folder: Path, count: int, *, seed: int, answer: int) -> list[tuple[Prompt, list[int]]]:
    """Prompts that every machine has, of Python's standard library, and their tokens; answers of `answer` tokens fit.

    Raises:
        InputError: there are not so many.
    """
    tokenizer = load_tokenizer(folder)
    room = min(_MOST_PROMPT_TOKENS, int(str(config_shape(folder)["max_position_embeddings"])) - answer)
    read = StandardLibrary().read(SourceContext(tokenizer=tokenizer, seed=seed))
    tried = choose(read, limit=_TRIED * count, seed=seed)
    rendered = [(prompt, render_prompt(tokenizer, messages_for(prompt.turns))) for prompt in tried]
    fitting = [pair for pair in rendered if len(pair[1]) <= room][:count]
    if len(fitting) < count:
        raise InputError(
            f"{count} prompts are asked for, {len(fitting)} were found that fit",
            mend="ask for fewer or for less tokens",
        )
    return fitting


def _say_passes(precision: str, found: dict[str, Any]) -> None:
    for arm, seconds in found["round_seconds"].items():
        _line(
            f"passes, {precision}, {arm}: {1e3 * seconds['value']:.2f} ms a round, tau {found['tau'][arm]:.2f}, "
            f"same tokens {found['same_tokens'][arm]} of {found['requests']}, "
            f"the first {found['agreeing_tokens'][arm]:.1f} on the average"
        )
    _say_ratios(f"passes, {precision}", found)
    for name, talk in found["talk"].items():
        _line(
            f"passes, {precision}, {name}, talk of a round: {talk['announcements']:.2f} announcements, "
            f"{1e3 * talk['announce_seconds']:.2f} ms, {talk['announced_bytes']:.0f} bytes; "
            f"{talk['collectives']:.0f} collectives, {1e3 * talk['collective_seconds']:.2f} ms, "
            f"{talk['collective_bytes'] / 1024:.0f} KiB"
        )


def _say_batch(precision: str, found: dict[str, Any]) -> None:
    for load, one in found.items():
        speeds = ", ".join(f"{arm} {speed['value']:.1f}" for arm, speed in one["tokens_per_s"].items())
        same = min(one["same_tokens"].values())
        _line(f"batch of {load}, {precision}: tokens/s {speeds}; same tokens at least {same} of {one['requests']}")
        _say_ratios(f"batch of {load}, {precision}", one)


def _say_ratios(what: str, found: dict[str, Any]) -> None:
    spread, draft = found["spread_over_one"], found["draft_over_none"]
    _line(f"{what}: spread over one {', '.join(f'{name} {_interval(one)}' for name, one in spread.items())}")
    _line(f"{what}: look-up over target-only {', '.join(f'{arm} {_interval(one)}' for arm, one in draft.items())}")


def _interval(estimate: dict[str, Any]) -> str:
    ends = "" if estimate["low"] is None else f" [{estimate['low']:.2f}, {estimate['high']:.2f}]"
    return f"{estimate['value']:.2f}{ends}"


def _line(text: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    default = Shape()
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.spreading", description="What several GPUs give in decoding and in writing a corpus."
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path("build/spreading"), help="where everything is written")
    add("--processes", type=int, default=0, help="how many (default: one a GPU, two without)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (default: all)")
    add("--rounds", type=int, default=3, help="that count, of each comparison")
    add("--seed", type=int, default=0, help="of weights, prompts and orders")
    add("--like", default="embedded", help="model whose tokenizer random weights get, and the corpus's target")
    cache = Path(os.environ.get("DSPARK_CACHE", "~/.cache/dspark"))
    add("--cache", type=Path, default=cache, help="of converted models, as in paths.cache")

    decoding = parser.add_argument_group("passes and batch").add_argument
    decoding("--target", type=Path, default=None, help="model folder (default: random weights in the shape below)")
    decoding("--layers", type=int, default=default.layers, help="of random weights")
    decoding("--width", type=int, default=default.width, help="hidden size")
    decoding("--heads", type=int, default=default.heads, help="of queries")
    decoding("--kv-heads", type=int, default=default.kv_heads, help="of keys and values")
    decoding("--inner", type=int, default=default.inner, help="width of the feed-forward part")
    decoding("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"], help="tokens are equal in fp32")
    decoding("--prompts", type=int, default=4, help="prompts decoded one by one in a round")
    decoding("--tokens", type=int, default=64, help="of each answer")
    decoding("--block", type=int, default=4, help="tokens that look-up proposes at most")
    decoding("--loads", type=int, nargs="+", default=[1, 8, 32], help="requests at once on the batch engine")

    corpus = parser.add_argument_group("corpus").add_argument
    corpus("--corpus-target", type=Path, default=None, help="model folder (default: the embedded target)")
    corpus("--corpus-precision", choices=PRECISIONS, default="fp32", help="arithmetic")
    corpus("--shards", type=int, default=8, help="shards written in a round")
    corpus("--shard", type=int, default=32, help="conversations of a shard")
    corpus("--corpus-tokens", type=int, default=128, help="of the longest response")
    return parser
