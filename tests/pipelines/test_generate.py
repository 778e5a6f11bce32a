"""`dspark generate` decodes as it is told to."""

from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines.generate import main
from tests.inference.test_pair_captured import made, watched, written


def test_the_command_line_goes_by_captured_rounds_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ordinary = written(made(tmp_path / "models"), tmp_path, "eagle3"), watched(monkeypatch)
    words = ["--pair", str(folder), "--device", "cpu", "--cache", str(tmp_path), "--max-new-tokens", "8", "hello"]
    capsys.readouterr()  # a library that is first imported where the model is written has something to say
    answers = []
    for captured, decoded in (("on", 0), ("compiled", 0), ("off", 1), ("auto", 2)):
        assert main(["--captured", captured, *words]) == 0
        answers.append(capsys.readouterr().out)
        assert len(ordinary) == decoded
    assert len(set(answers)) == 1
    with pytest.raises(InputError, match="captured rounds know temperatures alone"):
        main(["--captured", "on", "--top-k", "3", *words])
    with pytest.raises(SystemExit):
        main(["--captured", "yes", *words])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--captured {auto,on,off,compiled}" in capsys.readouterr().out
