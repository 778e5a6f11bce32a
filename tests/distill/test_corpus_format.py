"""Shards on disk: what goes in comes out, and what is torn or does not fit together is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import corpus
from distill.conversation import Conversation, in_memory
from distill.corpus import Sample, read_corpus, read_shard, read_shards, shard_name, shard_written, write_shard
from inference.errors import InputError


def _sample(index: int, *, length: int, supervised: int, states: bool = True) -> Sample:
    generator = torch.Generator().manual_seed(index)
    mask = torch.zeros(length, dtype=torch.bool)
    mask[length - supervised :] = True
    return Sample(
        id=f"p{index}",
        domain="chat",
        source="made",
        split="train" if index % 2 else "validation",
        tokens=torch.randint(50_000, (length,), generator=generator),
        mask=mask,
        # Numbers that bf16 holds exactly.
        states=torch.randint(-100, 100, (supervised, 4), generator=generator).float() if states else None,
        text='line one\nline two \u2028 and "quotes" \u00e9 \x0b \x85',
    )


SAMPLES = [_sample(0, length=7, supervised=3), _sample(1, length=4, supervised=1), _sample(2, length=9, supervised=8)]


def _same(one: Conversation, other: Conversation) -> bool:
    fields = ("id", "domain", "source", "split", "text")
    if any(getattr(one, f) != getattr(other, f) for f in fields):
        return False
    states = [s if s is None else s.float() for s in (one.states, other.states)]
    equal = states[0] is states[1] or (
        states[0] is not None and states[1] is not None and torch.equal(states[0], states[1])
    )
    return equal and torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask)


@pytest.mark.parametrize("states", [True, False])
def test_a_shard_gives_back_what_was_written(tmp_path: Path, states: bool) -> None:
    samples = SAMPLES if states else [replace(s, states=None) for s in SAMPLES]
    assert not shard_written(tmp_path, 3)
    write_shard(tmp_path, 3, samples)
    assert shard_written(tmp_path, 3)
    read = read_shard(tmp_path, 3)
    assert len(read) == 3 and all(map(_same, read, samples))
    assert read[0].tokens.dtype == torch.int64 and read[0].mask.dtype == torch.bool


def test_states_of_all_tokens_but_the_first_come_back_to_their_tokens(tmp_path: Path) -> None:
    whole = [replace(s, states=torch.arange(1.0, s.tokens.shape[0])[:, None].expand(-1, 4)) for s in SAMPLES]
    write_shard(tmp_path, 0, whole)
    read = read_shard(tmp_path, 0)
    assert all(map(_same, read, whole))
    for sample in read:
        assert sample.stated.tolist() == [False] + [True] * (sample.tokens.shape[0] - 1)
        # State i predicted token i.
        for positions in (sample.mask, sample.stated, sample.mask[:6]):
            assert sample.states_of(positions)[:, 0].tolist() == positions.nonzero()[:, 0].tolist()


def test_states_of_responses_alone_are_found_by_their_tokens() -> None:
    sample = replace(SAMPLES[0], states=torch.tensor([[4.0], [5.0], [6.0]]))
    assert torch.equal(sample.stated, sample.mask)
    assert sample.states_of(sample.mask)[:, 0].tolist() == [4.0, 5.0, 6.0]
    assert sample.states_of(sample.mask & (torch.arange(7) != 5))[:, 0].tolist() == [4.0, 6.0]
    assert not replace(sample, states=None).stated.any()


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name, 0, SAMPLES)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["shard-00000.jsonl", "shard-00000.safetensors"]


def test_states_are_left_out_unless_every_sample_has_them(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, [SAMPLES[0], replace(SAMPLES[1], states=None)])
    assert [s.states for s in read_shard(tmp_path, 0)] == [None, None]


def test_a_corpus_is_its_shards_in_order(tmp_path: Path) -> None:
    for index in (1, 0):
        write_shard(tmp_path, index, [SAMPLES[index]])
    assert [s.id for s in read_corpus(tmp_path)] == ["p0", "p1"]


def test_a_write_that_is_killed_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 0, SAMPLES)
    assert not shard_written(tmp_path, 0)
    monkeypatch.undo()
    write_shard(tmp_path, 0, SAMPLES)
    assert len(read_corpus(tmp_path)) == 3


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Path of a written shard without its suffix."""
    write_shard(tmp_path, 0, SAMPLES)
    return tmp_path / shard_name(0)


@pytest.mark.parametrize("length", [0, 5, 60, -1])
def test_a_torn_token_file_is_refused(shard: Path, length: int) -> None:
    file = shard.with_suffix(".safetensors")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match=r"unreadable shard: .*: build the corpus again") as caught:
        read_shard(shard.parent, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b'{"id": "p0"', b"\xff\xfe\n", b"nonsense\n", b"[1]\n", b'{"id": "p0", "split": "train"}\n']
)
def test_a_torn_line_file_is_refused(shard: Path, content: bytes) -> None:
    shard.with_suffix(".jsonl").write_bytes(content)
    with pytest.raises(InputError, match="unreadable shard"):
        read_shard(shard.parent, 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".safetensors"])
