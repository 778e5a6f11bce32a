"""Write a version's `serve/` folder: its draft in every format that fits it, and how each engine is started with it.

    python -m pipelines.exports.write registry/smollm2-135m/v1 --out serve

The publish stage runs it in a process of its own, so that no model stays in memory there.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from inference.embedded import FOLDER_NAME
from inference.errors import InputError
from inference.feature_networks._checkpoint import load_network
from inference.loading import load_causal_model
from inference.pair_files import DEFAULT_CACHE, PAIR_FILE, read_draft_spec, read_pair
from inference.plugins import plugins
from inference.statistics import BASELINE
from inference.target import EMBEDDED, TargetConfig, target_digest
from pipelines.exports import gguf_files, independent, layouts, without_files
from pipelines.exports.layouts._shared import CONFIG_FILE, WEIGHTS_FILE, stored
from pipelines.exports.source import Source, model_folder
from pipelines.exports.tables import SPS_FILE, STS_FILE, sglang_steps, sglang_temperatures
from pipelines.files import fsync_tree, read_json, sha256_file, write_json, write_text, writing

SERVE_FOLDER, EXPORTS_FILE, README_FILE = "serve", "exports.json", "README.md"
SCHEMA_VERSION = 1
_DEFAULT_TOKENS = 4


@dataclass(frozen=True)
class Served:
    """How one engine serves an export.

    Attributes:
        engine: its name.
        command: that starts it; empty where it refuses.
        refuses: why it cannot serve this draft; empty where it can.
        tried: the version it was tried with, and how; empty for not at all.
    """

    engine: str
    command: str
    refuses: str
    tried: str = ""


@dataclass(frozen=True)
class Export:
    """One format of the draft.

    Attributes:
        layout: its name.
        folder: below `serve/`; empty where the format has no files.
        tokens: proposed a round.
        engines: that load it.
        files: digests of its files.
    """

    layout: str
    folder: str
    tokens: int
    engines: list[Served]
    files: dict[str, str] = field(default_factory=dict)


def write_exports(
    version: Path,
    out: Path,
    *,
    cache: Path,
    target: str | None = None,
    device: str = "auto",
    only: Sequence[str] = (),
    draft: Path | None = None,
) -> list[Export]:
    """Write all formats of a version's draft into a folder that is not there yet.

    Args:
        version: holds `pair.json` and `draft/`.
        out: appears when everything is in it.
        cache: where converted models are kept.
        target: folder or id, when it is not where the pair was made.
        device: see `inference.target.TargetConfig`.
        only: names of layouts; empty for all that fit.
        draft: folder of another draft for the same target; None for the version's own.

    Raises:
        InputError: no pair, another target, an unknown layout, or `out` is there or cannot be written.
    """
    if out.exists():
        raise InputError("it is there already", where=str(out), mend="name a folder that is not")
    info = read_pair(version)
    folder, kind = model_folder(version / "draft" if draft is None else draft)
    aside = out.with_name(f".partial-{out.name}")
    with writing(out):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        place = _Place(cache, target, device)
        exports = _exports(info, folder, kind, aside, place, only)
        exports += _gguf(info, aside, exports, place, only)
        _write_tables(info, aside, exports)
        write_json(aside / EXPORTS_FILE, _listing(info, kind, exports))
        write_text(aside / README_FILE, readme(info, exports))
        fsync_tree(aside)
        os.rename(aside, out)
    return exports


@dataclass(frozen=True)
class _Place:
    """Where models are and run."""

    cache: Path
    target: str | None
    device: str


def _exports(
    info: dict[str, Any], draft: Path, kind: str, aside: Path, place: _Place, only: Sequence[str]
) -> list[Export]:
    spec = read_draft_spec(draft)
    tokens = int(info["decoding"]["lookahead"].get("tokens") or _DEFAULT_TOKENS)
    if kind == "feature":
        return _feature_exports(info, draft, aside, place, only)
    if kind == "model":
        _check_known(only, [independent.NAME])
        independent.write_model_folder(draft, aside / independent.NAME)
        return [_listed(independent.NAME, aside, tokens, independent.ENGINES, None)]
    if kind not in without_files.KINDS:
        return [_loaded_by_nobody(kind, tokens)]
    tokens = 0 if kind == BASELINE else tokens
    return [Export(kind, "", tokens, _served(without_files.KINDS[kind](spec), None, tokens))]


def _loaded_by_nobody(kind: str, tokens: int) -> Export:
    nobody = Served("vllm, sglang, transformers, llama.cpp", "", f"they load no {kind} drafts of our form")
    return Export(kind, "", tokens, [nobody])


def _feature_exports(
    info: dict[str, Any], draft: Path, aside: Path, place: _Place, only: Sequence[str]
) -> list[Export]:
    source = load_source(info, draft, cache=place.cache, target=place.target, device=place.device)
    fitting = layouts_for(source.kind)
    _check_known(only, list(fitting))
    if not fitting:
        return [_loaded_by_nobody(source.kind, source.tokens)]
    found = []
    for name, layout in fitting.items():
        if only and name not in only:
            continue
        served = _served(layout.ENGINES, source, source.tokens)
        if any(not one.refuses for one in served):
            write_layout(layout, source, aside / name)
            found.append(_listed(name, aside, source.tokens, layout.ENGINES, source))
        else:
            found.append(Export(name, "", source.tokens, served))
    return found


def _gguf(
    info: dict[str, Any], aside: Path, exports: Sequence[Export], place: _Place, only: Sequence[str]
) -> list[Export]:
    """The draft as GGUF, where llama.cpp's converter is here and takes one of the formats that were written."""
    converter, source = gguf_files.present(), converted_from(exports)
    if converter is None or source is None:
        if gguf_files.NAME in only:
            mend = "make engines" if converter is None else "name that format too, as in [eagle3,gguf]"
            raise InputError("gguf is made from another format by llama.cpp's converter", where="exports", mend=mend)
        return []
    if only and gguf_files.NAME not in only:
        return []
    reference = info["target"]
    config = TargetConfig(path=place.target or reference["path"], revision=reference["revision"], device=place.device)
    target = None if source.layout == independent.NAME else config.folder(place.cache)
    made = aside / gguf_files.NAME / gguf_files.FILE
    made.parent.mkdir()
    converter.convert(aside / source.folder, made, target=target, outtype="bf16")
    return [_listed(gguf_files.NAME, aside, source.tokens, [gguf_files.engine(source.layout)], None)]


