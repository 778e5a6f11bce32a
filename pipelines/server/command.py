"""`dspark serve`: OpenAI-compatible answers from a published pair."""

import argparse
import logging
import sys
from pathlib import Path

from inference.errors import InputError
from inference.pair_files import DEFAULT_CACHE
from inference.traffic import TrafficConfig
from pipelines.server.auth import TOKEN_VARIABLE, check_exposure, token_from_environment
from pipelines.server.settings import Limits, PairSettings, ServerSettings

_CHECK_PROMPT, _CHECK_TOKENS = "Why is the sky blue?", 32


def main(argv: list[str]) -> int:
    """Run the command; logs go to stderr.

    Raises:
        InputError: no pair, settings out of range, or nothing to listen on; the command line prints it.
    """
    words = _parser().parse_args(argv)
    token = token_from_environment()
    check_exposure(words.host, token=token, no_auth=words.no_auth)
    settings = _settings(words, token="" if words.no_auth else token)
    _log_to_stderr(quiet=words.quiet)
    if words.check:
        return _check(settings.pair)
    from pipelines.server.running import serve

    return serve(settings)


def _parser() -> argparse.ArgumentParser:
    limits, pair = Limits(), PairSettings(folder=Path())
    parser = argparse.ArgumentParser(
        prog="dspark serve",
        description="Answer OpenAI-compatible requests with a published pair. The output is the target's own.",
        epilog=f"The environment variable {TOKEN_VARIABLE} holds the bearer token that clients must show.",
    )
    own = parser.add_argument_group("pair")
    own.add_argument("--pair", required=True, type=Path, help="a version folder of a registry, or its champion")
    own.add_argument("--target", default=None, help="the target's folder or id here (default: as in the pair)")
    own.add_argument("--other-target", action="store_true", help="take a target with other weights than the pair's")
    own.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    own.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where converted models are kept")
    own.add_argument(
        "--lookahead",
        type=int,
        default=None,
        help="tokens proposed a round, 0 for the target alone (default: the pair's own policy)",
    )
    own.add_argument(
        "--load-costs",
        type=Path,
        default=None,
        help="load_costs.json of dspark load on this machine: a scheduled policy then weighs all running requests",
    )
    own.add_argument("--model-name", default="", help="what clients ask for (default: the pair's name)")
    own.add_argument(
        "--watch-seconds",
        type=float,
        default=limits.watch_s,
        help=f"look for a new champion so often, 0 never (default: {limits.watch_s:g})",
    )
    own.add_argument("--check", action="store_true", help="load, answer one prompt, and end")
    net = parser.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    net.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any (default: 8000)")
    net.add_argument("--no-auth", action="store_true", help="ask for no token, wherever it listens")
    net.add_argument("--open-metrics", action="store_true", help="answer /metrics without the token")
    net.add_argument("--quiet", action="store_true", help="no line for each request")
    _add_limits(parser.add_argument_group("limits"), limits, pair)
    log = parser.add_argument_group("traffic log")
    log.add_argument("--traffic", type=Path, default=None, help="log finished requests to this folder (default: no)")
    log.add_argument(
        "--traffic-text",
        choices=("keep", "hash", "drop"),
        default="hash",
        help="prompts and answers in it: as they are, as digests, or not at all (default: hash)",
    )
    return parser


def _add_limits(group: argparse._ArgumentGroup, limits: Limits, pair: PairSettings) -> None:
    group.add_argument(
        "--max-requests", type=int, default=pair.max_requests, help=f"decoded at once (default: {pair.max_requests})"
    )
    group.add_argument(
        "--max-waiting",
        type=int,
        default=limits.max_waiting,
        help=f"waiting for a slot; more get status 429 (default: {limits.max_waiting})",
    )
    group.add_argument(
        "--max-tokens", type=int, default=limits.max_tokens, help=f"longest answer (default: {limits.max_tokens})"
    )
    group.add_argument(
        "--max-prompt-tokens", type=int, default=0, help="longest prompt (default: what the context holds)"
    )
    group.add_argument(
        "--max-cache-tokens",
        type=int,
        default=None,
        help="cache positions of all running requests: slots times the longest (default: no bound but the slots)",
    )
    group.add_argument(
        "--max-body-kib",
        type=int,
        default=limits.max_body_bytes // 1024,
        help=f"largest body (default: {limits.max_body_bytes // 1024})",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=limits.timeout_s,
        help=f"seconds a request may take, waiting included (default: {limits.timeout_s:g})",
    )
    group.add_argument(
        "--slow-reader-seconds",
        type=float,
        default=limits.slow_reader_s,
        help=f"seconds a client may leave its stream unread (default: {limits.slow_reader_s:g})",
    )
    group.add_argument(
        "--drain-seconds",
        type=float,
        default=limits.drain_s,
        help=f"for running requests after SIGTERM (default: {limits.drain_s:g})",
    )


def _settings(words: argparse.Namespace, *, token: str) -> ServerSettings:
    try:
        limits = Limits(
            max_waiting=words.max_waiting,
            max_tokens=words.max_tokens,
            max_prompt_tokens=words.max_prompt_tokens,
            max_body_bytes=words.max_body_kib * 1024,
            timeout_s=words.timeout,
            slow_reader_s=words.slow_reader_seconds,
            drain_s=words.drain_seconds,
            watch_s=words.watch_seconds,
        )
        pair = PairSettings(
            folder=words.pair.expanduser(),
            target=words.target,
            device=words.device,
            cache=words.cache.expanduser(),
            other_target=words.other_target,
            lookahead=words.lookahead,
            load_costs=None if words.load_costs is None else words.load_costs.expanduser(),
            max_requests=words.max_requests,
            max_cache_tokens=words.max_cache_tokens,
        )
    except ValueError as error:
        raise InputError(str(error), mend="dspark serve --help") from None
    return ServerSettings(
        pair=pair,
        limits=limits,
        host=words.host,
        port=words.port,
        token=token,
        open_metrics=words.open_metrics,
        model_name=words.model_name,
        traffic=None if words.traffic is None else words.traffic.expanduser(),
        traffic_config=TrafficConfig(text=words.traffic_text),
    )


def _log_to_stderr(*, quiet: bool) -> None:
    """Our own loggers and uvicorn's, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name, level in (
        ("pipelines", logging.INFO),
        ("inference", logging.INFO),
        ("dspark.access", logging.WARNING if quiet else logging.INFO),
        ("uvicorn", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _check(settings: PairSettings) -> int:
    """Load the pair and answer one prompt; the text goes to stdout."""
    from inference.randomness import TorchSource
    from inference.request import Request
    from inference.sampling_settings import SamplingSettings
    from pipelines.server.versions import load_version

    version = load_version(settings)
    pair = version.pair
    prompt = pair.prompt_tokens(_CHECK_PROMPT)
    request = Request(settings=SamplingSettings(), max_new_tokens=_CHECK_TOKENS, stop_tokens=version.stops)
    handle = version.engine.submit(prompt, request, generator=TorchSource.seeded(0, device=prompt.device))
    while not version.engine.idle:
        version.engine.step()
    sys.stdout.write(str(pair.target.tokenizer.decode(handle.result.tokens, skip_special_tokens=True)) + "\n")
    sys.stderr.write(f"[{version.label}: {len(handle.result.tokens)} tokens, tau {handle.result.tau:.2f}]\n")
    return 0
