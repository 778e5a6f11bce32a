"""A published (target, draft) pair, ready to decode.

    from inference.pair import load_pair
    pair = load_pair("registry/smollm2/champion")
    print(pair.generate("Why is the sky blue?").text)

`pair.json` names kinds, never code. The target it was made for is checked by digest before anything is decoded.
"""

import functools
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inference.decoder import decode
from inference.device_profile import device_name, device_profile, library_versions
from inference.drafters import Drafter, LoadContext, load_drafter
from inference.drafters.feature import FeatureDrafter
from inference.errors import InputError
from inference.graphed.arms import can_be_captured
from inference.graphed.asked import CAPTURED_AUTO, CAPTURED_OFF
from inference.graphed.growing import GrowingDecoder, growing_decoder
from inference.lookahead import Lookahead, Measured
from inference.lookahead.fixed import FixedLookahead, tree_of
from inference.model import CausalModel
from inference.pair_files import DEFAULT_CACHE, PAIR_FILE, TREE_KEY, TREE_WHEN_SAMPLED_KEY, read_pair
from inference.parallel import load_target
from inference.placement import precisions_for
from inference.plugins import plugin
from inference.randomness import TorchSource
from inference.request import Decoded, Request
from inference.sampling_settings import SamplingSettings
from inference.target import TargetConfig, stop_tokens, target_digest
from inference.text_stream import TextStream
from inference.traffic import TrafficLog, as_messages, pair_label, record_from
from inference.trees import Tree

logger = logging.getLogger(__name__)

# Settings of scores that pairs of earlier versions name, and that decide nothing about how a pair decodes.
_RETIRED = ("tree_depth",)


@dataclass(frozen=True)
class Generated:
    """Text and what it took.

    Attributes:
        text: the answer, special tokens left out.
        decoded: tokens, passes and seconds.
    """

    text: str
    decoded: Decoded

    @property
    def tau(self) -> float:
        """Emitted tokens per target pass."""
        return self.decoded.tau

    @property
    def tokens_per_s(self) -> float:
        """Emitted tokens per second, prefill included."""
        return len(self.decoded.tokens) / self.decoded.total_seconds


@dataclass(frozen=True)
class Pair:
    """A loaded pair.

    Attributes:
        info: what `pair.json` says.
        target: the model whose output is kept.
        drafter: proposes tokens.
        lookahead: how many, and the tree that captured rounds propose, greedy ones or all.
        target_digest: of the target that decodes; another than the pair's own where that was allowed.
        captured: whether `generate` goes by captured rounds, see `load_pair`.

    Raises:
        InputError: `captured` is `on` or `compiled`, and the pair cannot be.
    """

    info: dict[str, Any]
    target: CausalModel
    drafter: Drafter
    lookahead: Lookahead
    target_digest: str
    captured: str = CAPTURED_OFF

    def __post_init__(self) -> None:
        self._rounds  # noqa: B018  (what cannot be captured is refused now; nothing is captured yet)

    @functools.cached_property
    def _rounds(self) -> GrowingDecoder | None:
        return growing_decoder(self.target, self.drafter, self.lookahead, asked=self.captured)

    def serves(self, digest: str, *, precision: str, device: torch.device, attention: str) -> bool:
        """Whether its target is this one: the same weights in the same arithmetic, at the same place."""
        mine = (self.target_digest, self.target.precision, self.target.device.type, self.info["target"]["attention"])
        return mine == (digest, precision, device.type, attention)

    def prompt_tokens(self, prompt: str | list[dict[str, str]]) -> torch.Tensor:
        """Token ids of a user's message, or of a list of messages, through the chat template; int64 `[T]`.

        Raises:
            InputError: the target's tokenizer has no chat template.
        """
        messages = as_messages(prompt)
        tokenizer = self.target.tokenizer
        if tokenizer.chat_template is None:
            raise InputError(
                "the target's tokenizer has no chat template",
                where=str(self.target.folder),
                mend="add chat_template.jinja",
            )
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, device=self.target.device)

    def generate(
        self,
        prompt: str | list[dict[str, str]],
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 128,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
        traffic: TrafficLog | None = None,
        domain: str = "",
        request_id: str | None = None,
    ) -> Generated:
        """Answer losslessly: the output is the target's own. One request at a time; drafter and buffers are its own.

        By captured rounds a sampled answer follows the same law by other draws than kernel by kernel, so that one seed
        gives two answers; and its seconds by part are no measurement of this request (docs/gpu.md).

        Args:
            prompt: a user's message, or messages with `role` and `content`.
            temperature: 0 is greedy.
            max_new_tokens: longest answer.
            top_k: see `inference.sampling_settings.SamplingSettings`. With this and the next two, answers come from the
                ordinary decoder.
            top_p: likewise.
            repetition_penalty: likewise.
            seed: fixes a sampled answer.
            on_text: called with every new piece of text, for streaming.
            traffic: log that the request is added to.
            domain: of the prompt, for that log; "" where unknown.
            request_id: unique, for that log; None makes one up.

        Raises:
            InputError: no chat template, the prompt does not fit the context, or captured rounds were asked for with
                `on` and do not follow this request.
            ValueError: sampling settings out of range.
        """
        settings = SamplingSettings(
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty
        )
        stream = None if on_text is None else _TextStream(self.target, on_text)
        decoded = self._decoded(
            self.prompt_tokens(prompt),
            Request(settings=settings, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens(self.target)),
            seed=seed,
            on_tokens=None if stream is None else stream.add,
        )
        if stream is not None:
            stream.finish()
        answer = Generated(str(self.target.tokenizer.decode(decoded.tokens, skip_special_tokens=True)), decoded)
        if traffic is not None:
            record = record_from(
                decoded,
                request_id=request_id or uuid.uuid4().hex,
                pair=pair_label(self.info),
                target=self.target_digest,
                arm=str(self.info["draft"].get("name") or self.info["draft"]["kind"]),
                domain=domain,
                temperature=temperature,
                prompt=prompt,
                response=answer.text,
            )
            traffic.append(record)
        return answer

    def _decoded(
        self, prompt: torch.Tensor, request: Request, *, seed: int, on_tokens: Callable[[list[int]], None] | None
    ) -> Decoded:
        """By captured rounds where these are asked for and follow, else by the ordinary decoder."""
        if self._rounds is not None:
            decoded = self._rounds.decode(prompt, request=request, seed=seed, on_tokens=on_tokens)
            if decoded is not None:
                return decoded
        return decode(
            self.target,
            self.drafter,
            prompt,
            request=request,
            lookahead=self.lookahead,
            generator=TorchSource.seeded(seed, device=self.target.device),
            on_tokens=on_tokens,
        )