def test_a_missing_file_is_refused(shard: Path, suffix: str) -> None:
    shard.with_suffix(suffix).unlink()
    with pytest.raises(InputError, match="unreadable shard"):
        read_shard(shard.parent, 0)


def test_lines_that_do_not_match_the_samples_are_refused(shard: Path) -> None:
    file = shard.with_suffix(".jsonl")
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    with pytest.raises(InputError, match="2 lines for 3 samples"):
        read_shard(shard.parent, 0)


@pytest.mark.parametrize(
    ("name", "rows"), [("tokens", 19), ("mask", 19), ("states", 11), ("lengths", None), ("tokens", None)]
)
def test_tensors_that_do_not_fit_together_are_refused(shard: Path, name: str, rows: int | None) -> None:
    # 7 + 4 + 9 = 20 tokens, 3 + 1 + 8 = 12 of them supervised.
    file = shard.with_suffix(".safetensors")
    tensors = load_file(file)
    if rows is None:
        del tensors[name]
    else:
        tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, file)
    with pytest.raises(InputError, match="the tensors do not fit together"):
        read_shard(shard.parent, 0)


def test_a_gap_between_shards_is_refused(tmp_path: Path) -> None:
    for index in (0, 2):
        write_shard(tmp_path, index, SAMPLES)
    with pytest.raises(InputError, match="unreadable shard"):
        read_corpus(tmp_path)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the corpus holds no shards .*: run `dspark corpus`"):
        read_corpus(tmp_path)


# What is on disk stays there


EDGES = [
    # Without a response, and the next one's does not begin with its first token.
    _sample(3, length=6, supervised=0),
    replace(_sample(6, length=8, supervised=4), mask=torch.tensor([0, 0, 1, 0, 1, 1, 0, 1]).bool()),
    _sample(4, length=1, supervised=1),
    _sample(5, length=5, supervised=5),
]


def test_lengths_and_responses_are_known_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path, 0, SAMPLES)
    write_shard(tmp_path, 1, EDGES)
    write_shard(tmp_path, 2, [replace(s, states=None) for s in EDGES])
    read = read_corpus(tmp_path)
    monkeypatch.setattr(corpus._Files, "line", None)
    monkeypatch.setattr(corpus.StoredSample, "_rows", None)
    names = ("num_tokens", "num_response_tokens", "first_response", "split")
    for one, other in zip(read, [*SAMPLES, *EDGES, *EDGES], strict=True):
        assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    assert [s.first_response for s in read] == [4, 3, 1, 6, 2, 0, 0, 6, 2, 0, 0]
    assert [s.has_states for s in read] == [True] * 7 + [False] * 4


def test_a_stored_conversation_is_one_in_memory_once_it_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, EDGES)
    for one, other in zip(read_shard(tmp_path, 0), EDGES, strict=True):
        copy = in_memory(one, states=one.states)
        assert isinstance(copy, Sample) and _same(copy, other)
        assert torch.equal(one.stated, other.stated)
        assert torch.equal(one.states_of(one.mask).float(), other.states_of(other.mask))


def test_shards_and_the_whole_corpus_are_the_same_conversations(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, SAMPLES[:2])
    write_shard(tmp_path, 1, SAMPLES[2:])
    shards, whole = read_shards(tmp_path), read_corpus(tmp_path)
    assert [len(shard) for shard in shards] == [2, 1] and len(whole) == 3
    assert all(map(_same, [*shards[0], *shards[1]], whole))
    assert [(s.shard, s.start) for s in whole] == [(0, 0), (0, 7), (1, 0)]
    assert _same(whole[-1], SAMPLES[2]) and [s.id for s in whole[1:]] == ["p1", "p2"]
    with pytest.raises(IndexError):
        whole[3]


def test_few_shards_are_open_at_a_time_and_all_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_OPEN_FILES", 2)
    for index in range(5):
        write_shard(tmp_path, index, SAMPLES)
    read = read_corpus(tmp_path)
    assert all(map(_same, read, SAMPLES * 5))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    assert len(mapped) <= 2


def test_a_file_that_is_gone_when_it_is_asked_for_is_refused(shard: Path) -> None:
    read = read_corpus(shard.parent)
    read._files.tensors.cache_clear()
    for suffix in (".safetensors", ".jsonl"):
        shard.with_suffix(suffix).unlink()
    with pytest.raises(InputError, match="unreadable shard"):
        read[0].tokens  # noqa: B018
    with pytest.raises(InputError, match="unreadable shard"):
        read[0].text  # noqa: B018