def converted_from(exports: Sequence[Export]) -> Export | None:
    """The first format that llama.cpp converts and serves, with its files; None where there is none."""
    for export in exports:
        takes = any(one.engine == "llama.cpp" and not one.refuses for one in export.engines)
        if export.folder and export.layout in gguf_files.TYPES and takes:
            return export
    return None


def load_source(info: dict[str, Any], draft: Path, *, cache: Path, target: str | None, device: str) -> Source:
    """Load a feature draft and its target in fp32.

    Raises:
        InputError: they cannot be had, or the target is another one than the pair's.
    """
    reference = info["target"]
    config = TargetConfig(path=target or reference["path"], revision=reference["revision"], device=device)
    folder = config.folder(cache)
    if target_digest(folder) != reference["digest"]:
        raise InputError(
            "this is not the target of the pair", where=str(folder), mend="name the target it was made for"
        )
    model = load_causal_model(folder, precision="fp32", device=config.torch_device())
    network = load_network(draft, model, precision="fp32")
    chosen = int(info["decoding"]["lookahead"].get("tokens") or _DEFAULT_TOKENS)
    # A block draft sees as many masks as it was trained with, whatever is verified of it.
    tokens = min(chosen, network.block) if network.config.kind == "eagle3" else network.block
    return Source(network, model, tokens, called(reference))


def called(reference: Mapping[str, Any]) -> str:
    """What a target is called outside: its folder or id; the embedded one by the folder it is converted to."""
    path = str(reference["path"])
    return FOLDER_NAME if path == EMBEDDED else path


def layouts_for(kind: str) -> dict[str, ModuleType]:
    """Layouts that a kind of network can be written in, by name."""
    return {name: module for name, module in plugins(layouts.__name__).items() if kind in module.KINDS}


