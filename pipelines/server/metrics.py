"""What the server counts, as Prometheus text under vLLM's names, so that what reads vLLM's reads ours."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from inference.request import Decoded

REASONS = ("stop", "length", "abort", "error")
_LABELS = ("model_name", "engine")
_FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.5, 5.0, 10.0, 20.0, 50.0, 100.0, 300.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_WHOLE = (0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """Counters of one server. Touched by the event loop's thread alone.

    Args:
        model: name that clients ask for.
        running: requests in slots, now.
        waiting: requests that wait for one, now.
    """

    def __init__(self, model: str, *, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._registry, self._at = CollectorRegistry(), (model, "0")
        ProcessCollector(registry=self._registry)
        self._gauge("num_requests_running", "Requests in slots.", running)
        self._gauge("num_requests_waiting", "Requests that wait for a slot.", waiting)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("generation_tokens", "Tokens of answers.")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST)
        # vLLM has had two names for the time between tokens.
        self._between = [
            self._histogram(name, "Between tokens; a round's time is shared by its tokens.", _BETWEEN)
            for name in ("time_per_output_token_seconds", "inter_token_latency_seconds")
        ]
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", _WHOLE)
        self._success = Counter(
            "vllm:request_success", "Requests that have ended.", (*_LABELS, "finished_reason"), registry=self._registry
        )
        for reason in REASONS:
            self._success.labels(*self._at, reason)
        self._drafts = self._counter("spec_decode_num_drafts", "Rounds that proposed tokens.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Tokens proposed.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Proposed tokens that stood.")
        self._by_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Proposed tokens that stood, by position from 0.",
            (*_LABELS, "position"),
            registry=self._registry,
        )
        self._versions = Gauge("dspark:pair_info", "The version that serves.", ("version",), registry=self._registry)
        self._reloads = Counter("dspark:reloads", "New versions seen.", ("outcome",), registry=self._registry)

    def prompt(self, tokens: int) -> None:
        """A request was taken."""
        self._prompt.inc(tokens)

    def emitted(self, tokens: int, *, since_s: float, first: bool) -> None:
        """A round emitted tokens, so long after arrival if they are the first, else after the round before."""
        self._generated.inc(tokens)
        if first:
            self._first.observe(since_s)
            return
        for histogram in self._between:
            for _ in range(tokens):
                histogram.observe(since_s / tokens)

    def ended(self, reason: str, *, seconds: float) -> None:
        """A request has ended."""
        self._success.labels(*self._at, reason).inc()
        self._whole.observe(seconds)

    def decoded(self, result: Decoded) -> None:
        """What speculation made of a request that has left its engine."""
        self._drafts.inc(sum(rounds for length, rounds in result.blocks.items() if length))
        self._drafted.inc(sum(length * rounds for length, rounds in result.blocks.items()))
        self._accepted.inc(sum(result.accepted))
        for position, stood in enumerate(result.accepted):
            self._by_position.labels(*self._at, str(position)).inc(stood)

    def version(self, label: str) -> None:
        """Another version serves."""
        self._versions.clear()
        self._versions.labels(label).set(1)

    def reloaded(self, outcome: str) -> None:
        """A new version was seen, and taken or refused."""
        self._reloads.labels(outcome).inc()

    def text(self) -> bytes:
        """As `/metrics` answers."""
        return generate_latest(self._registry)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(f"vllm:{name}", documentation, _LABELS, registry=self._registry).labels(*self._at)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        whole = Histogram(f"vllm:{name}", documentation, _LABELS, registry=self._registry, buckets=buckets)
        return whole.labels(*self._at)

    def _gauge(self, name: str, documentation: str, read: Callable[[], int]) -> None:
        gauge = Gauge(f"vllm:{name}", documentation, _LABELS, registry=self._registry).labels(*self._at)
        gauge.set_function(lambda: float(read()))
