"""The exceptions that become one line for the user: what is wrong, where, and how to mend it."""


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
        super().__init__(one_line(what, where=where, mend=mend))


class ProcessLost(Exception):
    """Another process of this run ended or does not answer, so that this one cannot go on: no mistake of the user's.

    The command line prints it as one line and exits with code 1.

    Args:
        what: what happened.
        where: which processes are concerned.
        mend: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        super().__init__(one_line(what, where=where, mend=mend))


def one_line(what: str, *, where: str, mend: str) -> str:
    """`what [where]: mend`, without line breaks."""
    place = f" [{where}]" if where else ""
    remedy = f": {mend}" if mend else ""
    return " ".join(f"{what}{place}{remedy}".split())


def first_line(error: BaseException) -> str:
    """What an exception says, in its first line, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