def write_layout(layout: ModuleType, source: Source, folder: Path) -> None:
    """Write one format of a draft."""
    folder.mkdir(parents=True)
    with torch.no_grad():
        tensors = {name: stored(tensor) for name, tensor in layout.tensors(source).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(layout.config(source), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _listed(name: str, aside: Path, tokens: int, engines: Sequence[layouts.Engine], source: Source | None) -> Export:
    folder = aside / name
    files = {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return Export(name, name, tokens, _served(engines, source, tokens), files)


def _served(engines: Sequence[layouts.Engine], source: Source | None, tokens: int) -> list[Served]:
    found = []
    for engine in engines:
        if isinstance(engine.refuses, str):
            refuses = engine.refuses
        else:
            assert source is not None, "only drafts that read features are asked about"
            refuses = engine.refuses(source)
        command = "" if refuses else engine.command.replace(layouts.GAMMA, str(tokens))
        found.append(Served(engine.name, command, refuses, engine.tried))
    return found


def _check_known(only: Sequence[str], names: Sequence[str]) -> None:
    unknown = [name for name in only if name not in (*names, gguf_files.NAME)]
    if unknown:
        mend = f"this draft has {', '.join(names)}"
        raise InputError(f"no format {unknown[0]!r} for this draft", where="exports", mend=mend)


def _write_tables(info: dict[str, Any], aside: Path, exports: Sequence[Export]) -> None:
    """SGLang's tables beside a DSpark draft: what was measured of the machine, and the temperatures where there are."""
    if not any(export.layout == "dspark" and export.folder for export in exports):
        return
    precision = info["decoding"]["precision"]
    passes = info["cost_profile"]["passes"].get(precision, {})
    if passes:
        write_json(aside / SPS_FILE, sglang_steps({int(width): seconds for width, seconds in passes.items()}))
    measured = info["decoding"].get("measured") or {}
    calibration = (measured.get("chances", {}).get("calibration") or {}).get("temperatures")
    if calibration:
        tokens = next(export.tokens for export in exports if export.layout == "dspark")
        write_json(aside / STS_FILE, sglang_temperatures(calibration, tokens=tokens, dataset=str(info["name"])))


def _listing(info: dict[str, Any], kind: str, exports: Sequence[Export]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "pair": f"{info['name']}/{info['version']}",
        "target": {"path": info["target"]["path"], "digest": info["target"]["digest"]},
        "draft": {"name": info["draft"]["name"], "kind": kind},
        "exports": [asdict(export) for export in exports],
    }


def read_exports(serve: Path) -> list[Export]:
    """What `exports.json` lists; nothing where a version has none.

    Raises:
        InputError: it is not one of ours.
    """
    file = serve / EXPORTS_FILE
    if not file.is_file():
        return []
    data = read_json(file)
    try:
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema {data['schema_version']}, this code reads {SCHEMA_VERSION}")
        return [Export(**{**row, "engines": [Served(**one) for one in row["engines"]]}) for row in data["exports"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a list of exports: {error}", where=str(file), mend="export the pair again") from None


def readme(info: dict[str, Any], exports: Sequence[Export]) -> str:
    """How each engine is started, for people."""
    reference = info["target"]
    embedded = reference["path"] == EMBEDDED
    place = f"${{DSPARK_CACHE:-$HOME/.cache/dspark}}/{FOLDER_NAME}" if embedded else reference["path"]
    lines = [
        f"# Serving {info['name']} {info['version']}",
        "",
        f"The draft `{info['draft']['name']}` in the formats that engines load. Output stays the target's own: every "
        "engine verifies what a draft proposes.",
        "",
        "```sh",
        f"TARGET={place}   # sha256 of its files starts with {reference['digest'][:12]}",
        "```",
        "",
    ]
    for export in exports:
        lines += [f"## {export.layout}", ""]
        if export.folder:
            lines += ["```sh", f"DRAFT=$PWD/{export.folder}", "```", ""]
        for one in export.engines:
            lines += [f"{one.engine}: not this draft, {one.refuses}.", ""] if one.refuses else _command_lines(one)
    return "\n".join(lines)


def _command_lines(one: Served) -> list[str]:
    language = "python" if one.engine == "transformers" else "sh"
    tried = f" (tried with {one.tried})" if one.tried else " (not tried)"
    return [f"{one.engine}{tried}:", "", f"```{language}", one.command, "```", ""]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 when the folder is written, 2 with one line otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.exports.write", description="write a published draft in the formats of engines"
    )
    parser.add_argument("pair", type=Path, help="a version folder of a registry, or an alias")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--only", action="append", default=[], help="a format; may be given again (default: all)")
    parser.add_argument("--target", default=None, help="the target's folder or id here (default: as in the pair)")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where converted models are kept")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    words = parser.parse_args(argv)
    if not (words.pair / PAIR_FILE).is_file():
        sys.stderr.write(f"no pair here [{words.pair}]: point at a registry version, such as .../champion\n")
        return 2
    try:
        cache = words.cache.expanduser()
        exports = write_exports(
            words.pair, words.out, cache=cache, target=words.target, device=words.device, only=words.only
        )
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{words.out}: {', '.join(export.layout for export in exports)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
