"""What a score leaves in its folder, and reading it again. The measuring is `pipelines.score`."""

from pathlib import Path

from inference.records import Record
from inference.statistics import Scorecard, scorecards
from pipelines.files import read_json

RECORDS_FILE = "records.jsonl"
CHAINS_FILE = "chains.jsonl"
"""Records of chains, of drafts whose captured rounds were scored by trees: what requests by chains, as a server makes
them, are held against. Not there where no tree was scored."""
SCORECARD_FILE = "scorecard.json"
TABLE_FILE = "scorecard.md"
PLOT_FILE = "scorecard.png"


def read_scorecards(folder: Path) -> list[Scorecard]:
    """Recompute the scorecards of a score folder from its records."""
    data = read_json(folder / SCORECARD_FILE)
    return scorecards(read_records(folder / RECORDS_FILE), price_per_hour=data["price_per_hour"], seed=data["seed"])


def read_records(path: Path) -> list[Record]:
    """Records of a score, a torn last line left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")  # split before decoding: a torn line may end inside a character
    return [Record.from_json(line.decode("utf-8")) for line in lines[:-1] if line]
