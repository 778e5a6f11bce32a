"""Stores fail now and then: what is worth another try, and how it is said in one line when no try helps."""

import re
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from inference.errors import InputError, first_line

Output = TypeVar("Output")

TRIES = 3
BACKOFF_S = 1.0
"""Seconds before the second try; twice as many before each one after it."""
_NO_USE = (ImportError, FileNotFoundError, PermissionError)
"""What another try cannot mend."""
_OUR_FAULT = (TypeError, AttributeError, AssertionError, LookupError)
"""What no store is to blame for."""
_SECRET = re.compile(r"(?<=://)[^/@\s]+@|\?[^\s?]*=\S*")


def shown(where: str) -> str:
    """An address without the password or the signature that may be in it."""
    return _SECRET.sub("", where)


def retried(action: Callable[[], Output], *, where: str) -> Output:
    """Do something that a network may break, up to three times.

    Raises:
        InputError: it failed every time, or in a way that another try does not mend.
    """
    for attempt in range(TRIES):
        try:
            return action()
        except (InputError, *_OUR_FAULT):
            raise
        except Exception as error:  # each store's library raises types of its own
            last = attempt == TRIES - 1
            if last or isinstance(error, _NO_USE) or _refused(error):
                times = f" {TRIES} times" if last else ""
                said = shown(first_line(error).replace(where, shown(where)))
                raise InputError(
                    f"the store failed{times}: {type(error).__name__}: {said}",
                    where=shown(where),
                    mend=_mend(error),
                ) from error
        time.sleep(BACKOFF_S * 2**attempt)
    raise AssertionError("the last try returns or raises")


def _refused(error: Exception) -> bool:
    """Whether a server said no in a way it will say again (4xx but not "too busy"), or the network is switched off."""
    if isinstance(error, HfHubHTTPError):
        return 400 <= error.response.status_code < 500 and error.response.status_code not in (408, 429)
    return isinstance(error, OfflineModeIsEnabled)


def _mend(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE to reach the Hub"
    if isinstance(error, (PermissionError, FileNotFoundError)) or _refused(error):
        return "check the address, and that you are logged in and may do this"
    return "run the same command again: what is there already is not moved again"
