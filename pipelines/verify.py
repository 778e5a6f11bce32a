"""Decode with a pair from its files alone and compare with what was scored.

Run by the publish stage in a process of its own, and by anyone who wants to know whether a pair still does what its
scorecard says:

    python -m pipelines.verify registry/smollm2-135m/champion
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from inference.decoder import decode
from inference.drafters import Drafter
from inference.errors import InputError
from inference.graphed.arms import decoder_of_capacity
from inference.graphed.asked import CAPTURED_OFF
from inference.graphed.decode import GraphedDecoder
from inference.lookahead.fixed import tree_of, tree_when_sampled
from inference.pair import Pair, load_pair
from inference.pair_files import DEFAULT_CACHE, read_pair
from inference.randomness import TorchSource
from inference.records import tokens_digest
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import request_seed
from inference.target import stop_tokens
from pipelines.exports.parity import check_exports
from pipelines.files import read_json, sha256_file

CHECKS_FILE = "checks.json"


@dataclass(frozen=True)
class Check:
    """A scored request that must give the same tokens again.

    Attributes:
        prompt_id: of the prompt.
        system: system message, or None.
        user: the user's message.
        temperature: it was decoded at.
        arm: name of the draft in the score.
        seed: of the score.
        max_new_tokens: longest answer.
        top_k: see `inference.sampling_settings.SamplingSettings`.
        top_p: likewise.
        repetition_penalty: likewise.
        digest: of the emitted tokens.
        passes: target passes it took; 0 where that is not known.
        captured_positions: of the buffers of the captured rounds that decoded it; 0 for the ordinary decoder. The two
            follow one law and draw by other numbers.
    """

    prompt_id: str
    system: str | None
    user: str
    temperature: float
    arm: str
    seed: int
    max_new_tokens: int
    top_k: int
    top_p: float
    repetition_penalty: float
    digest: str
    passes: int = 0
    captured_positions: int = 0


def repeat(
    pair: Pair, check: Check, *, drafter: Drafter | None = None, captured: GraphedDecoder | None = None
) -> Decoded:
    """Decode a request again: with another drafter where one is given, by captured rounds where those are."""
    system = [] if check.system is None else [{"role": "system", "content": check.system}]
    prompt = pair.prompt_tokens([*system, {"role": "user", "content": check.user}])
    settings = SamplingSettings(
        temperature=check.temperature,
        top_k=check.top_k,
        top_p=check.top_p,
        repetition_penalty=check.repetition_penalty,
    )
    seed = request_seed(check.seed, check.prompt_id, check.temperature, check.arm)
    request = Request(settings=settings, max_new_tokens=check.max_new_tokens, stop_tokens=stop_tokens(pair.target))
    if captured is not None:
        return captured.decode(prompt, request=request, seed=seed)
    return decode(
        pair.target,
        drafter or pair.drafter,
        prompt,
        request=request,
        lookahead=pair.lookahead,
        generator=TorchSource.seeded(seed, device=pair.target.device),
    )


def faithful(pair: Pair, checks: Sequence[Check], *, drafter: Drafter | None = None) -> Iterator[tuple[Check, bool]]:
    """Each request, and whether it gives the scored tokens in as many target passes as the score took; decoded as the
    score did, by captured rounds of the same shapes where it had them."""
    decoders: dict[int, GraphedDecoder] = {}
    for check in checks:
        positions = check.captured_positions
        if positions and positions not in decoders:
            decoders[positions] = decoder_of_capacity(
                pair.target,
                drafter or pair.drafter,
                block=pair.lookahead.longest,
                capacity=positions,
                tree=tree_of(pair.lookahead),
                tree_when_sampled=tree_when_sampled(pair.lookahead),
            )
        decoded = repeat(pair, check, drafter=drafter, captured=decoders.get(positions))
        yield check, tokens_digest(decoded.tokens) == check.digest and check.passes in (0, decoded.passes)


def read_checks(folder: Path) -> list[Check]:
    """The stored requests of a version."""
    return [Check(**row) for row in read_json(folder / CHECKS_FILE)]


def verify(folder: Path, *, cache: Path, device: str = "auto") -> int:
    """Check the draft's files against their digests and repeat every stored request, with the draft and with all that
    engines would make of its exports; returns how many requests there were.

    Raises:
        InputError: a file was changed, a request gave other tokens, or an export is not the draft.
    """
    for name, digest in read_pair(folder)["draft"]["files"].items():
        file = folder / "draft" / name
        if not file.is_file() or sha256_file(file) != digest:
            raise InputError("a file of the draft was changed or damaged", where=str(file), mend="publish it again")
    return verify_loaded(folder, load_pair(folder, device=device, cache=cache, captured=CAPTURED_OFF))


def verify_loaded(folder: Path, pair: Pair) -> int:
    """`verify` for a pair that was loaded from the folder.

    Raises:
        InputError: as `verify`.
    """
    checks = read_checks(folder)
    for check, went in faithful(pair, checks):
        if not went:
            raise InputError(
                f"{check.prompt_id} at temperature {check.temperature:g} gave other tokens or passes than its score",
                where=str(folder),
                mend="same machine, versions and thread count as in cost_profile? then build the pair again",
            )
    check_exports(
        folder,
        pair,
        lambda drafter: ((check.prompt_id, went) for check, went in faithful(pair, checks, drafter=drafter)),
    )
    return len(checks)


def main(argv: list[str] | None = None) -> int:
    """Command line: exit code 0 when everything repeats, 2 with one line otherwise."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.verify", description="repeat a pair's scored requests")
    parser.add_argument("pair", type=Path, help="a version folder or an alias")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where converted models are kept")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    words = parser.parse_args(argv)
    try:
        count = verify(words.pair, cache=words.cache.expanduser(), device=words.device)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{count} requests gave the scored tokens\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
