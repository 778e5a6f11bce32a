"""Who may ask: a bearer token from the environment, compared in constant time, and never written anywhere."""

import hmac
import os
from collections.abc import Iterable

from inference.errors import InputError

TOKEN_VARIABLE = "DSPARK_API_KEY"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def token_from_environment() -> str:
    """The token, "" where none is set.

    Raises:
        InputError: it is set to what no header can carry.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token.isascii() or any(letter.isspace() or not letter.isprintable() for letter in token):
        raise InputError(
            "the token holds blanks or letters beyond ASCII",
            where=TOKEN_VARIABLE,
            mend="use letters, digits and signs, as from: openssl rand -hex 32",
        )
    return token


def check_exposure(host: str, *, token: str, no_auth: bool) -> None:
    """Refuse to listen beyond this machine without a token, unless that is asked for.

    Raises:
        InputError: it would.
    """
    if host not in _LOOPBACK and not token and not no_auth:
        raise InputError(
            f"listening on {host} without a token lets anyone in",
            where="--host",
            mend=f"set {TOKEN_VARIABLE}, or give --no-auth",
        )


def is_allowed(headers: Iterable[tuple[bytes, bytes]], *, token: str) -> bool:
    """Whether a request shows the token.

    Args:
        headers: names in lower case.
        token: that is expected, not empty.
    """
    shown = [value for name, value in headers if name == b"authorization"]
    if len(shown) != 1:
        return False
    scheme, _, word = shown[0].partition(b" ")
    return hmac.compare_digest(word.strip(), token.encode("ascii")) and scheme.lower() == b"bearer"
