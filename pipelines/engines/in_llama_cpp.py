"""llama.cpp's server, built by `make engines`: drafts converted to GGUF by its own converter, one request at a time."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from inference.errors import InputError
from pipelines.engines.job import Job, Outcome, Place
from pipelines.exports.gguf_files import NAME, TYPES, Converter

SAMPLES_DRAFTS = False
"""Whether proposals are drawn from the draft's rows at temperatures above 0, or are its likeliest tokens."""
_START_SECONDS, _ANSWER_SECONDS = 120, 900
_DRAFT_NEEDS_TARGET = ("eagle3", "dflash", "dspark", "dspark_speculators")


def refuses(layout: str) -> str:
    """Why a format is not run here; empty where it is."""
    if layout == NAME:
        return "it is what llama.cpp makes of the other format"
    return "" if layout in TYPES else "llama.cpp converts the other formats of this draft"


def run(job: Job, place: Place) -> Outcome:
    """See `pipelines.engines`. llama.cpp tells tokens proposed and accepted; passes are what is left of those emitted.

    Raises:
        InputError: it is not built, or a conversion or the server failed.
    """
    server = place.llama_cpp / "build" / "bin" / "llama-server"
    if not server.is_file():
        raise InputError("llama.cpp is not built", where=str(server), mend="make engines")
    words = ["-m", str(converted(Path(job.target), place))]
    if job.tokens:
        target = Path(job.target) if job.layout in _DRAFT_NEEDS_TARGET else None
        words += ["-md", str(converted(Path(job.draft), place, target=target)), "--spec-type", TYPES[job.layout]]
        words += ["--spec-draft-n-max", str(job.tokens), "--spec-draft-p-min", "0"]
    room = max(map(len, job.prompts)) + job.max_tokens + job.tokens + 64
    words += ["-c", str(room), "-np", "1", "--no-webui"] + (["-t", str(job.threads)] if job.threads else [])
    answers, seconds = [], []
    proposed = accepted = 0
    with _served(server, words, place.work) as client:
        for index, prompt in enumerate([job.prompts[0], *job.prompts]):
            started = time.perf_counter()
            answer = _answer(client, prompt, job, seed=job.seed + index - 1)
            if index:
                seconds.append(time.perf_counter() - started)
                answers.append([int(token) for token in answer["tokens"]])
                proposed += answer["timings"].get("draft_n", 0)
                accepted += answer["timings"].get("draft_n_accepted", 0)
    # The first token of an answer comes from the prompt's pass; every later pass emits one token that nobody proposed.
    emitted = sum(len(answer) - 1 for answer in answers)
    rounds = emitted - accepted if job.tokens else 0
    return Outcome(f"llama.cpp {_version(server)}", answers, seconds, rounds, proposed, accepted)


def converted(folder: Path, place: Place, *, target: Path | None = None) -> Path:
    """A model folder as GGUF in fp32, made once.

    Raises:
        InputError: the converter failed.
    """
    made = place.work / f"{folder.parent.name}-{folder.name}.gguf"
    if made.is_file():
        return made
    Converter(place.python, place.llama_cpp).convert(folder, made, target=target)
    return made


@contextmanager
def _served(server: Path, words: list[str], work: Path) -> Iterator[httpx.Client]:
    """The server, from when it answers until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = work / "llama-server.log"
    with log.open("wb") as sink:
        process = subprocess.Popen([str(server), *words, "--port", str(port)], stdout=sink, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=_ANSWER_SECONDS) as client:
            _wait(client, process, log)
            yield client
    finally:
        process.terminate()
        process.wait()


def _wait(client: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/health").status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    said = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    raise InputError(f"llama-server did not start: {said[:300]}", where=str(log), mend="see its log")


def _answer(client: httpx.Client, prompt: list[int], job: Job, *, seed: int) -> dict[str, Any]:
    body = {
        "prompt": prompt,
        "n_predict": job.max_tokens,
        "temperature": job.temperature,
        "seed": seed,
        "cache_prompt": False,
        "return_tokens": True,
    }
    # Nothing but the temperature shapes the distribution, as everywhere else here.
    body |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
    answer: dict[str, Any] = client.post("/completion", json=body).raise_for_status().json()
    return answer


def _version(server: Path) -> str:
    done = subprocess.run([str(server), "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("version")]
    return lines[0].removeprefix("version:").strip() if lines else "of unknown version"
