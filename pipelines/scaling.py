"""How training scales over the processes of a host: the same losses, the time of a step, and what goes to talking.

    python -m pipelines.scaling --sizes 1 2 --stages 1 2 3 -- "draft=[none,eagle3]" budget.responses=256

Everything runs by the ordinary commands over one corpus. For strong scaling a step has `--micros` micro-batches in all,
for weak scaling as many for each process; the first ZeRO stage is measured so, the others once, on the most processes.
With `--replicated` every number of processes is measured so under `trainer=replicated` as well, or, with an empty
`--stages`, under it alone. With `--resume` a run is stopped half-way and goes on with another number of processes; with
`--kill` one is killed.
With `--offload` the most processes train under stage 3 with what it names in the CPU's memory. How decoding and the
corpus spread over processes is `pipelines.spreading`.

`scaling.json` is written after each run, so that a measurement that is stopped keeps what it has. In a folder that
has the corpus of the same words it is not made again; all else there is.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.errors import InputError
from pipelines.files import read_json, write_json

OFFLOADS = ("none", "optimizer", "all")
_OFFLOAD_STAGE = 3  # the one that all of them work under
_STOPPED = 130
_ALWAYS = ("trainer.log_every_steps=1", "trainer.checkpoint_every_steps=0")


@dataclass(frozen=True)
class Place:
    """Where runs write and what all of them are told.

    Attributes:
        root: folder of the whole measurement.
        words: of the configuration.
        steps: of each training.
    """

    root: Path
    words: tuple[str, ...]
    steps: int

    def run(self, name: str, stage: str, words: Sequence[str], *, size: int = 0) -> subprocess.Popen[str]:
        """Start a stage over a copy of the corpus; size 0 is one process without torchrun."""
        artifacts = self.root / name
        if stage != "corpus" and not artifacts.exists():
            for kind in ("corpus", "plan"):
                shutil.copytree(self.root / "corpus" / kind, artifacts / kind, dirs_exist_ok=True)
        launch = ["launch", "--processes", str(size)] if size else []
        folders = [f"paths.artifacts={artifacts}", f"paths.registry={artifacts}/registry"]
        told = [f"hydra.run.dir={artifacts}/log", f"trainer.steps={self.steps}", *self.words, *folders]
        command = [sys.executable, "-m", "pipelines.cli", *launch, stage, *told, *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def outcome(self, name: str) -> dict[str, Any]:
        """Losses, step time, memory and profile of the one draft that a build trained."""
        (history,) = (self.root / name / "draft").glob("*/history.json")
        manifest = json.loads((history.parent / "manifest.json").read_text())
        metrics, took = manifest["metrics"], manifest["took"]
        profile = history.parent / "profile.json"
        found = json.loads(profile.read_text()) if profile.is_file() else {}
        return {
            "losses": [line["loss"] for line in json.loads(history.read_text()) if "loss" in line],
            "step_seconds": metrics["step_seconds"],
            "tokens": metrics["tokens"],
            "peak_memory_gib": (took["device_bytes"] or took["resident_bytes"]) / 2**30,
            "resident_gib": took["resident_bytes"] / 2**30,
            "collectives": found.get("collectives_ms", 0.0) / found["total_ms"] if found else None,
            "kernels": found.get("rows", [])[:5],
        }


@dataclass(frozen=True)
class Results:
    """What was measured, written whenever there is more of it.

    Attributes:
        path: of the file.
        data: its content; `runs` by name, and what became of interrupted ones.
    """

    path: Path
    data: dict[str, Any] = field(default_factory=lambda: {"runs": {}})

    @property
    def runs(self) -> dict[str, Any]:
        """By name."""
        runs: dict[str, Any] = self.data["runs"]
        return runs

    def add(self, name: str, run: dict[str, Any], *, same: str = "") -> None:
        """One more run, and how far its losses are off those of another, where one is named; one line says it."""
        self.runs[name] = run | ({"off": off(run["losses"], self.runs[same]["losses"])} if same else {})
        say(name, self.runs[name])
        self.write()

    def write(self) -> None:
        """Keep what there is."""
        write_json(self.path, self.data)


def finished(process: subprocess.Popen[str], *, code: int | None = 0) -> str:
    """What a run said; ends the measurement when its exit code is another."""
    try:
        said, _ = process.communicate()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if code is not None and process.returncode != code:
        raise SystemExit(f"exit code {process.returncode} instead of {code}:\n{said[-3000:]}")
    return said


@dataclass(frozen=True)
class Arm:
    """One way of training on several processes.

    Attributes:
        name: of its runs.
        engine: words that choose what trains.
        noted: of it, for the results.
    """

    name: str
    engine: tuple[str, ...]
    noted: dict[str, int]


def zero(stage: int) -> Arm:
    """DeepSpeed at a stage."""
    return Arm(f"zero{stage}", ("trainer=deepspeed", f"trainer.zero_stage={stage}"), {"stage": stage})


REPLICATED = Arm("replicated", ("trainer=replicated",), {})


def measure(
    place: Place,
    sizes: Sequence[int],
    stages: Sequence[int],
    micros: int,
    profiled: int,
    results: Results,
    *,
    replicated: bool = False,
) -> None:
    """Build the same draft in every way."""
    watch = f"trainer.profile_steps={profiled}"
    if not stages and not replicated:
        return
    plain = {"plain": micros, **{f"plain_{size}x": micros * size for size in sizes if size > 1}}
    for name, count in plain.items():
        finished(place.run(name, "build", [f"trainer.accumulation={count}", *_ALWAYS, watch]))
        results.add(name, {"size": 1, "micros": count, **place.outcome(name)})
    for arm, kind, size in ways(sizes, stages, replicated=replicated):
        name, count = f"{arm.name}_{kind}_{size}", micros * (size if kind == "weak" else 1)
        words = [*arm.engine, f"trainer.accumulation={count}"]
        finished(place.run(name, "build", [*words, *_ALWAYS, watch], size=size))
        run = {"size": size, "micros": count, **arm.noted, **place.outcome(name)}
        results.add(name, run, same="plain" if count == micros else f"plain_{size}x")


def ways(sizes: Sequence[int], stages: Sequence[int], *, replicated: bool) -> list[tuple[Arm, str, int]]:
    """What is trained under several processes: the arm, "strong" or "weak", and how many they are."""
    found = []
    for stage in stages:
        for size in sizes if stage == stages[0] else [max(sizes)]:
            found.append((zero(stage), "strong", size))
            if size > 1 and stage == stages[0]:
                found.append((zero(stage), "weak", size))
    several = [size for size in sizes if size > 1] if replicated else []
    return found + [(REPLICATED, kind, size) for size in several for kind in ("strong", "weak")]


def offloaded(place: Place, kinds: Sequence[str], size: int, micros: int, results: Results) -> None:
    """The same training with more and more in the CPU's memory; the plain one may be among the results."""
    if "plain" not in results.runs:
        finished(place.run("plain", "build", [f"trainer.accumulation={micros}", *_ALWAYS]))
        results.add("plain", {"size": 1, "micros": micros, **place.outcome("plain")})
    for kind in kinds:
        name = f"offload_{kind}"
        words = ["trainer=deepspeed", f"trainer.zero_stage={_OFFLOAD_STAGE}", f"trainer.offload={kind}"]
        finished(place.run(name, "build", [*words, f"trainer.accumulation={micros}", *_ALWAYS], size=size))
        run = {"size": size, "micros": micros, "stage": _OFFLOAD_STAGE, "offload": kind, **place.outcome(name)}
        results.add(name, run, same="plain")


