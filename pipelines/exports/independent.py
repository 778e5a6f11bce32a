"""Drafts that are ordinary causal models: a Hugging Face folder serves them in every engine as it is."""

import shutil
from pathlib import Path

from inference.drafters.model import ModelDrafter
from inference.loading import load_causal_model
from inference.model import CausalModel
from inference.pair_files import DRAFT_FILE
from pipelines.exports.layouts import GAMMA, SERVED_BY_LLAMA_CPP, SERVED_BY_VLLM, Engine, sglang, vllm

NAME = "transformers"
_GGUF = (
    "python convert_hf_to_gguf.py $TARGET --outfile target.gguf && "
    "python convert_hf_to_gguf.py $DRAFT --outfile draft.gguf && "
    f"llama-server -m target.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max {GAMMA}"
)
_TRANSFORMERS = (
    "target.generation_config.num_assistant_tokens = {tokens}; "
    'target.generate(**inputs, assistant_model=AutoModelForCausalLM.from_pretrained("$DRAFT"))'
)
_STANDALONE = f"--speculative-num-steps {GAMMA} --speculative-eagle-topk 1"
ENGINES = (
    Engine("transformers", _TRANSFORMERS, tried="5.23.0: served"),
    Engine("vllm", vllm("draft_model"), tried=SERVED_BY_VLLM),
    Engine("sglang", sglang("STANDALONE", rest=_STANDALONE)),
    Engine("llama.cpp", _GGUF, tried=SERVED_BY_LLAMA_CPP),
)


def write_model_folder(draft: Path, folder: Path) -> None:
    """Copy a draft's model and tokenizer files; what only we read stays behind."""
    folder.mkdir(parents=True)
    for file in sorted(draft.iterdir()):
        if file.is_file() and file.name != DRAFT_FILE:
            shutil.copyfile(file, folder / file.name)


def read_model_folder(folder: Path, target: CausalModel, *, precision: str) -> ModelDrafter:
    """The drafter that the files alone make.

    Raises:
        InputError: unreadable, incomplete, or not of the target's vocabulary.
    """
    model = load_causal_model(folder, precision=precision, device=target.device)
    target.check_same_vocabulary(model, where=str(folder))
    return ModelDrafter(model)
