"""What this machine does well: seconds per pass of 1 to 32 tokens in every arithmetic on offer, and per training token.

Measured once per device, library versions and model shape, in about a minute, and cached. Precision follows from it:
target-only decoding and speculative decoding each get the arithmetic in which a whole request takes least, its prompt
included, generation the one fastest at wide passes.
"""

import hashlib
import itertools
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock

from inference.costs import interpolated, monotone
from inference.layers import decoder_layers
from inference.model import CausalModel
from inference.parallel import load_target
from inference.placement import holders, precisions_for
from inference.target import TargetConfig, config_shape

logger = logging.getLogger(__name__)

WIDTHS = (1, 2, 3, 4, 6, 8, 16, 32)
BLOCK_WIDTHS = (4, 6, 8)
_CONTEXT_TOKENS = 128
_REPEATS = 7
_ROUNDS = 16
_TRAIN_ROWS = 128
_SECONDS = 1.0
_PASS_SECONDS = 6.0
# The request by which arithmetics are compared. A block that pays at all gives about two tokens a pass.
_PROMPT_TOKENS = 128
_ANSWER_TOKENS = 128
_BLOCK_PASSES = _ANSWER_TOKENS // 2
# Two arithmetics further apart than this are told apart, however much the machine trembled.
_TIE = 0.05
_CLOSE = 1.25
_TRAINED_IN = ("fp32", "bf16")
# Of the free memory, for models that are timed in turns; and what one takes, in sizes of its files: weights are read
# into fp32, laid out anew, and an arithmetic may keep two copies.
_MEMORY_SHARE = 0.5
_COPIES = 4
# Whatever changes what is measured, or how, makes profiles measured before it worthless.
_METHOD = 5


@dataclass(frozen=True)
class DeviceProfile:
    """Measured costs.

    Attributes:
        device: processor or GPU name and thread count.
        versions: of torch and transformers.
        passes: passes[precision][width] = seconds of one pass of `width` tokens after 128 tokens of context, the lower
            quartile of repeats: what the machine does when nothing else runs; never less than for fewer tokens.
        spread: spread[precision][width] = distance between the lower quartile and the median, seconds.
        train: train[precision] = seconds per token of forward and backward: `layer` through the linear products of one
            decoder layer, `head` through the output head and a divergence over the vocabulary.
    """

    device: str
    versions: dict[str, str]
    passes: dict[str, dict[int, float]]
    spread: dict[str, dict[int, float]]
    train: dict[str, dict[str, float]]

    @property
    def baseline_precision(self) -> str:
        """Fastest arithmetic for target-only decoding; the speculative one where the two tie.

        A tie is a difference within both spreads and within a twentieth. A baseline is not made slower by noise.
        """
        best = min(self.passes, key=self._target_only)
        block = self.block_precision
        noise = _ANSWER_TOKENS * (self.spread[block][1] + self.spread[best][1])
        slower = self._target_only(block) - self._target_only(best)
        return block if slower <= min(noise, _TIE * self._target_only(best)) else best

    @property
    def block_precision(self) -> str:
        """Fastest arithmetic for speculative decoding."""
        return min(self.passes, key=self._speculative)

    def _target_only(self, precision: str) -> float:
        """Seconds of a request of 128 tokens answered by 128, a token a pass."""
        return self.pass_seconds(precision, _PROMPT_TOKENS) + _ANSWER_TOKENS * self.passes[precision][1]

    def _speculative(self, precision: str) -> float:
        """Seconds of the same request at two tokens a pass, drafting left out."""
        verify = statistics.fmean(self.passes[precision][width] for width in BLOCK_WIDTHS)
        return self.pass_seconds(precision, _PROMPT_TOKENS) + _BLOCK_PASSES * verify

    @property
    def generation_precisions(self) -> list[str]:
        """Arithmetics that may be the fastest for batched generation, by wide passes, fastest first.

        A step for many requests attends for each of them, which a wide pass of one request does not: those within a
        quarter of the fastest are told apart by generating.
        """
        widest = max(WIDTHS)
        best = min(row[widest] for row in self.passes.values())
        close = [name for name, row in self.passes.items() if row[widest] <= _CLOSE * best]
        return sorted(close, key=lambda name: self.passes[name][widest])

    @property
    def train_precision(self) -> str:
        """Fastest arithmetic for training."""
        return min(self.train, key=lambda name: sum(self.train[name].values()))

    def pass_seconds(self, precision: str, width: int) -> float:
        """Seconds of a pass of any width, linear between the measured ones and beyond the widest."""
        return interpolated(self.passes[precision], width)

    def table(self) -> list[list[str]]:
        """Rows for people: precision, then milliseconds per width."""
        return [[name, *(f"{1e3 * row[w]:.1f}" for w in WIDTHS)] for name, row in self.passes.items()]


