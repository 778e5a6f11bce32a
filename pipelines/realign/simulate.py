"""How often the gate errs, by simulation with the gate itself:

    python -m pipelines.realign.simulate --cycles 2000 --out docs

Paired log ratios of speed per prompt are gain + noise. Noise is Student's t with 4 degrees of freedom, scaled to the
given standard deviation, so that some requests are badly disturbed. The gate looks after every prompt and stops as it
would. With --records the noise is that of a gate that was measured: residuals of its prompts, with random signs.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inference.errors import InputError
from pipelines.files import write_json, write_text
from pipelines.realign.candidates import CHALLENGER, CHAMPION
from pipelines.realign.config import GateConfig
from pipelines.realign.gate import GIVE_UP, KEEP, PROMOTE, Pairing, decide, pairings
from pipelines.score_files import RECORDS_FILE, read_records

DOMAINS = ("chat", "code", "maths")
GAINS = (-0.05, 0.0, 0.02, 0.05, 0.10)
_FREEDOM = 4

Array = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int], Array]


def student(sd: float) -> Noise:
    """Heavy-tailed noise of a standard deviation."""
    scale = sd / math.sqrt(_FREEDOM / (_FREEDOM - 2))
    return lambda rng, count: scale * rng.standard_t(_FREEDOM, size=count)


def measured(folder: Path) -> Noise:
    """Noise of a measured gate: residuals of its prompts about their mean, with random signs.

    Raises:
        InputError: no gate with ten prompts or more there.
    """
    pairs = pairings(read_records(folder / RECORDS_FILE), challenger=CHALLENGER, champion=CHAMPION)
    if len(pairs) < 10:
        raise InputError(f"{len(pairs)} prompts under both drafts", where=str(folder), mend="name a gate's folder")
    values = np.array([pair.log_speed for pair in pairs])
    residuals = values - values.mean()
    return lambda rng, count: rng.choice(residuals, size=count) * rng.choice([-1.0, 1.0], size=count)


def outcome(cfg: GateConfig, *, gain: float, noise: Noise, prompts: int, rng: np.random.Generator) -> tuple[str, int]:
    """One cycle: how the gate ends, and after how many prompts.

    Args:
        cfg: of the gate.
        gain: true share of speed gained, the same in every domain.
        noise: of log ratios.
        prompts: of each domain.
        rng: source of the noise.
    """
    values = math.log1p(gain) + noise(rng, prompts * len(DOMAINS))
    pairs = [Pairing(str(i), DOMAINS[i % len(DOMAINS)], float(v)) for i, v in enumerate(values)]
    gate, verdict = decide(cfg, pairs, dict.fromkeys(DOMAINS, prompts))
    assert verdict is not None, "a gate decides at its last prompt at the latest"
    return verdict.outcome, len(gate.looks)


def simulate(cfg: GateConfig, *, cycles: int, noise: Noise, prompts: int, seed: int) -> list[dict[str, float]]:
    """Shares of outcomes and mean number of prompts, by true gain."""
    rows = []
    for gain in GAINS:
        rng = np.random.default_rng(seed)
        ends = [outcome(cfg, gain=gain, noise=noise, prompts=prompts, rng=rng) for _ in range(cycles)]
        shares = {name: sum(end == name for end, _ in ends) / cycles for name in (PROMOTE, KEEP, GIVE_UP)}
        rows.append({"gain": gain, **shares, "prompts": float(np.mean([count for _, count in ends]))})
    return rows


def main(argv: list[str]) -> int:
    """Run the simulation; the table goes to stdout and into a folder.

    Raises:
        InputError: the records named are no gate's.
    """
    parser = argparse.ArgumentParser(prog="python -m pipelines.realign.simulate", description=__doc__)
    parser.add_argument("--cycles", type=int, default=2000, help="for each true gain (default: 2000)")
    parser.add_argument("--sd", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="of a prompt's log ratio")
    parser.add_argument("--records", type=Path, default=None, help="folder of a measured gate, in place of --sd")
    parser.add_argument("--prompts", type=int, default=80, help="held-out prompts a domain (default: 80)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder for gate_simulation.json and .md")
    words = parser.parse_args(argv)
    noises = {"measured": measured(words.records)} if words.records else {f"{sd:g}": student(sd) for sd in words.sd}
    rows = [
        {"sd": name, **row}
        for name, noise in noises.items()
        for row in simulate(GateConfig(), cycles=words.cycles, noise=noise, prompts=words.prompts, seed=words.seed)
    ]
    lines = ["| noise (sd) | true gain | promoted | kept | undecided | prompts, mean |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['sd']} | {r['gain']:+.0%} | {r[PROMOTE]:.3f} | {r[KEEP]:.3f} | {r[GIVE_UP]:.3f} | {r['prompts']:.0f} |"
        for r in rows
    ]
    table = "\n".join(lines) + "\n"
    sys.stdout.write(table)
    if words.out:
        write_json(words.out / "gate_simulation.json", {"cycles": words.cycles, "rows": rows})
        write_text(words.out / "gate_simulation.md", table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
