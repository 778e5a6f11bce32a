"""What rows share: the target in any arithmetic, prompts, and the arithmetic that is fastest here for each use."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from distill.chat import messages_for, render_prompt
from distill.prompts import SourceConfig, SourceContext, rank
from distill.prompts.jsonl import Config as JsonlPrompts
from distill.prompts.package import Config as PackagePrompts
from inference.device_profile import DeviceProfile, device_profile
from inference.errors import InputError
from inference.model import CausalModel, load_tokenizer
from inference.records import Record
from inference.sampling_settings import SamplingSettings
from inference.scoring import Arm, ScorePrompt, score_prompt
from inference.target import TargetConfig, config_shape, stop_tokens
from pipelines.bench.options import Options
from pipelines.bench.paired import Clock, device_clock
from pipelines.score_plan import round_robin

SEED_DRAFT = Path(__file__).parents[2] / "distill" / "seeds" / "smollm2-135m" / "draft"
"""The draft that comes with dspark."""

HELD_OUT = ("gsm8k_heldout", "human_eval", "mt_bench")
TRAINING = ("gsm8k_train", "codeio", "chitchat")
_MAX_PROMPT_TOKENS = 512


class Bench:
    """The options, and what is loaded for them when it is first asked for.

    Attributes:
        options: of the command line.
        target_config: of the target.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.target_config = TargetConfig(
            path=options.target, revision=options.revision, precision=options.precision, device=options.device
        )
        # Rows use one or two arithmetics each; more models than that would only take memory.
        self.target = functools.lru_cache(maxsize=2)(self._target)

    @functools.cached_property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.target_config.torch_device()

    @functools.cached_property
    def target_folder(self) -> Path:
        """Files of the target."""
        return self.target_config.folder(self.options.cache.expanduser())

    @functools.cached_property
    def profile(self) -> DeviceProfile:
        """Of this device, measured when it is not known yet."""
        return device_profile(self.target_config, self.options.cache.expanduser())

    @functools.cached_property
    def context_limit(self) -> int:
        """Most tokens of a context."""
        return int(str(config_shape(self.target_folder)["max_position_embeddings"]))

    @property
    def clock(self) -> Clock:
        """Seconds on the device."""
        return device_clock(self.device)

    @property
    def baseline_precision(self) -> str:
        """For target-only decoding."""
        return self._chosen() or self.profile.baseline_precision

    @property
    def block_precision(self) -> str:
        """For speculative decoding."""
        return self._chosen() or self.profile.block_precision

    @property
    def generation_precision(self) -> str:
        """For batches."""
        return self._chosen() or self.profile.generation_precisions[0]

    def _chosen(self) -> str:
        return "" if self.options.precision == "auto" else self.options.precision

    def _target(self, precision: str) -> CausalModel:
        return self.target_config.load(self.options.cache.expanduser(), precision=precision)

    @property
    def draft_folder(self) -> Path:
        """The pair's draft, or the one that comes with dspark."""
        return SEED_DRAFT if self.options.pair is None else self.options.pair / "draft"

    def scored(self, arms: list[Arm], prompt: ScorePrompt, temperatures: Sequence[float]) -> list[Record]:
        """Decode a prompt under all arms, in shuffled order, at every temperature."""
        return [
            record
            for temperature in temperatures
            for record in score_prompt(
                arms,
                prompt,
                settings=SamplingSettings(temperature=temperature),
                max_new_tokens=self.options.max_new_tokens,
                stop_tokens=stop_tokens(arms[0].target),
                seed=self.options.seed,
            )
        ]

    def prompts(self, count: int | None = None) -> list[ScorePrompt]:
        """Prompts in tokens, one of each domain in turn, in an order fixed by the seed; as many as there are at most.

        Args:
            count: None for as many as the options say.

        Raises:
            InputError: none is short enough, or the file cannot be read.
        """
        chosen = self._chosen_prompts(self._sources(), self.options.prompts if count is None else count)
        if not chosen:
            where = str(self.options.prompt_file or ", ".join(HELD_OUT))
            raise InputError(
                f"no prompt within {self._prompt_limit} tokens", where=where, mend="add shorter ones to --prompt-file"
            )
        return chosen

    def training_prompts(self, count: int) -> list[ScorePrompt]:
        """Likewise of training questions, for what is chosen before anything is measured."""
        return self._chosen_prompts([PackagePrompts(dataset=name) for name in TRAINING], count)

    def _chosen_prompts(self, sources: Sequence[SourceConfig], wanted: int) -> list[ScorePrompt]:
        seed, limit = self.options.seed, self._prompt_limit
        tokenizer = load_tokenizer(self.target_folder)
        context = SourceContext(tokenizer=tokenizer, seed=seed)
        groups = []
        for source in sources:
            found = []
            for prompt in sorted(source.load(context), key=lambda p: rank(p.id, seed=seed)):
                ids = render_prompt(tokenizer, messages_for(prompt.turns, system=prompt.system))
                if len(ids) <= limit:
                    name = f"{prompt.source}/{prompt.id}"
                    found.append(ScorePrompt(name, prompt.domain, torch.tensor(ids, device=self.device)))
            groups.append(found)
        return round_robin(groups, wanted)[:wanted]

    @property
    def _prompt_limit(self) -> int:
        """Tokens of the longest prompt that leaves room for its answer."""
        return min(_MAX_PROMPT_TOKENS, self.context_limit - self.options.max_new_tokens - 1)

    def _sources(self) -> list[SourceConfig]:
        if self.options.prompt_file is not None:
            return [JsonlPrompts(path=str(self.options.prompt_file))]
        return [PackagePrompts(dataset=name, heldout=True) for name in HELD_OUT]
