"""Features on disk come back by sample and by layer, damaged files are refused, and captured ones are the model's."""

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.corpus import Sample, read_corpus, read_shards, write_shard
from distill.features import (
    FeatureShards,
    bytes_per_token,
    capture_features,
    feature_bytes,
    features_path,
    kept_taps,
    write_features,
)
from distill.prompts import Prompt
from distill.responses._context import AnswerContext
from distill.responses.local import Config
from inference.attention import use_grouped_attention
from inference.batch.responses import answer_all
from inference.errors import InputError
from inference.generation import Response
from inference.taps import EMBEDDING
from tests.inference.families import VOCAB, family_model

TAPS = [2, 5, 11]
HIDDEN = 4
LENGTHS = [[3, 7], [5], [2, 4, 6]]


def _sample(identity: str, length: int, *, states: Tensor | None = None) -> Sample:
    generator = torch.Generator().manual_seed(length)
    mask = torch.arange(length) >= length // 2
    return Sample(
        id=identity,
        domain="chat",
        source="made",
        split="train",
        tokens=torch.randint(VOCAB, (length,), generator=generator),
        mask=mask,
        states=states,
        text="",
    )


def _written(folder: Path, *, taps: list[int] = TAPS) -> tuple[list[list[Sample]], dict[str, Tensor]]:
    """Shards of several conversations on disk; their samples and their features by id."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    shards, features = [], {}
    for index, lengths in enumerate(LENGTHS):
        shard = [_sample(f"{index}-{place}", length) for place, length in enumerate(lengths)]
        rows = [torch.randn(length, len(taps) * HIDDEN, generator=generator) for length in lengths]
        write_features(folder, index, rows, taps)
        shards.append(shard)
        features |= {sample.id: row.bfloat16() for sample, row in zip(shard, rows, strict=True)}
    return shards, features


def test_features_come_back_by_sample_whatever_shard_they_are_in(tmp_path: Path) -> None:
    shards, features = _written(tmp_path)
    kept = FeatureShards(tmp_path, shards, taps=TAPS)
    for sample in reversed([sample for shard in shards for sample in shard]):
        assert torch.equal(kept.of(sample), features[sample.id])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"shard-0000{index}.features.safetensors" for index in range(3)
    ]


@pytest.mark.parametrize("taps", [[5], [2, 11], [11, 2], [11, 5, 2], [5, 2, 11]])
def test_any_choice_of_layers_comes_back_in_the_order_asked_for(tmp_path: Path, taps: list[int]) -> None:
    shards, features = _written(tmp_path)
    kept = FeatureShards(tmp_path, shards, taps=taps)
    for sample in (sample for shard in shards for sample in shard):
        layers = dict(zip(TAPS, features[sample.id].split(HIDDEN, dim=1), strict=True))
        assert torch.equal(kept.of(sample), torch.cat([layers[tap] for tap in taps], dim=1))


def test_on_the_cpu_nothing_is_made_resident(tmp_path: Path) -> None:
    shards, features = _written(tmp_path)
    kept = FeatureShards(tmp_path, shards, taps=TAPS).resident(torch.device("cpu"))
    assert torch.equal(kept.of(shards[2][1]), features["2-1"])


def test_a_shard_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    shards, _ = _written(tmp_path)
    for index, shard in enumerate(shards):
        write_features(tmp_path, index, [torch.full((s.tokens.shape[0], HIDDEN), 1.5) for s in shard], [0])
    kept = FeatureShards(tmp_path, shards, taps=[0])
    assert kept.of(shards[1][0]).tolist() == [[1.5] * HIDDEN] * 5
    assert kept_taps(tmp_path) == [0]


def test_compressed_features_come_back_within_half_a_step(tmp_path: Path) -> None:
    shards, _ = _written(tmp_path / "plain")
    generator = torch.Generator().manual_seed(2)
    rows = {}
    for index, shard in enumerate(shards):
        # One number of a layer may be many times the others; what that costs stays within its layer and token.
        wild = [torch.randn(s.tokens.shape[0], len(TAPS) * HIDDEN, generator=generator) for s in shard]
        for row in wild:
            row[0, 0] = 3000.0
        wild[0][-1] = 0.0
        write_features(tmp_path, index, wild, TAPS, compressed=True)
        rows |= {sample.id: row for sample, row in zip(shard, wild, strict=True)}
    for taps in (TAPS, [TAPS[2], TAPS[0]]):
        kept = FeatureShards(tmp_path, shards, taps=taps)
        for sample in (sample for shard in shards for sample in shard):
            layers = dict(zip(TAPS, rows[sample.id].split(HIDDEN, dim=1), strict=True))
            got = kept.of(sample).float().split(HIDDEN, dim=1)
            for tap, layer in zip(taps, got, strict=True):
                step = layers[tap].abs().amax(-1, keepdim=True) / 127
                # Half a step, and bf16's own rounding.
                assert bool(((layer - layers[tap]).abs() <= 0.5 * step + layers[tap].abs() / 128 + 1e-6).all())
    stored = load_file(features_path(tmp_path, 2)).values()
    tokens = sum(LENGTHS[2])
    size = feature_bytes(tokens=tokens, hidden=HIDDEN, num_taps=len(TAPS), compressed=True)
    assert sum(tensor.nbytes for tensor in stored) == size
    plain, _ = bytes_per_token(tokens=10, stated=5, hidden=576, num_taps=5)
    small, theirs = bytes_per_token(tokens=10, stated=5, hidden=576, num_taps=5, compressed=True)
    # 2,900 and 5,760 for the layers, 576 for the states, 5 for token and mask; DeepSpec's cache takes 6,918.
    assert (small, plain, theirs) == (2900 + 576 + 5, 5760 + 576 + 5, 6918.0)


def test_features_of_conversations_on_disk_are_found_by_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.features._OPEN_FILES", 1)
    shards, features = _written(tmp_path)
    for index, shard in enumerate(shards):
        write_shard(tmp_path, index, shard)
    kept = FeatureShards(tmp_path, read_shards(tmp_path), taps=TAPS)
    # Whoever opened the corpus, and in any order.
    for sample in (*read_corpus(tmp_path), *read_corpus(tmp_path)[::-1]):
        assert torch.equal(kept.of(sample), features[sample.id])
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    assert len([name for name in mapped if ".features." in name]) <= 1


# What is refused


def _refused(folder: Path, shards: list[list[Sample]], message: str, *, taps: list[int] = TAPS, shard: int = 1) -> None:
    with pytest.raises(InputError, match=message) as caught:
        FeatureShards(folder, shards, taps=taps)
    assert f"[{features_path(folder, shard)}]: build the corpus again" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    shards, _ = _written(tmp_path)
    features_path(tmp_path, 1).unlink()
    _refused(tmp_path, shards, "unreadable features")


@pytest.mark.parametrize("left", [0, 4, 60, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, left: int) -> None:
    shards, _ = _written(tmp_path)
    path = features_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:left])
    _refused(tmp_path, shards, "unreadable features")


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"features": torch.zeros(5, 12)}, None),
        ({"features": torch.zeros(5, 12)}, {"layers": "[2, 5, 11]"}),
        ({"features": torch.zeros(5, 12)}, {"taps": "2, 5"}),
        ({"features": torch.zeros(60)}, {"taps": "[2, 5, 11]"}),
        ({"states": torch.zeros(5, 12)}, {"taps": "[2, 5, 11]"}),
    ],
)
def test_a_file_of_another_make_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    shards, _ = _written(tmp_path)
    save_file(tensors, features_path(tmp_path, 1), metadata)
    _refused(tmp_path, shards, "unreadable features")


def test_features_of_other_tokens_are_refused(tmp_path: Path) -> None:
    shards, _ = _written(tmp_path)
    shards[1] = [_sample("1-0", 6)]
    _refused(tmp_path, shards, r"features of 5 tokens and layers \[2, 5, 11\], wanted 6 and \[2, 5, 11\]")


def test_layers_that_were_not_kept_are_refused(tmp_path: Path) -> None:
    shards, _ = _written(tmp_path)
    _refused(tmp_path, shards, r"layers \[2, 5, 11\], wanted 10 and \[2, 3\]", taps=[2, 3], shard=0)
    # One shard of another run among them.
    write_features(tmp_path, 2, [torch.zeros(12, HIDDEN)], [2])
    _refused(tmp_path, shards, r"features of 12 tokens and layers \[2\]", shard=2)


# What a folder holds, and how much


def test_a_folder_tells_which_layers_it_holds(tmp_path: Path) -> None:
    assert kept_taps(tmp_path) == [] == kept_taps(tmp_path / "nothing")
    _written(tmp_path, taps=[7, -1])
    assert kept_taps(tmp_path) == [7, -1]
    path = features_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="unreadable features"):
        kept_taps(tmp_path)


def test_the_bytes_foretold_are_the_bytes_written(tmp_path: Path) -> None:
    _written(tmp_path)
    tokens = sum(LENGTHS[2])
    (features,) = load_file(features_path(tmp_path, 2)).values()
    assert features.nbytes == feature_bytes(tokens=tokens, hidden=HIDDEN, num_taps=len(TAPS))


def test_bytes_per_token_are_those_of_a_shard(tmp_path: Path) -> None:
    _written(tmp_path)
    shard = [_sample(str(n), n, states=torch.zeros(n - n // 2, HIDDEN)) for n in LENGTHS[2]]
    write_shard(tmp_path, 2, shard)
    stored = load_file(tmp_path / "shard-00002.safetensors") | load_file(features_path(tmp_path, 2))
    stored.pop("lengths")  # one number a conversation
    tokens, supervised = sum(LENGTHS[2]), sum(int(sample.mask.sum()) for sample in shard)
    ours, theirs = bytes_per_token(tokens=tokens, stated=supervised, hidden=HIDDEN, num_taps=len(TAPS))
    assert ours * tokens == pytest.approx(sum(tensor.nbytes for tensor in stored.values()))
    # Three layers and the last state of 4 numbers in 2 bytes, an int32 token, two masks of a byte.
    assert theirs == 4 * 4 * 2 + 4 + 2


# What they are


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "phi", "gpt2"])
@pytest.mark.parametrize("taps", [[0, 1], [1, EMBEDDING]])
def test_captured_features_are_the_models_hidden_states(name: str, taps: list[int]) -> None:
    # transformers norms the last layer's output, so no tap is the last of the three.
    layers = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    model = family_model(name, num_hidden_layers=3, **(layers if name == "gemma3_text" else {}))
    sample = _sample("p", 14)
    features = capture_features(model, sample, taps)
    with torch.inference_mode():
        states = model.model(input_ids=sample.tokens[None], output_hidden_states=True, use_cache=False).hidden_states
    assert features.dtype == torch.bfloat16 and features.shape == (14, 2 * 32)
    assert not features.is_inference()
    expected = torch.cat([states[tap + 1][0] for tap in taps], dim=1)
    torch.testing.assert_close(features.double(), expected, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("stops", ["", string.ascii_letters], ids=["long answers", "short answers"])
def test_every_turn_of_a_conversation_has_features(
    chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, stops: str
) -> None:
    """A row per token, also where a stop token was taken back before the next turn."""
    written = 0

    def counted(*args: Any, **options: Any) -> list[Response]:
        nonlocal written
        responses = answer_all(*args, **options)
        written += sum(len(response.tokens) for response in responses)
        return responses

    monkeypatch.setattr("inference.answers.answer_all", counted)
    model = family_model("llama", vocab_size=len(chatml), max_position_embeddings=512)
    use_grouped_attention(model.model)
    vocabulary = chatml.get_vocab()
    ids = frozenset(vocabulary[token] for token in ("<|im_end|>", *stops))
    prompts = [
        Prompt(id="a", domain="chat", source="made", turns=("one?", "two?", "three?")),
        Prompt(id="b", domain="chat", source="made", turns=("only?",), system="Be brief."),
        Prompt(id="c", domain="chat", source="made", turns=("first?", "a much longer second turn?")),
    ]
    context = AnswerContext(tokenizer=chatml, stop_tokens=ids, model=model, taps=[0, 1])
    samples = Config(temperature=1.0, max_new_tokens=12).answer(prompts, splits=["train"] * 3, context=context, seed=0)
    assert (sum(int(sample.mask.sum()) for sample in samples) < written) == bool(stops)
    for sample in samples:
        assert sample.features is not None and sample.features.shape == (sample.tokens.shape[0], 2 * 32)
        assert not bool(sample.features[-1].any())
        again = capture_features(model, sample, [0, 1])
        torch.testing.assert_close(sample.features[:-1], again[:-1], rtol=2**-7, atol=1e-9)


def test_features_are_left_out_without_taps(chatml: PreTrainedTokenizerFast) -> None:
    model = family_model("llama", vocab_size=len(chatml), max_position_embeddings=512)
    context = AnswerContext(tokenizer=chatml, stop_tokens=frozenset({0}), model=model)
    prompt = Prompt(id="a", domain="chat", source="made", turns=("one?",))
    (sample,) = Config(max_new_tokens=3).answer([prompt], splits=["train"], context=context, seed=0)
    assert sample.features is None


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (Config(keep_features=False, taps=[1]), []),
        (Config(taps=[4, 1]), [4, 1]),
        # From layer 1 to n - 3, five of them.
        (Config(), [1, 3, 5, 7, 9]),
    ],
)
def test_settings_say_which_layers_are_kept(config: Config, layers: list[int]) -> None:
    assert config.tapped_layers(12) == layers
