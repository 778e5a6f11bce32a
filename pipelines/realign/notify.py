"""Decisions told to others: a webhook, and the run's tracker. Neither can stop a re-alignment."""

import logging
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

import httpx

from pipelines.files import plain
from pipelines.realign.cycle import PROMOTED, Ended
from train.trackers import guarded

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0


def post(url: str, event: dict[str, Any]) -> bool:
    """Post an event as JSON; returns whether it was taken. Logs the host alone: the path is often the secret."""
    if not url:
        return False
    host = urlsplit(url).hostname or "the webhook"
    try:
        httpx.post(url, json=plain(event), timeout=_TIMEOUT_S, follow_redirects=False).raise_for_status()
    except httpx.HTTPStatusError as error:
        logger.warning("webhook: %s answered %d, the decision stands all the same", host, error.response.status_code)
        return False
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        logger.warning("webhook: %s: %s, the decision stands all the same", host, type(error).__name__)
        return False
    return True


def announce(ended: Ended, *, pair: str, url: str, tracker: Any) -> None:
    """Tell webhook and tracker how a cycle ended."""
    post(url, {"event": "realign", "pair": pair, **asdict(ended)})
    watched = guarded(tracker)
    numbers = {name: float(value) for name, value in ended.figures.items() if isinstance(value, int | float)}
    watched.log(0, {"realign/promoted": float(ended.outcome == PROMOTED), **numbers})
    watched.finish()
