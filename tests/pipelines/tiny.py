"""A whole target and its prompts, small enough that every stage together takes seconds; and the words of such a run.

    workplace = Workplace.make(tmp_path)
    assert cli.main(workplace.words()) == 0

Weights are random, so nothing that is learned means anything; what is tested is that stages do what they say.
"""

import contextlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipelines import cli

REPOSITORY = Path(__file__).resolve().parents[2]
DOMAINS = ("chat", "code", "maths")
LAYERS = 3
CONTEXT = 320
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(*, template: str | None = CHATML, extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, three special ones, and `extra` ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>", *extra])
    fast = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|im_end|>", bos_token="<s>")
    fast.chat_template = template
    return fast


def write_model(
    folder: Path, *, layers: int = LAYERS, seed: int = 0, vocabulary: PreTrainedTokenizerFast | None = None
) -> Path:
    """A random llama with its tokenizer as an ordinary model folder, fp32."""
    vocabulary = vocabulary or tokenizer()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,  # wide, so that greedy choices are clear and not near-ties
        tie_word_embeddings=True,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    return folder


def write_prompts(file: Path, domain: str, count: int, *, seed: int) -> Path:
    """JSONL of short questions that share no ten words with those of another seed."""
    words = random.Random(f"{domain}/{seed}")
    rows = ["".join(words.choices("abcdefghij ", k=words.randint(10, 30))).strip() or "why" for _ in range(count)]
    lines = [
        json.dumps({"id": f"{seed}-{index}", "messages": [{"role": "user", "content": f"{domain} {row}?"}]})
        for index, row in enumerate(rows)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@dataclass(frozen=True)
class Workplace:
    """A folder with a target, prompt files, and everything a run writes.

    Attributes:
        root: the folder.
        cache: device profiles; shared between workplaces, so that the machine is measured once.
    """

    root: Path
    cache: Path

    @classmethod
    def make(cls, root: Path, *, cache: Path | None = None) -> "Workplace":
        """Write target and prompts: three domains, eight training and two held-out prompts each."""
        write_model(root / "target")
        for domain in DOMAINS:
            write_prompts(root / f"{domain}.jsonl", domain, 8, seed=1)
            write_prompts(root / f"{domain}_heldout.jsonl", domain, 2, seed=2)
        return cls(root, cache or root / "cache")

    def again(self, root: Path) -> "Workplace":
        """The same target and prompts in place, with outputs of its own."""
        root.mkdir(parents=True, exist_ok=True)
        for item in (self.root / "target", *self.root.glob("*.jsonl")):
            (root / item.name).symlink_to(item.resolve())
        return Workplace(root, self.cache)

    @property
    def artifacts(self) -> Path:
        """Outputs of the stages."""
        return self.root / "artifacts"

    @property
    def registry(self) -> Path:
        """Published pairs."""
        return self.root / "registry"

    @property
    def versions(self) -> Path:
        """Folder of the pair's versions."""
        return self.registry / "tiny"

    @property
    def champion(self) -> Path:
        """The alias."""
        return self.versions / "champion"

    def prompts(self) -> list[str]:
        """Words that choose the six files. One source has the choice's own name; others are added under theirs."""
        words = ["prompts=[jsonl]", f"prompts.jsonl.path={self.root / 'chat.jsonl'}"]
        for domain in DOMAINS:
            for heldout in (False, True):
                name = f"{domain}_heldout" if heldout else domain
                if name != "chat":
                    words += [
                        f"+prompts@prompts.{name}=jsonl",
                        f"prompts.{name}.path={self.root / name}.jsonl",
                        f"prompts.{name}.domain={domain}",
                        f"prompts.{name}.heldout={str(heldout).lower()}",
                    ]
        return words

    def words(self, *more: str, stage: str | None = None) -> list[str]:
        """The command line of a run that takes seconds.

        Args:
            more: further words; each replaces the workplace's own of the same key, and another choice of drafts, or of
                who answers, the settings of the workplace's own choice, which would be unknown keys without it.
            stage: of which this is the command line; None for all.
        """
        keys = {word.partition("=")[0] for word in more}
        gone = ("draft.pruned.",) if any(w.startswith("draft=") and "pruned" not in w for w in more) else ()
        gone += ("corpus.shard_size",) if "corpus=server" in more else ()
        own = [w for w in self._words() if w.partition("=")[0] not in keys and not w.startswith(gone or "\0")]
        return [*([stage] if stage else []), *own, *more]

    def _words(self) -> list[str]:
        return [
            f"target.path={self.root / 'target'}",
            "target.precision=fp32",
            *self.prompts(),
            "draft=[none,lookup,pruned]",
            "draft.pruned.layers=1",
            "draft.pruned.sequences_per_step=2",
            "corpus.max_new_tokens=12",
            "corpus.batch_size=4",
            "corpus.shard_size=4",
            "budget.responses=18",
            "budget.score_prompts=2",
            "trainer.steps=6",
            "trainer.precision=fp32",
            "trainer.checkpoint_every_steps=1",
            "decode.max_new_tokens=16",
            "score.screen_after=0",
            "publish.name=tiny",
            "publish.check_prompts=1",
            f"paths.artifacts={self.artifacts}",
            f"paths.registry={self.registry}",
            f"paths.cache={self.cache}",
            f"hydra.run.dir={self.root / 'outputs'}",
            f"hydra.sweep.dir={self.root / 'multirun'}",
        ]

    def only(self, kind: str) -> Path:
        """Folder of the one complete artifact of a kind."""
        [found] = self.complete(kind)
        return found

    def complete(self, kind: str) -> list[Path]:
        """Folders of the complete artifacts of a kind."""
        return sorted(p for p in (self.artifacts / kind).glob("*") if not p.name.startswith("."))

    def draft(self, name: str) -> Path:
        """Folder of the artifact of one draft, found by its kind."""
        return next(p for p in self.complete("draft") if read(p / "manifest.json")["metrics"]["kind"] == name)


def run(words: Sequence[str]) -> tuple[str, int]:
    """Run the command line in this process; returns what it printed on both streams, and the exit code."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = cli.main(words)
    return text.getvalue(), code


def read(file: Path) -> Any:
    """A JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def records(folder: Path) -> list[dict[str, Any]]:
    """Records of a score or a pair, as plain data."""
    return [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def token_digests(folder: Path) -> dict[tuple[str, float, str], str]:
    """What each arm wrote for each prompt and temperature."""
    return {(r["prompt_id"], r["temperature"], r["arm"]): r["digest"] for r in records(folder)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def changed(file: Path, content: bytes) -> Iterator[None]:
    """Another content for a file, for the length of a block."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)
