"""Kill `dspark` with SIGKILL at random moments, run it again each time, and compare what it ends with (`make kills`).

    python3 .ci/kills.py [--kills 10] [--seed 0] [--folder build/kills] [override ...]

One run is left in peace; another is killed at moments drawn over the length of the first, and started again with the
same words until it ends. Corpus, drafts, every request's tokens and the published pair must then be equal to the byte;
only seconds may differ. What is decided by seconds is therefore given here (block length, no screening), except the
winner, which must be the same too. Standard library only.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DSPARK = ROOT / ".venv" / "bin" / "dspark"
WORDS = ["experiment=smoke", "lookahead.tokens=3", "score.screen_after=0", "trainer.checkpoint_every_steps=1"]


def main() -> int:
    """Compare an undisturbed run with a killed one; 0 when they are equal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="how many times the run is killed (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "kills", help="where both runs write")
    parser.add_argument("overrides", nargs="*", help=f"Hydra overrides (always given: {' '.join(WORDS)})")
    args = parser.parse_args()
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    # The first run puts target and device profile in the cache; the one that is timed finds them there.
    for name in ("warm", "peace"):
        start = time.monotonic()
        code = _start(folder / name, args.overrides).wait()
        seconds = time.monotonic() - start
        if code:
            print(f"the undisturbed run failed with {code}; see {folder / name / 'run.log'}", file=sys.stderr)
            return 1
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    draw = random.Random(args.seed)
    # Most of an undisturbed run's length is spread over the kills, so that they fall in every stage.
    kills = fresh = 0
    while kills < args.kills:
        moment = draw.uniform(5.0, 5.0 + 2.0 * seconds / args.kills)
        process = _start(folder / "killed", args.overrides)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            print(f"kill {kills}: after {moment:.1f} s, at: {_last_line(folder / 'killed')}", flush=True)
            continue
        fresh += 1
        print(f"the run ended before the kill at {moment:.1f} s; the other kills fall on a fresh one", flush=True)
        (folder / "killed").rename(folder / f"ended-{fresh}")
    start = time.monotonic()
    code = _start(folder / "killed", args.overrides).wait()
    print(f"last run: exit {code} after {time.monotonic() - start:.0f} s", flush=True)
    wanted, found = _results(folder / "peace"), _results(folder / "killed")
    differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    for key in differing:
        print(f"differs: {key}", flush=True)
    print(f"{len(wanted) - len(differing)} of {len(wanted)} results equal; pair: {found.get('pair')}", flush=True)
    return 1 if code or differing else 0


def _start(folder: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.log").open("ab") as log:
        return subprocess.Popen([DSPARK, *WORDS, *overrides], cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def _last_line(folder: Path) -> str:
    lines = (folder / "run.log").read_text(encoding="utf-8").splitlines()
    return lines[-1].strip() if lines else "nothing said yet"


def _results(folder: Path) -> dict[str, Any]:
    """What must be equal: hashes of corpus and draft files, digests of every request's tokens, the pair."""
    results: dict[str, Any] = {}
    for kind in ("corpus", "draft"):
        for artifact in sorted((folder / "artifacts" / kind).iterdir()):
            for file in sorted(p for p in artifact.rglob("*") if p.is_file() and p.name != "manifest.json"):
                name = str(file.relative_to(folder / "artifacts"))
                results[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    for file in (folder / "artifacts" / "score").glob("*/records.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            key = f"{record['arm']} on {record['prompt_id']} at temperature {record['temperature']}"
            results[key] = (record["digest"], record["passes"], record["accepted"])
    for file in (folder / "registry").glob("*/champion/pair.json"):
        pair = json.loads(file.read_text(encoding="utf-8"))
        results["pair"] = {"version": pair["version"], "target": pair["target"]["digest"][:12], "draft": pair["draft"]}
    results["leftovers"] = sorted(str(p) for p in (folder / "artifacts").glob("*/.partial-*"))
    return results


if __name__ == "__main__":
    sys.exit(main())
