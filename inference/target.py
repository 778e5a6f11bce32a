"""Which target: the embedded one, a folder, or any Hugging Face id; one code path after its folder is known."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inference.errors import InputError
from inference.precisions import PRECISIONS

if TYPE_CHECKING:
    import torch

    from inference.model import CausalModel

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
PACKED_FORMATS = ("nf4", "int8")
TEACHER_PRECISIONS = ("fp32", "bf16", *PACKED_FORMATS)


@dataclass(kw_only=True)
class TargetConfig:
    """The model whose output must not change.

    Attributes:
        path: `embedded`, a folder, or a Hugging Face model id.
        revision: branch, tag or commit of a Hugging Face id; empty for its default.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; auto takes the GPU when there is one.
        precision: `auto` for the device profile's choice, or one of `inference.precisions.PRECISIONS`.
        attention: transformers' attention implementation.
        teacher_precision: of the target while drafts are trained: `fp32`, `bf16`, or `nf4` or `int8` (bitsandbytes)
            where memory is short. What a draft learns is then what that copy says.
        spread_teacher: spread its layers over the processes that train together (ZeRO stage 3), for a target too large
            for one of them.
    """

    path: str = EMBEDDED
    revision: str = ""
    device: str = "auto"
    precision: str = "auto"
    attention: str = "sdpa"
    teacher_precision: str = "fp32"
    spread_teacher: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("target.path is empty; use `embedded`, a model folder or a Hugging Face id")
        if self.precision not in ("auto", *PRECISIONS):
            raise ValueError(f"target.precision is {self.precision!r}; use auto or one of {', '.join(PRECISIONS)}")

        if self.teacher_precision not in TEACHER_PRECISIONS:
            choices = ", ".join(TEACHER_PRECISIONS)
            raise ValueError(f"target.teacher_precision is {self.teacher_precision!r}; use one of {choices}")
        if self.spread_teacher and self.teacher_precision in PACKED_FORMATS:
            raise ValueError("target.spread_teacher spreads fp32 or bf16 weights, not those of bitsandbytes")

    def torch_device(self) -> "torch.device":
        """The device asked for.

        Raises:
            InputError: it does not exist here.
        """
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        unknown = InputError(f"no device {self.device!r}", where="target.device", mend="use auto, cpu or cuda")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise unknown from None
        if device.type not in ("cpu", "cuda"):
            raise unknown
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError("no GPU that torch can use", where="target.device", mend="use target.device=cpu")
        return device

    def folder(self, cache: Path) -> Path:
        """Folder with the target's files, fetched or converted when needed, and checked.

        Raises:
            InputError: it cannot be had or is no whole model.
        """
        from inference.embedded import embedded_target
        from inference.loading import check_model_folder

        if self.path == EMBEDDED:
            folder = embedded_target(cache)
        elif Path(self.path).is_dir():
            folder = Path(self.path)
        else:
            folder = _fetched(self.path, self.revision)
        check_model_folder(folder)
        return folder

    def load(self, cache: Path, *, precision: str, way: str = "") -> "CausalModel":
        """The target in one arithmetic; where it lies in a run of several processes, see `inference.placement`."""
        from inference.parallel import load_target

        folder, device = self.folder(cache), self.torch_device()
        return load_target(folder, precision=precision, device=device, attention=self.attention, way=way)

    def most_holders(self, cache: Path) -> int:
        """Processes over which the target is spread in the arithmetic in which most hold a part of it; 1 for none."""
        from inference.placement import holders

        return max(holders(self.folder(cache), self.torch_device()).values())


def target_digest(folder: Path) -> str:
    """sha256 over names and contents of everything that decides a model's output: weights, configuration, tokenizer."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in {".safetensors", ".json", ".jinja", ".model", ".txt"}:
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as stream:
                while piece := stream.read(1 << 22):
                    digest.update(piece)
    return digest.hexdigest()


def stop_tokens(model: "CausalModel") -> frozenset[int]:
    """Tokens that end a response: those of the generation configuration and the tokenizer's end token."""
    found = {model.tokenizer.eos_token_id}
    configured = model.model.generation_config.eos_token_id
    found.update(configured if isinstance(configured, list) else [configured])
    return frozenset(int(t) for t in found if t is not None)


def _fetched(path: str, revision: str) -> Path:
    """Folder of a Hugging Face id in the hub's own cache; nothing is executed from it."""
    looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_like_path:
        raise InputError("no such model folder", where=path, mend="check target.path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(path, revision=revision or None, allow_patterns=patterns))
    except HFValidationError:
        raise InputError("neither a folder nor a model id", where=path, mend="check target.path") from None
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"no such folder, and the hub did not give it: {reason}", where=path, mend="check target.path"
        ) from None


def config_shape(folder: Path) -> dict[str, object]:
    """The configuration of a model folder without names and versions: what decides how long a pass takes."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ignored = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"}
    return {key: value for key, value in sorted(config.items()) if key not in ignored}
