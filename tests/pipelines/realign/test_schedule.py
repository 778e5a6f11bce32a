"""The examples for timers say what a timer can read, and commands that dspark knows."""

import configparser
import re
import shlex
from pathlib import Path

import yaml

from pipelines.composition import choices
from pipelines.config import EXTRA

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "schedule"
FIELD = r"(\*|\d+)(/\d+)?(-\d+)?(,\d+)*"


def checked(command: str) -> None:
    """The dspark command in a line of a shell is a stage with overrides of known groups."""
    words = shlex.split(command)
    rest = next(
        words[i + 2 :] for i, word in enumerate(words[:-1]) if word.endswith("dspark") and words[i + 1] in EXTRA
    )
    overrides = [word.rstrip(";") for word in rest if re.fullmatch(r"[a-z_.]+=\S+", word)]
    overrides = [word for word in overrides if not word.startswith("code=")]
    assert overrides
    assert {word.partition(".")[0] for word in overrides} <= {*choices(), "paths"}


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((FOLDER / name).read_text(encoding="utf-8"))
    return parser


def test_the_service_runs_a_known_command_and_takes_its_exit_codes() -> None:
    service = unit("dspark-realign.service")["Service"]
    checked(service["ExecStart"])
    assert service["Type"] == "oneshot"
    assert service["SuccessExitStatus"].split() == ["3", "4"]


def test_the_timer_fires_and_is_installed() -> None:
    timer = unit("dspark-realign.timer")
    assert timer["Timer"]["OnCalendar"] == "hourly"
    assert timer["Install"]["WantedBy"] == "timers.target"


def test_the_crontab_has_five_fields_and_a_known_command() -> None:
    lines = [line for line in (FOLDER / "crontab").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert len(lines) == 1
    *fields, command = lines[0].split(maxsplit=5)
    assert len(fields) == 5 and all(re.fullmatch(FIELD, field) for field in fields)
    checked(command)


def test_the_cron_job_forbids_two_at_once_and_runs_a_known_command() -> None:
    job = yaml.safe_load((FOLDER / "cronjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    assert all(re.fullmatch(FIELD, field) for field in job["spec"]["schedule"].split())
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    checked(container["args"][0])
