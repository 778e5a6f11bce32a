"""What the processes of `test_parallel` run: `python -m tests.inference.parallel_program NAME FOLDER`.

Ranks come from the environment; without them the same program runs on one process, and says what several must give.
The command line stands around it, so that errors and exit codes are the real ones.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inference import sharded
from inference.batch import BatchEngine
from inference.batch.responses import Wanted, answer_all
from inference.cache import RollbackCache
from inference.decoder import decode
from inference.drafters import Drafter
from inference.drafters.feature import FeatureDrafter
from inference.drafters.lookup import LookupDrafter
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import make_network
from inference.generation import generate_batch
from inference.loading import check_model_folder
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.model import CausalModel
from inference.parallel import load_target
from inference.placement import TENSOR
from inference.processes import num_processes
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from pipelines import cli
from tests.inference.families import VOCAB

SHAPES: dict[str, FixedLookahead] = {"chain": FixedLookahead(3), "siblings": FixedLookahead(3, siblings=(2, 1))}
TEMPERATURES = (0.0, 1.0)


def target_of(folder: Path, precision: str = "fp32") -> CausalModel:
    return load_target(folder / "target", precision=precision, device=torch.device("cpu"), way=TENSOR)


def prompt(length: int, seed: int) -> torch.Tensor:
    """Three words that come again and again, so that look-up finds something."""
    words = torch.randint(3, VOCAB, (3, 4), generator=torch.Generator().manual_seed(seed))
    order = torch.randint(3, (length // 4,), generator=torch.Generator().manual_seed(seed + 1))
    return words[order].flatten()


def drafters(target: CausalModel) -> dict[str, Callable[[], Drafter]]:
    network = make_network(Eagle3(taps=[0, 1], vocabulary=0), target, None, seed=3)
    lookup = LookupSettings(shortest=1)
    return {"lookup": lambda: LookupDrafter(lookup), "eagle3": lambda: FeatureDrafter(network)}


def request(temperature: float) -> Request:
    return Request(settings=SamplingSettings(temperature=temperature), max_new_tokens=32)


def decoded(target: CausalModel, make: dict[str, Callable[[], Drafter]]) -> dict[str, list[int]]:
    """Tokens, and how many of the draft's were accepted, of each way to decode."""
    found = {}
    for name, drafter in make.items():
        for shape, lookahead in SHAPES.items():
            for temperature in TEMPERATURES:
                result = decode(
                    target,
                    drafter(),
                    prompt(24, 5),
                    request=request(temperature),
                    lookahead=lookahead,
                    generator=TorchSource.seeded(7),
                )
                key = f"{name} {shape} {temperature}"
                found[key] = result.tokens
                found[f"{key} accepted"] = [sum(result.accepted), sum(map(sum, result.siblings))]
    return found


def together(target: CausalModel, make: Callable[[], Drafter]) -> list[list[int]]:
    """Tokens of five requests of different lengths, three of which share each pass of the batch engine."""
    engine = BatchEngine(target, make, SHAPES["siblings"], max_requests=3)
    handles = [
        engine.submit(prompt(4 * n, n), request(n % 2), generator=TorchSource.seeded(n), deadline=None)
        for n in (2, 6, 1, 9, 4)
    ]
    while not engine.idle:
        engine.step()
    return [handle.result.tokens for handle in handles]


def everything(folder: Path) -> int:
    """All that a target is used for; written to `size.json`."""
    target = target_of(folder)
    with target.tapped([-1, 0, 1]) as features:
        logits = target.logits(prompt(40, 1), target.new_cache(), num_rows=7)
        tapped = features.take()
    answers = generate_batch(
        target,
        [prompt(4 * n, n).tolist() for n in (3, 1, 5)],
        settings=SamplingSettings(temperature=1.0),
        max_new_tokens=12,
        stop_tokens=frozenset(range(0, VOCAB, 7)),
        seed=4,
        keep_states=True,
        taps=[0, 1],
    )
    begun = prompt(9, 6).tolist()  # read once for all
    more = answer_all(
        target,
        [[*begun, *prompt(3 * n, n).tolist()] for n in (3, 1, 5, 2)],
        Wanted(
            settings=SamplingSettings(temperature=1.0),
            max_new_tokens=9,
            stop_tokens=frozenset(range(0, VOCAB, 7)),
            keep_states=True,
            taps=(0, 1),
        ),
        max_running=2,
        seed=4,
    )
    answers += more
    states = target.states(prompt(16, 2)[None])
    make = drafters(target)
    layer = target.whole(target.model.base_model.layers[1])
    tensors = {
        "logits": logits,
        "features": tapped[0],
        "states": states[0],
        "head": target.head(states[0]),
        "embedding": target.embedding(prompt(8, 3)),
        "layer": torch.cat([parameter.flatten()[::17] for parameter in layer.parameters()]),
        "generated states": torch.cat([answer.states for answer in answers if answer.states is not None]),
        "generated features": torch.cat([answer.features for answer in answers if answer.features is not None]).float(),
    }
    assert {type(tensor) for tensor in tensors.values()} == {torch.Tensor}, "plain tensors, whatever they were inside"
    found: dict[str, Any] = {name: tensor.tolist() for name, tensor in tensors.items()}
    found["generated"] = [answer.tokens for answer in answers]
    found["decoded"] = decoded(target, make)
    found["together"] = {name: together(target, drafter) for name, drafter in make.items()}
    found["bytes"] = target.nbytes()
    write(folder, found)
    return 0


def not_rolled_back(folder: Path) -> int:
    """Tokens of look-up; on several processes a mutant, whose followers forget to roll back their mirrors."""
    target = target_of(folder)
    write(folder, {"decoded": decoded(target, {"lookup": lambda: LookupDrafter(LookupSettings(shortest=1))})})
    return 0


def endless(folder: Path) -> int:
    """Decode until something ends it; `decoding` appears after the first request."""
    target = target_of(folder)
    while True:
        decoded(target, drafters(target))
        (folder / "decoding").touch()


def idle(folder: Path) -> int:
    """Do nothing with the target that was loaded; `decoding` appears when it was."""
    target_of(folder)
    (folder / "decoding").touch()
    time.sleep(600)
    return 0


def elsewhere(folder: Path) -> int:
    """The target is not where the followers look; see `main`."""
    target_of(folder)
    return 0


def packed(folder: Path) -> int:
    """Ask for what cannot be spread."""
    target_of(folder, "fp32_packed")
    return 0


def write(folder: Path, found: Any) -> None:
    (folder / f"{num_processes()}.json").write_text(json.dumps(found), encoding="utf-8")


PROGRAMS = {p.__name__: p for p in (everything, not_rolled_back, endless, idle, elsewhere, packed)}


def main(name: str, folder: Path) -> int:
    follower = os.environ.get("RANK", "0") != "0"
    if name == "not_rolled_back" and follower:
        RollbackCache.rollback = lambda self, length: None  # type: ignore[method-assign]
    if name == "elsewhere" and follower:
        sharded.check_model_folder = lambda given: check_model_folder(given / "elsewhere")
    cli._dispatch = lambda words: PROGRAMS[name](folder)  # type: ignore[assignment]
    return cli.main([])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
