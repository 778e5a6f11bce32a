"""What a client is told when a request is not answered: OpenAI's error object and a status."""

from typing import Any


class ApiError(Exception):
    """A request that is not answered, and why.

    Args:
        status: HTTP status.
        message: what is wrong and, where it is the client's to mend, how.
        param: the field concerned.
        code: a word that programs can go by.
        retry_after_s: seconds after which another try may succeed; None says nothing of that.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {"Retry-After": str(retry_after_s)} if retry_after_s else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        return {
            "error": {"message": self.message, "type": kind_of(self.status), "param": self.param, "code": self.code}
        }


def kind_of(status: int) -> str:
    """OpenAI's word for a group of statuses."""
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that asks for what cannot be had, status 400."""
    return ApiError(400, message, param=param, code=code)
