"""GGUF by a converter: made where one is present, compared with what it was made from, never half-written."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.errors import InputError
from inference.model import CausalModel
from pipelines.exports.gguf_files import Converter, check_whole, present
from pipelines.exports.layouts._shared import WEIGHTS_FILE
from pipelines.exports.write import Export, Served, converted_from, layouts_for, write_layout
from tests.pipelines.exports.conftest import draft_for, source_of

CONVERTER = """
import sys
from gguf import GGUFWriter
from safetensors.torch import load_file
words = sys.argv
out = words[words.index("--outfile") + 1]
writer = GGUFWriter(out, "eagle3")
for name, tensor in load_file(words[1] + "/model.safetensors").items():
    if name != "t2d":
        # Rows in another order, as llama.cpp has those of queries and keys.
        values = tensor.long() if name == "d2t" else tensor.float().flip(0)
        writer.add_tensor("blk." + name, values.numpy()) if name != "d2t" else writer.add_tensor("d2t", values.numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.fixture
def converter(tmp_path: Path) -> Converter:
    """A script in the place of llama.cpp's."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER, encoding="utf-8")
    return Converter(Path(sys.executable), folder)


@pytest.fixture
def exported(target: CausalModel, tmp_path: Path) -> Path:
    folder = tmp_path / "eagle3"
    write_layout(layouts_for("eagle3")["eagle3"], source_of(draft_for(target, "eagle3", reduced=True), target), folder)
    return folder


def test_a_conversion_holds_what_it_was_made_from(converter: Converter, exported: Path, tmp_path: Path) -> None:
    converter.convert(exported, tmp_path / "draft.gguf")
    check_whole(tmp_path / "draft.gguf", exported)


@pytest.mark.parametrize("fault", ["lost", "changed"])
def test_a_lost_or_changed_tensor_is_noticed(converter: Converter, exported: Path, tmp_path: Path, fault: str) -> None:
    converter.convert(exported, tmp_path / "draft.gguf")
    tensors = load_file(exported / WEIGHTS_FILE)
    if fault == "lost":
        tensors["more.weight"] = torch.ones(3)
    else:
        tensors["fc.weight"][0, 0] += 0.5
    save_file(tensors, exported / WEIGHTS_FILE)
    with pytest.raises(InputError, match="the GGUF file is not the draft"):
        check_whole(tmp_path / "draft.gguf", exported)


def test_a_truncated_file_is_one_line(converter: Converter, exported: Path, tmp_path: Path) -> None:
    converter.convert(exported, tmp_path / "draft.gguf")
    content = (tmp_path / "draft.gguf").read_bytes()
    (tmp_path / "draft.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="GGUF"):
        check_whole(tmp_path / "draft.gguf", exported)


def test_a_converter_that_fails_leaves_nothing(converter: Converter, exported: Path, tmp_path: Path) -> None:
    (converter.folder / "convert_hf_to_gguf.py").write_text("raise KeyError('architectures')", encoding="utf-8")
    with pytest.raises(InputError, match="converter failed: KeyError: 'architectures'"):
        converter.convert(exported, tmp_path / "draft.gguf")
    assert not (tmp_path / "draft.gguf").exists()


def test_without_engines_there_is_no_converter(tmp_path: Path) -> None:
    assert present(tmp_path) is None


def export(layout: str, *, refuses: str = "", folder: str = "x") -> Export:
    return Export(layout, folder, 3, [Served("vllm", "serve", ""), Served("llama.cpp", "serve", refuses)])


def test_only_a_format_that_llama_cpp_serves_is_converted() -> None:
    reduced = export("dflash", refuses="it has no table of draft tokens")
    other = Export("dflash_speculators", "y", 3, [Served("vllm", "serve", "")])
    assert converted_from([reduced, other, export("eagle3", folder="")]) is None
    assert converted_from([reduced, export("dspark")]) == export("dspark")