class _TextStream:
    """Hands the text of growing token ids to a listener, piece by piece."""

    def __init__(self, target: CausalModel, on_text: Callable[[str], None]) -> None:
        self._stream, self._on_text = TextStream(target.tokenizer), on_text

    def add(self, tokens: list[int]) -> None:
        """Show what the new tokens complete."""
        self._show(self._stream.add(tokens))

    def finish(self) -> None:
        """Show what is left when nothing more comes."""
        self._show(self._stream.finish())

    def _show(self, piece: str) -> None:
        if piece:
            self._on_text(piece)


def load_pair(
    folder: str | Path,
    *,
    target: str | None = None,
    device: str = "auto",
    cache: Path = DEFAULT_CACHE,
    other_target: bool = False,
    beside: Pair | None = None,
    captured: str = CAPTURED_AUTO,
) -> Pair:
    """Load a published pair from its files alone.

    Args:
        folder: a version folder, or an alias such as `champion`.
        target: where the target is here, when it is not where the pair was made: a folder or an id.
        device: see `inference.target.TargetConfig`.
        cache: where converted models are kept.
        other_target: take a target with other weights than the one the pair was made for: output is then that target's
            own, as lossless as ever, and only acceptance suffers, until the pair is re-aligned.
        beside: a pair that is loaded already; where its target is the same in the same arithmetic, it is shared.
        captured: whether its `generate` goes by captured rounds (docs/gpu.md): `auto` on a GPU, where target, draft and
            policy can be captured; `on` anywhere, on a CPU the same rounds uncaptured, and what cannot is refused;
            `compiled` likewise, with kernels fused first, which takes a minute before the first greedy and the first
            sampled answer of each length of buffers; `off` nowhere. Nothing else that decodes with the pair goes by it.

    Raises:
        InputError: the folder holds no pair, the target is not the one it was made for, the draft does not fit, or
            `captured` is `on` or `compiled` and the pair cannot be.
        ValueError: `captured` is another word.
    """
    folder = Path(folder)
    info = read_pair(folder)
    reference = info["target"]
    config = TargetConfig(path=target or reference["path"], revision=reference["revision"], device=device)
    target_folder = config.folder(Path(cache).expanduser())
    digest = target_digest(target_folder)
    if digest != reference["digest"] and other_target:
        logger.warning("the target is not the one this pair was made for: lossless all the same, but slower")
    elif digest != reference["digest"]:
        raise InputError(
            f"this target has digest {digest[:12]}, the pair was made for {reference['digest'][:12]}",
            where=str(target_folder),
            mend="use the target of the pair, re-align it (dspark realign), or allow another one",
        )
    decoding = info["decoding"]
    torch_device = config.torch_device()
    precision = decoding["precision"]
    if precision not in (offered := precisions_for(target_folder, torch_device)):
        precision = offered[0]
    attention = reference["attention"]
    if beside is not None and beside.serves(digest, precision=precision, device=torch_device, attention=attention):
        model = beside.target
    else:
        model = load_target(target_folder, precision=precision, device=torch_device, attention=attention)
    drafter = load_drafter(LoadContext(folder / "draft", target_folder, model, precision, torch_device))
    lookahead = load_lookahead(
        decoding["lookahead"], measured=lambda: _measured(info, config, Path(cache).expanduser(), precision)
    )
    _check_tree(lookahead, drafter)
    return Pair(info, model, drafter, lookahead, digest, captured)


