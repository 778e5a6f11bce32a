"""`dspark generate`: decode with a published pair, streaming text, then tau and tokens per second."""

import argparse
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from inference.graphed.asked import CAPTURED_AUTO, PAIR_CAPTURED
from inference.pair_files import DEFAULT_CACHE
from inference.traffic import TrafficLog

if TYPE_CHECKING:
    from distill.prompts import Prompt


def main(argv: list[str]) -> int:
    """Run the command; text goes to stdout, figures to stderr.

    Raises:
        InputError: no pair, another target, or a prompt that does not fit; the command line prints it.
    """
    parser = argparse.ArgumentParser(
        prog="dspark generate", description="Decode with a published pair; the output is the target's own."
    )
    parser.add_argument("--pair", required=True, type=Path, help="a version folder of a registry, or its champion")
    parser.add_argument("--target", default=None, help="the target's folder or id here (default: as in the pair)")
    parser.add_argument(
        "--other-target", action="store_true", help="take a target whose weights are not those the pair was made for"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where converted models are kept")
    parser.add_argument(
        "--captured",
        choices=PAIR_CAPTURED,
        default=CAPTURED_AUTO,
        help="decode by captured rounds: auto on a GPU where they can, on to refuse what they cannot (on a CPU the "
        "same rounds, uncaptured), compiled the same with fused kernels (a minute before the first answer; for many "
        "prompts), off kernel by kernel; a seed's sampled answer is another by them (default: auto)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k most probable tokens (default: 0, all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep this share of probability (default: 1, all)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="fixes a sampled answer (default: 0)")
    parser.add_argument("--traffic", type=Path, default=None, help="log the request to this folder (default: no log)")
    parser.add_argument("--domain", default="", help="of the prompt, for that log (default: unknown)")
    parser.add_argument(
        "--prompts",
        type=Path,
        default=None,
        help="answer every prompt of a JSONL file instead (messages or prompt, domain)",
    )
    parser.add_argument("prompt", nargs="?", help="what the user says; - reads it from standard input")
    words = parser.parse_args(argv)
    if (words.prompt is None) == (words.prompts is None):
        parser.error("give a prompt, or a file of them with --prompts")
    from inference.pair import load_pair  # after the words were read: it imports torch

    traffic = None if words.traffic is None else TrafficLog(words.traffic.expanduser())
    pair = load_pair(
        words.pair,
        target=words.target,
        device=words.device,
        cache=words.cache.expanduser(),
        other_target=words.other_target,
        captured=words.captured,
    )

    asked: list[tuple[str | list[dict[str, str]], str, str | None]]
    if words.prompts is not None:
        asked = _asked(words.prompts, words.domain)
    else:
        asked = [(sys.stdin.read() if words.prompt == "-" else words.prompt, words.domain, None)]

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    for prompt, domain, request_id in asked:
        result = pair.generate(
            prompt,
            temperature=words.temperature,
            top_k=words.top_k,
            top_p=words.top_p,
            repetition_penalty=words.repetition_penalty,
            max_new_tokens=words.max_new_tokens,
            seed=words.seed,
            on_text=show,
            traffic=traffic,
            domain=domain,
            request_id=request_id,
        )
        sys.stdout.write("\n")
        sys.stderr.write(
            f"[{pair.info['draft']['name']} draft: {len(result.decoded.tokens)} tokens, tau {result.tau:.2f}, "
            f"{result.tokens_per_s:.1f} tokens/s]\n"
        )
    return 0


def _asked(path: Path, domain: str) -> list[tuple[str | list[dict[str, str]], str, str | None]]:
    """First turns of a JSONL file with their domains, and ids for the log; see `distill.prompts.jsonl`."""
    from distill.prompts.jsonl import Config

    def messages(prompt: "Prompt") -> list[dict[str, str]]:
        system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
        return [*system, {"role": "user", "content": prompt.turns[0]}]

    stamp = uuid.uuid4().hex[:8]
    found = Config(path=str(path), domain=domain or "chat").prompts()
    return [(messages(prompt), prompt.domain, f"{stamp}-{prompt.id}") for prompt in found]
