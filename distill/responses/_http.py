"""A JSON client that does not give up easily: retries, exponential backoff, Retry-After. It knows no conversations.

The key travels in one header. It is never logged, stored or shown in an error, not even when the server repeats it.
"""

import json
import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from inference.errors import InputError

log = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")

RETRIED_STATUS = (408, 409, 425, 429)  # and every 5xx: the same request may succeed later
MAX_BACKOFF_S = 60.0
MAX_RETRY_AFTER_S = 600.0  # a server that asks for more is not worth waiting for unseen
GARBLED = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)  # what parsing may raise


class _Retry(Exception):
    """An attempt failed in a way that another may not: what happened, and how long the server asked to wait."""

    def __init__(self, what: str, *, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.wait_s = wait_s


@dataclass
class JsonClient:
    """One pool of connections, shared by all threads. Use it as a context manager."""

    base_url: str
    key: str = field(repr=False)
    """Bearer token, "" for none."""
    connections: int
    retries: int
    timeout_s: float
    backoff_s: float
    stopped: threading.Event = field(default_factory=threading.Event, repr=False)
    """Set: nobody waits for a retry any more."""

    def __post_init__(self) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for every request, thousands of them
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=self.timeout_s,
            limits=httpx.Limits(max_connections=self.connections, max_keepalive_connections=self.connections),
        )

    def __enter__(self) -> "JsonClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def request(
        self, method: str, path: str, *, body: Any = None, parse: Callable[[Any], Parsed], jitter: random.Random
    ) -> Parsed:
        """Send a request and return its parsed JSON answer; retry, back off and give up as configured.

        Args:
            method: GET or POST.
            path: below the base address.
            body: sent as JSON; None for no body.
            parse: turns the JSON value into the result; whatever of GARBLED it raises counts as a garbled answer.
            jitter: shortens waits at random, so that requests refused together do not come back together.

        Raises:
            InputError: the server rejected the request, or every attempt failed.
        """
        url = f"{self.base_url.rstrip('/')}/{path}"
        attempts = self.retries + 1
        for attempt in range(1, attempts + 1):
            try:
                return parse_json(self._attempt(method, url, body=body), parse)
            except _Retry as failure:
                if attempt == attempts or self.stopped.is_set():
                    raise InputError(
                        f"{failure} ({attempt} attempt{'s' if attempt > 1 else ''})",
                        where=url,
                        mend="check that the server runs and base_url is right, or raise retries or timeout_s",
                    ) from failure
                backoff = min(self.backoff_s * 2 ** (attempt - 1), MAX_BACKOFF_S) * jitter.uniform(0.5, 1.0)
                delay = max(backoff, failure.wait_s)
                log.warning("%s: %s; attempt %d of %d in %.1f s", url, failure, attempt + 1, attempts, delay)
                self.stopped.wait(delay)
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, method: str, url: str, *, body: Any) -> bytes:
        """Send one request; return the body of a good answer."""
        try:
            response = self._http.request(method, url, json=body)
        except httpx.TimeoutException as error:
            raise _Retry(f"the server did not answer within {self.timeout_s:g} s") from error
        except httpx.ConnectError as error:
            raise _Retry(f"cannot connect to the server ({error})") from error
        except httpx.TransportError as error:
            raise _Retry(f"the connection broke ({type(error).__name__})") from error
        except httpx.DecodingError as error:
            raise _Retry("the server's answer is compressed in a way that cannot be undone") from error
        status = response.status_code
        if status in RETRIED_STATUS or status >= 500:
            raise _Retry(f"the server answered {status}{self._said(response)}", wait_s=retry_after_s(response.headers))
        if status != 200:
            raise InputError(f"the server answered {status}{self._said(response)}", where=url, mend=_mend(status))
        return response.content

    def _said(self, response: httpx.Response) -> str:
        """Return the start of the server's own message, without the key if the server repeats it."""
        text = response.text.replace(self.key, "***") if self.key else response.text
        text = " ".join(text.split())[:200]
        return f", saying: {text}" if text else ""


def parse_json(content: bytes, parse: Callable[[Any], Parsed]) -> Parsed:
    """Parse an answer; one that is no JSON, or not the JSON expected, may be better next time."""
    try:
        return parse(json.loads(content))
    except GARBLED as error:
        raise _Retry(f"the server's answer is not the JSON expected ({type(error).__name__}: {error})"[:200]) from error


def retry_after_s(headers: httpx.Headers) -> float:
    """Return how long the server asks to wait, in seconds (given as a number or a date), 0 if it does not say."""
    header = headers.get("Retry-After", "").strip()
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S)


def _mend(status: int) -> str:
    if status in (401, 403):
        return "put a valid key into an environment variable and its name into corpus.api_key_env"
    if status == 404:
        return "check corpus.base_url (it ends in /v1 for most servers) and corpus.model"
    if 300 <= status < 400:
        return "set corpus.base_url to the address it redirects to"
    return "check corpus.model, corpus.max_new_tokens and the length of the prompts"