def _check_tree(lookahead: Lookahead, drafter: Drafter) -> None:
    """Refuse a tree that the draft cannot propose, whatever decodes.

    Raises:
        InputError: it cannot.
    """
    tree = tree_of(lookahead)
    if tree is None:
        return
    try:
        if not isinstance(drafter, FeatureDrafter) or not can_be_captured(drafter):
            raise ValueError("this draft proposes no trees")
        drafter.network.check_tree(tree)
    except ValueError as error:
        raise InputError(f"the tree is off: {error}", where=PAIR_FILE, mend="publish the pair again") from None


def load_lookahead(settings: dict[str, Any], *, measured: Callable[[], Measured | None] = lambda: None) -> Lookahead:
    """Build a policy from the settings in `pair.json`; 0 tokens means that nothing is proposed. A fixed one may have a
    tree for greedy captured rounds, under `tree`, and have it for sampled ones too, by `tree_when_sampled`.

    Args:
        settings: of the policy.
        measured: of the draft; asked only by a policy that weighs tokens against seconds.

    Raises:
        InputError: unknown kind, settings that it does not take, or measurements that it lacks.
    """
    try:
        if settings["tokens"] == 0:
            return FixedLookahead(0)
        module = plugin("inference.lookahead", settings["kind"])
        others = {TREE_KEY, TREE_WHEN_SAMPLED_KEY, *_RETIRED}
        own = {key: value for key, value in settings.items() if key not in others}
        config = module.Config(**own)
        known = measured() if config.weighs_costs else None
        lookahead: Lookahead = config.build(config.tokens, config.siblings, known)
        data, when_sampled = settings.get(TREE_KEY), settings.get(TREE_WHEN_SAMPLED_KEY, False)
        if not isinstance(when_sampled, bool):
            raise ValueError(f"{TREE_WHEN_SAMPLED_KEY} is {when_sampled!r}, which is neither true nor false")
        if data is not None or when_sampled:
            if not isinstance(lookahead, FixedLookahead):
                raise ValueError(f"{config.kind} has no tree")
            tree = None if data is None else Tree.from_json(data, where=PAIR_FILE)
            lookahead = FixedLookahead(
                config.tokens, siblings=config.siblings, tree=tree, tree_when_sampled=when_sampled
            )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"lookahead settings are off: {error}", where=PAIR_FILE, mend="publish the pair again"
        ) from None
    return lookahead


def _measured(info: dict[str, Any], target: TargetConfig, cache: Path, precision: str) -> Measured | None:
    """What the score measured of the draft; on another device or other libraries with passes that are measured anew.

    Drafting is then taken to have become slower or faster as a one-token pass has.
    """
    data = info["decoding"].get("measured")
    if data is None:
        return None
    measured = Measured.from_json(data, where=PAIR_FILE)
    known = info.get("cost_profile", {})
    here = (device_name(target.torch_device(), target.folder(cache)), library_versions(), precision)
    if (known.get("device"), known.get("versions"), info["decoding"]["precision"]) == here:
        return measured
    logger.info("this pair was measured on another device or other libraries; its costs are measured anew")
    return Measured(measured.costs.with_passes(device_profile(target, cache).passes[precision]), measured.conditional)