def off(losses: Sequence[float], same: Sequence[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, same, strict=True))


def resumed(place: Place, size: int, micros: int, arm: Arm) -> dict[str, Any]:
    """Stop half-way by SIGTERM, go on with another number of processes; how far the curve is from the unbroken one."""
    found: dict[str, Any] = {}
    words = [*arm.engine, f"trainer.accumulation={micros}"]
    words += ["trainer.log_every_steps=1", "trainer.checkpoint_every_steps=1"]
    finished(place.run("unbroken", "build", words, size=size))
    same = place.outcome("unbroken")["losses"]
    for first, then in ((size, 1), (1, size)):
        name = f"from_{first}_on_{then}"
        process = place.run(name, "build", words, size=first)
        wait_for(place.root / name, place.steps // 2, process)
        process.send_signal(signal.SIGTERM)
        said = finished(process, code=143)
        found[f"{name}_said"] = next(line for line in said.splitlines() if line.startswith("dspark: "))[:160]
        finished(place.run(name, "build", words, size=then))
        found[name] = off(place.outcome(name)["losses"], same)
        print_line(f"{name}: curve off by {found[name]:.2g}")
    return found


def killed(place: Place, size: int, micros: int, arm: Arm) -> dict[str, Any]:
    """Kill one process; what the run says, and whether the same command then ends well."""
    import psutil

    words = [*arm.engine, f"trainer.accumulation={micros}", "trainer.checkpoint_every_steps=1"]
    process = place.run("killed", "build", words, size=size)
    wait_for(place.root / "killed", place.steps // 3, process)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "--nproc-per-node" not in p.cmdline()]
    began = time.monotonic()
    ranks[-1].kill()
    said = finished(process, code=None)
    seconds = time.monotonic() - began
    lines = [line for line in said.splitlines() if line.startswith("dspark: ")]
    finished(place.run("killed", "build", words, size=size))
    print_line(f"killed: {lines} after {seconds:.0f} s; the same command then ended well")
    return {"code": process.returncode, "lines": lines, "seconds": seconds}


def wait_for(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until a checkpoint of a step is there."""
    while not list(folder.glob(f"draft/.partial-*/checkpoints/step-{step:08d}")):
        if process.poll() is not None:
            raise SystemExit(f"ended before step {step}:\n{process.communicate()[0][-3000:]}")
        time.sleep(0.02)


def say(name: str, result: dict[str, Any]) -> None:
    """One line of progress."""
    shared = result["collectives"]
    print_line(
        f"{name}: {result['size']} processes, {result['micros']} micro-batches, {result['step_seconds']:.3f} s a step, "
        f"collectives {'-' if shared is None else f'{100 * shared:.0f} %'}, {result['peak_memory_gib']:.2f} GiB, "
        f"off {result.get('off', 0.0):.2g}"
    )


def clear(place: Place) -> None:
    """Remove what was measured before, all but a corpus of the same words.

    Raises:
        InputError: a folder that holds something else.
    """
    noted = place.root / "words.json"
    if place.root.is_dir() and any(place.root.iterdir()) and not noted.is_file():
        raise InputError("this folder holds something else", where=str(place.root), mend="choose another --folder")
    try:
        words = read_json(noted)
    except InputError:
        words = None
    for child in place.root.iterdir() if place.root.is_dir() else ():
        if child.name == "corpus" and words == list(place.words):
            continue
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    place.root.mkdir(parents=True, exist_ok=True)
    write_json(noted, list(place.words))


def print_line(line: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and leave `scaling.json`; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/scaling"), help="where everything is written")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--stages", type=int, nargs="*", default=[2], help="ZeRO stages; none = none is timed")
    parser.add_argument("--replicated", action="store_true", help="time trainer=replicated on every size above 1")
    parser.add_argument("--micros", type=int, default=8, help="micro-batches of a step (strong), or for each (weak)")
    parser.add_argument("--steps", type=int, default=12, help="of each training")
    parser.add_argument("--profile", type=int, default=3, help="steps that are profiled (0 = none)")
    parser.add_argument("--offload", nargs="*", choices=OFFLOADS, default=[], help="kept in the CPU's memory")
    parser.add_argument("--resume", action="store_true", help="stop and go on with another number of processes")
    parser.add_argument("--kill", action="store_true", help="kill one process")
    parser.add_argument("words", nargs="*", help="Hydra words of every run")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    place = Place(args.folder.resolve(), tuple(args.words), args.steps)
    try:
        everything(place, args)
    except KeyboardInterrupt:
        print_line(f"stopped; what was measured is in {place.root / 'scaling.json'}")
        return _STOPPED
    except InputError as error:
        sys.stderr.write(f"scaling: {error}\n")
        return 2
    return 0


def everything(place: Place, args: argparse.Namespace) -> None:
    """All that was asked for, one after another."""
    results = Results(place.root / "scaling.json")
    clear(place)
    results.write()
    finished(place.run("corpus", "corpus", ()))
    measure(place, args.sizes, args.stages, args.micros, args.profile, results, replicated=args.replicated)
    interrupted = REPLICATED if args.replicated and not args.stages else zero((args.stages or [2])[-1])
    if args.offload:
        offloaded(place, args.offload, max(args.sizes), args.micros, results)
    if args.resume:
        results.data["resumed"] = resumed(place, max(args.sizes), args.micros, interrupted)
        results.write()
    if args.kill:
        results.data["killed"] = killed(place, max(args.sizes), args.micros, interrupted)
    results.write()


if __name__ == "__main__":
    sys.exit(main())
