"""`dspark generate`: decode with a published pair, streaming text, then tau and tokens per second."""

import argparse
import sys
from pathlib import Path

from inference.pair import DEFAULT_CACHE, load_pair


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
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where converted models are kept")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k most probable tokens (default: 0, all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep this share of probability (default: 1, all)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="fixes a sampled answer (default: 0)")
    parser.add_argument("prompt", help="what the user says; - reads it from standard input")
    words = parser.parse_args(argv)
    pair = load_pair(words.pair, target=words.target, device=words.device, cache=words.cache.expanduser())

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    result = pair.generate(
        sys.stdin.read() if words.prompt == "-" else words.prompt,
        temperature=words.temperature,
        top_k=words.top_k,
        top_p=words.top_p,
        repetition_penalty=words.repetition_penalty,
        max_new_tokens=words.max_new_tokens,
        seed=words.seed,
        on_text=show,
    )
    sys.stdout.write("\n")
    sys.stderr.write(
        f"[{pair.info['draft']['name']} draft: {len(result.decoded.tokens)} tokens, tau {result.tau:.2f}, "
        f"{result.tokens_per_s:.1f} tokens/s]\n"
    )
    return 0