def device_profile(target: TargetConfig, cache: Path) -> DeviceProfile:
    """The profile of this device for a target's shape, measured when it is not known yet.

    Args:
        target: whose passes are timed.
        cache: folder of cached profiles.
    """
    folder = target.folder(cache)
    device = target.torch_device()
    identity = {
        "device": device_name(device, folder),
        "versions": library_versions(),
        "shape": config_shape(folder),
        "widths": WIDTHS,
        "method": _METHOD,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / "profiles" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            return profile_from_json(json.loads(path.read_text(encoding="utf-8")))
        logger.info("measuring this machine (once per device, versions and model shape)")
        profile = measure(folder, device=device, attention=target.attention)
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps(asdict(profile), indent=1), encoding="utf-8")
        os.replace(aside, path)
    return profile


def profile_from_json(data: dict[str, object]) -> DeviceProfile:
    """Rebuild a profile from its JSON form, whose widths are strings."""

    def by_width(table: object) -> dict[str, dict[int, float]]:
        assert isinstance(table, dict), "a profile holds tables by precision"
        return {name: {int(w): float(s) for w, s in row.items()} for name, row in table.items()}

    versions, train = data["versions"], data["train"]
    assert isinstance(versions, dict) and isinstance(train, dict), "a profile holds versions and training costs"
    return DeviceProfile(str(data["device"]), versions, by_width(data["passes"]), by_width(data["spread"]), train)


def measure(folder: Path, *, device: torch.device, attention: str = "sdpa") -> DeviceProfile:
    """Time every arithmetic on offer; see `DeviceProfile` for what is kept.

    All are loaded at once where memory allows it, and take turns: arithmetics that share a product must not differ
    because the machine did. Where not all fit, as many as do take turns, and every such group is visited twice, the
    second time in the opposite order.
    """
    names = precisions_for(folder, device)
    size = max(1, min(len(names), _models_that_fit(folder, device)))
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    if len(groups) > 1:
        groups += reversed(groups)
    seconds: dict[str, dict[int, list[float]]] = {name: {width: [] for width in WIDTHS} for name in names}
    train: dict[str, dict[str, float]] = {}
    for group in groups:
        models = [load_target(folder, precision=name, device=device, attention=attention) for name in group]
        _time_passes(models, [seconds[name] for name in group])
        del models
    for name in _TRAINED_IN:
        # Alone: beside other models the rows as wide as the vocabulary take up to twice as long to be allocated.
        train[name] = _time_training(load_target(folder, precision=name, device=device, attention=attention))
    fits = {name: _lower_quartiles(by_width) for name, by_width in seconds.items()}
    passes, spread = ({name: fit[part] for name, fit in fits.items()} for part in (0, 1))
    return DeviceProfile(device_name(device, folder), library_versions(), passes, spread, train)


def _models_that_fit(folder: Path, device: torch.device) -> int:
    """How many arithmetics of a model find room beside each other."""
    one = _COPIES * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return int(_MEMORY_SHARE * _free_bytes(device) / max(1, one))


