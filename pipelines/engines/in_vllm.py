"""vLLM, in the environment that `make engines` makes: its CPU build where there is no GPU."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from inference.errors import InputError
from pipelines.engines import vllm_program
from pipelines.engines.job import Job, Outcome, Place

LAYOUTS = ("transformers", "lookup", "eagle3", "eagle3_speculators", "dflash", "dflash_speculators")
LAYOUTS_ON_GPU = ("dspark", "dspark_specforge", "dspark_speculators")
"""vLLM serves DSpark by its second model runner, which needs Triton."""
SAMPLES_DRAFTS = False
"""Whether proposals are drawn from the draft's rows at temperatures above 0, or are its likeliest tokens."""
_MINUTES = 20


def refuses(layout: str) -> str:
    """Why a format is not run here; empty where it is."""
    if layout in LAYOUTS_ON_GPU:
        return "vLLM serves DSpark by its second model runner, which needs Triton and so a GPU"
    return "" if layout in LAYOUTS else "vLLM has no method for it"


def run(job: Job, place: Place) -> Outcome:
    """See `pipelines.engines`.

    Raises:
        InputError: no environment, or vLLM failed; its last line says why.
    """
    return Outcome(**_called(job, place))


def checked(job: Job, place: Place) -> str:
    """What vLLM's own classes make of a draft that cannot be served here: loaded, and nothing decoded.

    Raises:
        InputError: as `run`.
    """
    found = _called(job, place, "load")
    return (
        f"{found['engine']} loads it as {found['model']}: {found['parameters']} parameters, target layers "
        f"{found['aux_layers']}, {found['tokens']} tokens"
    )


def _called(job: Job, place: Place, *mode: str) -> dict[str, Any]:
    """Run the program in vLLM's environment and read what it wrote."""
    if not place.python.is_file():
        raise InputError("no environment for engines", where=str(place.python), mend="make engines")
    wanted, made = place.work / "job.json", place.work / "outcome.json"
    wanted.write_text(json.dumps(job.to_json()), encoding="utf-8")
    made.unlink(missing_ok=True)
    threads = {"OMP_NUM_THREADS": str(job.threads)} if job.threads else {}
    done = subprocess.run(
        [str(place.python), str(Path(vllm_program.__file__)), str(wanted), str(made), *mode],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 * _MINUTES,
        env={**os.environ, **threads, "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONPATH": ""},
        cwd=place.work,
    )
    if done.returncode or not made.is_file():
        said = [line for line in (done.stderr or done.stdout).splitlines() if "Error" in line] or ["it said nothing"]
        raise InputError(f"vLLM failed: {said[-1].strip()[:300]}", where=job.layout, mend="run it by hand to see more")
    found: dict[str, Any] = json.loads(made.read_text(encoding="utf-8"))
    return found
