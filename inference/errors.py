"""The one exception for a user's mistake: what is wrong, where, and how to mend it, in one line."""


class InputError(Exception):
    """Bad input from outside: a file, a setting, a server, a full disk.

    The command line prints it as one line and exits with code 2; it never shows a traceback for it.

    Args:
        what: what is wrong, with the value that was found.
        where: the file, line, field or server concerned.
        mend: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        place = f" [{where}]" if where else ""
        remedy = f": {mend}" if mend else ""
        super().__init__(" ".join(f"{what}{place}{remedy}".split()))


def first_line(error: BaseException) -> str:
    """What an exception says, in its first line, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
