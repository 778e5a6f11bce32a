"""What ends a run although its input was good: the measurements or the files contradict themselves."""


class StageFailed(RuntimeError):
    """A stage refuses its own result. The command line prints the message as one line and exits with code 1."""


class ChampionKept(RuntimeError):
    """A re-alignment ran and kept the champion. The command line prints the message as one line, exit code 3."""
