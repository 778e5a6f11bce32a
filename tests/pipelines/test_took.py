"""The table of stages: what each took, and how fast a draft was trained."""

from pipelines.took import stage_rows

TOOK = {"seconds": 12.34, "resident_bytes": 300 * 2**20, "device_bytes": 0, "since_start": False}


def test_a_training_says_its_speed_in_the_last_column() -> None:
    speed = {"steps_per_s": 20.94, "tokens_per_s": 12_345.6}
    stages = {
        "corpus": TOOK,
        "build: dspark": {**TOOK, "training": {**speed, "mfu": 0.2123}, "resumed": True},
        "build: pruned": {**TOOK, "training": speed},
    }
    header, rows = stage_rows(stages)
    assert header[-1] == "note"
    assert [row[-1] for row in rows] == [
        "",
        "after its last resume; 20.9 steps/s, 12,346 supervised tokens/s, MFU 21.2%",
        "20.9 steps/s, 12,346 supervised tokens/s",
    ]