def _free_bytes(device: torch.device) -> int:
    """Memory that can be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo")
    if lines.is_file():
        fields = dict(line.split(":", 1) for line in lines.read_text(encoding="ascii").splitlines())
        if "MemAvailable" in fields:
            return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def device_name(device: torch.device, target: Path | None = None) -> str:
    """Processor or GPU name, with the thread count and whether bf16 instructions exist on a CPU, and the processes that
    the target of a folder is spread over where they are several."""
    processes = _spread_over(target, device) if target else ""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}{processes}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{processes}"


def _spread_over(target: Path, device: torch.device) -> str:
    """The processes that a target is spread over, and the arithmetics in which it is not; empty where that is all."""
    sizes = holders(target, device)
    whole = [name for name, size in sizes.items() if size == 1]
    if len(whole) == len(sizes):
        return ""
    but = f" except in {' and '.join(whole)}" if whole else ""
    return f", {max(sizes.values())} processes{but}"


def library_versions() -> dict[str, str]:
    """Of the libraries that decide how fast a pass is."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _time_passes(models: Sequence[CausalModel], seconds: Sequence[dict[int, list[float]]]) -> None:
    """Add seconds per width and model, after a context of 128 tokens and more, or half of what the models hold.

    All models and widths take turns, so that a machine that is busy for a while is busy for all of them. The context
    grows by a token a pass, as in decoding: what depends on its length must not be timed as if it did not.

    Args:
        models: one target in several arithmetics.
        seconds: where each one's figures are added.
    """
    first = models[0]
    context = min(_CONTEXT_TOKENS, first.context_limit // 2)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(first.vocab_size, (context + max(WIDTHS),), generator=generator).to(first.device)
    longest = max(context + 1, min(2 * context, first.context_limit - max(WIDTHS)))
    turns = []
    for model, found in zip(models, seconds, strict=True):
        cache = model.new_cache()
        model.logits(tokens[:context], cache, num_rows=1)
        turns.append((model, found, cache, itertools.cycle(range(context, longest))))
    rounds, spent = 0, 0.0
    # The first round warms up.
    while rounds < 3 or (rounds <= _ROUNDS and spent < _PASS_SECONDS * len(turns)):
        for model, found, cache, lengths in reversed(turns) if rounds % 2 else turns:
            for width in WIDTHS:
                cache.rollback(next(lengths))
                start = time.perf_counter()
                model.logits(tokens[context : context + width], cache, num_rows=width)
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                taken = time.perf_counter() - start
                spent += taken
                if rounds:
                    found[width].append(taken)
        rounds += 1


def _lower_quartiles(seconds: dict[int, list[float]]) -> tuple[dict[int, float], dict[int, float]]:
    """Lower quartile by width, fitted so that a wider pass never costs less, and its distance to the median."""
    quartiles = {width: statistics.quantiles(row, n=4) for width, row in seconds.items()}
    fitted = monotone([lower for lower, _, _ in quartiles.values()])
    return dict(zip(WIDTHS, fitted, strict=True)), {w: median - lower for w, (lower, median, _) in quartiles.items()}


def _time_training(model: CausalModel) -> dict[str, float]:
    """Seconds per token of forward and backward with fp32 master weights: one layer's linear products, and the head.

    The head stays frozen, as in distillation: its cost is the draft's logits, the gradient of its input, the target's
    logits, and a KL divergence over the vocabulary.
    """
    layer = model.whole(decoder_layers(model.model)[0])
    weights = [m.weight.detach().float().requires_grad_() for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    inputs = [torch.randn(_TRAIN_ROWS, w.shape[1], device=w.device, requires_grad=True) for w in weights]
    head = model.head.linear.get_parameter("weight").detach().float()
    state = torch.randn(_TRAIN_ROWS, head.shape[1], device=head.device, requires_grad=True)
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.precision == "bf16")

    def layer_step() -> None:
        with autocast:
            sums = [torch.nn.functional.linear(x, w).float().sum() for x, w in zip(inputs, weights, strict=True)]
        torch.autograd.backward(sums)

    def head_step() -> None:
        with autocast:
            draft_logits = torch.nn.functional.linear(state, head)
            with torch.no_grad():
                target_logits = torch.nn.functional.linear(state + 1.0, head)
        draft_logprobs = draft_logits.float().log_softmax(-1)
        target_logprobs = target_logits.float().log_softmax(-1)
        torch.autograd.backward((target_logprobs.exp() * (target_logprobs - draft_logprobs)).sum())

    seconds = {"layer": _timed(layer_step, model.device), "head": _timed(head_step, model.device)}
    return {part: spent / _TRAIN_ROWS for part, spent in seconds.items()}


def _timed(work: Callable[[], None], device: torch.device) -> float:
    """Lower quartile of the seconds of repeats, one warm-up left out.

    What is slow is repeated less, and what takes seconds not at all: an arithmetic that the processor has no
    instructions for must not take minutes.
    """
    seconds: list[float] = []
    while (sum(seconds) < _SECONDS and len(seconds) <= _REPEATS) or (len(seconds) < 3 and sum(seconds) < 2 * _SECONDS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    after_warm_up = seconds[1:] or seconds
    return statistics.quantiles(after_warm_up, n=4)[0] if len(after_warm_up) > 1 else after_warm_up[0]
