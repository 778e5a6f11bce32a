"""Which folder and device a target names, what its digest covers, and what ends its answers."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from inference.errors import InputError
from inference.loading import load_causal_model
from inference.target import TargetConfig, config_shape, stop_tokens, target_digest
from tests.pipelines.tiny import tokenizer, write_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("target"), layers=1)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    return folder


def test_a_folder_is_taken_as_it_is(whole: Path, tmp_path: Path) -> None:
    assert TargetConfig(path=str(whole)).folder(tmp_path) == whole


def test_the_embedded_target_comes_out_of_the_cache(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.embedded.embedded_target", {tmp_path: whole}.__getitem__)
    assert TargetConfig().folder(tmp_path) == whole


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/at/all", r"no such model folder \[/nowhere/at/all\]: check target.path"),
        ("./nowhere", "no such model folder"),
        ("~/nowhere", "no such model folder"),
        ("a/b/c", "no such model folder"),
        ("not a name", "neither a folder nor a model id"),
        # A well-formed id; the tests are offline, so the hub cannot give it.
        ("nobody/nothing", "no such folder, and the hub did not give it"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_in_one_line(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        TargetConfig(path=path).folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config.json here"):
        TargetConfig(path=str(tmp_path)).folder(tmp_path)


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target.path is empty; use `embedded`"):
        TargetConfig(path="")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target.precision is 'fp8'; use auto or one of fp32, "):
        TargetConfig(precision="fp8")
    assert TargetConfig(precision="bf16").precision == "bf16"


def test_devices_by_name() -> None:
    assert TargetConfig(device="cpu").torch_device() == torch.device("cpu")
    assert TargetConfig().torch_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["warp", "cuda:x", "meta", ""])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(InputError, match=rf"no device '{device}' \[target.device\]: use auto, cpu or cuda"):
        TargetConfig(device=device).torch_device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(InputError, match=r"no GPU that torch can use \[target.device\]: use target.device=cpu"):
        TargetConfig(device=device).torch_device()


def test_a_target_loads_in_one_arithmetic(whole: Path, tmp_path: Path) -> None:
    model = TargetConfig(path=str(whole), device="cpu", attention="eager").load(tmp_path, precision="bf16")
    assert (model.precision, model.model.dtype) == ("bf16", torch.bfloat16)
    assert model.model.config._attn_implementation == "eager"


def test_an_unknown_attention_is_refused_in_one_line(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot load the model") as caught:
        TargetConfig(path=str(whole), device="cpu", attention="wizard").load(tmp_path, precision="fp32")
    assert "\n" not in str(caught.value)


def test_the_digest_does_not_depend_on_the_place(whole: Path, copy: Path) -> None:
    assert target_digest(whole) == target_digest(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_one_changed_byte_changes_the_digest(copy: Path, name: str) -> None:
    before = target_digest(copy)
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(bytes(content))
    assert target_digest(copy) != before


def test_files_that_decide_nothing_do_not_enter_the_digest(copy: Path) -> None:
    before = target_digest(copy)
    (copy / "README.md").write_text("words", encoding="utf-8")
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    assert target_digest(copy) == before


def test_a_new_file_and_a_new_name_enter_the_digest(copy: Path) -> None:
    digests = {target_digest(copy)}
    (copy / "added.json").write_text("{}", encoding="utf-8")
    digests.add(target_digest(copy))
    (copy / "added.json").rename(copy / "renamed.json")
    assert len(digests | {target_digest(copy)}) == 3


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, ["<|im_end|>"]), (3, ["<|im_end|>", 3]), ([3, 4], ["<|im_end|>", 3, 4])]
)
def test_answers_end_at_the_tokenizers_and_the_configured_tokens(
    copy: Path, configured: object, expected: list[object]
) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": configured}), encoding="utf-8")
    model = load_causal_model(copy, precision="fp32", device=torch.device("cpu"))
    ids = {tokenizer().convert_tokens_to_ids(t) if isinstance(t, str) else t for t in expected}
    assert stop_tokens(model) == ids


def test_shapes_ignore_names_and_versions(copy: Path) -> None:
    before = config_shape(copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config |= {"transformers_version": "9.9", "_name_or_path": "elsewhere"}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert config_shape(copy) == before
    config["hidden_size"] += 1
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert config_shape(copy) != before
