"""Who answers the prompts: the target itself on this machine, or a server that runs it. One module per way.

Responses are always the target's own words: a draft is trained on what the target says, not on what a data set says.
"""


def check_answers(answers: int, *, temperature: float, name: str = "corpus.answers") -> None:
    """Validate how many answers a prompt may have.

    Args:
        answers: most to one prompt.
        temperature: the highest of any answer.
        name: of the setting.

    Raises:
        ValueError: none, or several of which all would be the same.
    """
    if answers < 1:
        raise ValueError(f"{name} is {answers}: use at least 1")
    if answers > 1 and temperature == 0:
        raise ValueError(f"{name} is {answers}, but greedy answers are all the same: raise corpus.temperature")
