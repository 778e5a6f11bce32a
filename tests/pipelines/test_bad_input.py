"""Everything a user can get wrong ends in one line that says what, where and how to mend it, in the exit code for it,
and in nothing half-made: no artifact and no version that was not complete before.

One table: what is broken, how, the words of the command line, and what the line must say.
"""

import json
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import cli
from pipelines.locks import registry_lock
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import CONTEXT, Workplace, run, tokenizer, write_model


@dataclass
class Scene:
    """A workplace to break.

    Attributes:
        place: target, prompts, and no output yet.
        pair: a published pair.
        hold: what stays entered while the command runs.
        more: words that the breaking adds.
    """

    place: Workplace
    pair: Path
    hold: AbstractContextManager[object]
    more: list[str]

    @property
    def target(self) -> Path:
        """The target's folder; a copy of its own after `own_target`."""
        return self.place.root / "target"

    def own_target(self) -> Path:
        """Put a copy in the place of the link to the shared target."""
        shared = self.target.resolve()
        self.target.unlink()
        shutil.copytree(shared, self.target)
        return self.target

    def own_prompts(self, name: str, text: str) -> None:
        """Put a file of one's own in the place of a link to a shared one."""
        file = self.place.root / f"{name}.jsonl"
        file.unlink()
        file.write_text(text, encoding="utf-8")


Break = Callable[[Scene], None]


def nothing(scene: Scene) -> None:
    """The words alone are wrong."""


def missing_model(scene: Scene) -> None:
    scene.more.append(f"target.path={scene.place.root / 'nowhere'}")


def no_config(scene: Scene) -> None:
    (scene.own_target() / "config.json").unlink()


def truncated(scene: Scene) -> None:
    weights = scene.own_target() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def not_a_number(scene: Scene) -> None:
    weights = scene.own_target() / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})


def no_template(scene: Scene) -> None:
    (scene.own_target() / "chat_template.jinja").unlink()


def other_tokenizer(scene: Scene) -> None:
    """As many tokens, but one of them another."""
    vocabulary = tokenizer()
    text = vocabulary.backend_tokenizer.to_str().replace("<s>", "<t>")
    folder = write_model(scene.place.root / "draft", layers=1)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    pretrained(scene)


def other_vocabulary(scene: Scene) -> None:
    write_model(scene.place.root / "draft", layers=1, vocabulary=tokenizer(extra=["<more>"]))
    pretrained(scene)


def no_checkpoint(scene: Scene) -> None:
    pretrained(scene)


def pretrained(scene: Scene) -> None:
    scene.more += ["draft=[none,pretrained]", f"draft.pretrained.path={scene.place.root / 'draft'}"]


def empty_file(scene: Scene) -> None:
    scene.own_prompts("chat", "\n")


def malformed_line(scene: Scene) -> None:
    scene.own_prompts("chat", '{"prompt": "why is it so?"}\n{"prompt": "and what\n')


def no_turn(scene: Scene) -> None:
    scene.own_prompts("chat", '{"prompt": "why is it so?"}\n\n{"messages": [{"role": "assistant", "content": "x"}]}\n')


def missing_file(scene: Scene) -> None:
    (scene.place.root / "chat.jsonl").unlink()


def only_long_prompts(scene: Scene) -> None:
    for domain in ("chat", "code", "maths"):
        lines = [json.dumps({"prompt": f"{letter} {domain} " + letter * CONTEXT}) for letter in "abc"]
        scene.own_prompts(domain, "\n".join(lines) + "\n")


def lonely_prompts(scene: Scene) -> None:
    for domain in ("chat", "code", "maths"):
        scene.own_prompts(domain, json.dumps({"prompt": f"the only one of {domain}"}) + "\n")


def all_contaminated(scene: Scene) -> None:
    for domain in ("chat", "code", "maths"):
        scene.own_prompts(domain, (scene.place.root / f"{domain}_heldout.jsonl").read_text())


def heldout_none(scene: Scene) -> None:
    scene.more += [f"prompts.{domain}_heldout.heldout=false" for domain in ("chat", "code", "maths")]


def artifacts_a_file(scene: Scene) -> None:
    scene.place.artifacts.write_text("a file in the way")


def registry_a_file(scene: Scene) -> None:
    scene.place.registry.write_text("a file in the way")


def read_only(scene: Scene) -> None:
    scene.hold = mounted(scene.place.artifacts, "size=1m,ro")


def full_disk(scene: Scene) -> None:
    """Room for plan and prompts, none for the responses with their states."""
    scene.hold = mounted(scene.place.artifacts, "size=64k")


def locked(scene: Scene) -> None:
    scene.hold = registry_lock(scene.place.registry)


def refusing(scene: Scene) -> None:
    with listening(lambda handler: None) as address:
        pass  # closed again, so nobody listens there
    server_words(scene, address)


def silent(scene: Scene) -> None:
    from_server(scene, lambda handler: threading.Event().wait(1.0))


def garbage(scene: Scene) -> None:
    from_server(scene, lambda handler: handler.answer(200, b"<html>not what you wanted</html>"))


def failing(scene: Scene) -> None:
    from_server(scene, lambda handler: handler.answer(500, b'{"error": "out of memory"}'))


def rejecting(scene: Scene) -> None:
    from_server(scene, lambda handler: handler.answer(401, b'{"error": "who are you?"}'))


def from_server(scene: Scene, answer: Callable[["Handler"], object]) -> None:
    scene.hold = listening(answer, scene)


def server_words(scene: Scene, address: str) -> None:
    scene.more += [
        "corpus=server",
        f"corpus.base_url={address}/v1",
        "corpus.model=tiny",
        "corpus.retries=1",
        "corpus.backoff_s=0.01",
        "corpus.timeout_s=0.2",
    ]


class Handler(BaseHTTPRequestHandler):
    """Answers every request in the way of the test."""

    act: Callable[["Handler"], object] = staticmethod(lambda handler: None)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).act(self)

    do_GET = do_POST

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@contextmanager
def listening(answer: Callable[[Handler], object], scene: Scene | None = None) -> Iterator[str]:
    """A real HTTP server on a free port; yields its address."""
    handler = type("Answer", (Handler,), {"act": staticmethod(answer)})
    server = HTTPServer(("127.0.0.1", 0), handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    if scene is not None:
        server_words(scene, address)
    try:
        yield address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own in the place of a folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a file system here (needs root)")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


LONG = "x" * CONTEXT

CASES: dict[str, tuple[Break, list[str], str, int]] = {
    # name: how it is broken, the first words, what the line must say, exit code
    "unknown stage": (nothing, ["bild"], "unknown stage 'bild': did you mean 'build'?", 2),
    "unknown key": (nothing, ["trainer.step=3"], "unknown key 'trainer.step': did you mean 'trainer.steps'?", 2),
    "unknown choice": (nothing, ["corpus=servr"], "corpus has no choice 'servr': did you mean 'server'?", 2),
    "value out of range": (nothing, ["corpus.batch_size=0"], "batch_size must be at least 1, got 12, 0", 2),
    "no baseline": (nothing, ["draft=[lookup]"], "a score needs the baseline [draft]: add none to the list", 2),
    "temperature not scored": (nothing, ["select.temperature=0.5"], "nothing is scored at temperature 0.5", 2),
    "more layers than there are": (nothing, ["draft.pruned.layers=9"], "cannot keep 9 of 3 layers", 2),
    "precision not on offer": (nothing, ["target.precision=fp16"], "fp16 is not on offer on this device", 2),
    "missing model folder": (missing_model, [], "no such model folder [{root}/nowhere]: check target.path", 2),
    "model without configuration": (no_config, [], "no config.json here [{root}/target]: point at", 2),
    "truncated weights": (truncated, [], "truncated weights: ", 2),
    "weights that are no numbers": (
        not_a_number,
        [],
        "NaN or infinite weights in model.norm.weight [{root}/target]",
        2,
    ),
    "no chat template": (no_template, [], "the tokenizer has no chat template [{root}/target]: use an instruction", 2),
    "draft with another tokenizer": (other_tokenizer, [], "the draft's tokenizer differs, for example at '<s>'", 2),
    "draft with another vocabulary": (other_vocabulary, [], "the draft has 260 tokens, the target 259", 2),
    "draft that is not there": (no_checkpoint, [], "no such model folder [{root}/draft]", 2),
    "no prompt file": (missing_file, [], "cannot read the file: No such file or directory [{root}/chat.jsonl]", 2),
    "empty prompt file": (empty_file, [], "the file holds no prompts [{root}/chat.jsonl]: put one JSON object", 2),
    "malformed line": (malformed_line, [], "[{root}/chat.jsonl, line 2]: write one whole JSON object on each line", 2),
    "line without a user": (no_turn, [], "[{root}/chat.jsonl, line 3]", 2),
    "prompts longer than the context": (only_long_prompts, ["corpus"], "9 are longer than 319 tokens [prompts]", 2),
    "one prompt a domain": (lonely_prompts, [], "no validation prompt left for 18 responses", 2),
    "nothing but held-out prompts": (all_contaminated, [], "no training prompts are left (6 loaded) [prompts]", 2),
    "no held-out prompts": (heldout_none, [], "no held-out prompts in jsonl, ", 2),
    "artifacts where a file is": (artifacts_a_file, [], "a file stands where a folder is needed [{root}/artifacts", 2),
    "registry where a file is": (registry_a_file, [], "a file stands where a folder is needed [{root}/registry", 2),
    "read-only output": (read_only, [], "the file system is read only [{root}/artifacts", 2),
    "full disk": (full_disk, [], "no space left on the disk [{root}/artifacts/", 2),
    "registry held by another run": (locked, [], "another run holds the registry: process ", 4),
    "server that refuses": (refusing, ["corpus"], "cannot connect to the server (", 2),
    "server that says nothing": (silent, ["corpus"], "the server did not answer within 0.2 s (2 attempts)", 2),
    "server that answers garbage": (garbage, ["corpus"], "the server's answer is not the JSON expected", 2),
    "server that fails": (failing, ["corpus"], "the server answered 500, saying: ", 2),
    "server that rejects": (rejecting, ["corpus"], "the server answered 401, saying: ", 2),
    "prompt longer than the context": (
        nothing,
        ["generate", "--pair", "{pair}", LONG],
        f"tokens, the context holds {CONTEXT} [prompt]: shorten it",
        2,
    ),
    "no such pair": (nothing, ["generate", "--pair", "{root}/registry", "hi"], "no pair here [{root}/registry/pair", 2),
}


@pytest.fixture
def scene(tiny_place: Workplace, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A fresh workplace with links to the shared target and prompts."""
    monkeypatch.chdir(tmp_path)
    return Scene(tiny_place.again(tmp_path / "place"), finished.place.champion, nullcontext(), [])


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_leaves_nothing_half_made(
    name: str, scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong, words, expected, code = CASES[name]
    wrong(scene)
    places = {"root": scene.place.root, "pair": scene.pair}
    words = [word.format(**places) if "{" in word else word for word in words]
    with scene.hold:
        if words[:1] == ["generate"]:
            got = cli.main([*words, "--cache", str(scene.place.cache)])
        else:
            stage = words[0] if words and "=" not in words[0] else None
            overrides = words[1:] if stage else words
            got = cli.main(scene.place.words(*overrides, *scene.more, stage=stage))
        made = unfinished(scene.place)
    captured = capfd.readouterr()
    assert got == code, captured.err
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("dspark: ")] == lines[-1:], captured.err
    assert expected.format(**places) in lines[-1]
    assert "[" in lines[-1] or lines[-1].count(": ") > 1, "where it is wrong, or how to mend it"
    assert "Traceback" not in captured.err
    assert made == []


def unfinished(place: Workplace) -> list[Path]:
    """Artifacts without a manifest, and versions, which a run that failed must not leave."""
    complete = [p for kind in ("plan", "corpus", "draft", "score", "select") for p in place.complete(kind)]
    half = [p for p in complete if not (p / "manifest.json").is_file()]
    versions = place.versions.iterdir() if place.versions.is_dir() else ()
    return [*half, *(p for p in versions if not p.name.startswith("."))]


# Mended, the same command goes on


def test_a_run_that_met_a_full_disk_goes_on_when_there_is_space(scene: Scene) -> None:
    words = scene.place.words(stage="corpus")
    full_disk(scene)
    saved = scene.place.root / "saved"
    with scene.hold:
        assert cli.main(words) == 2
        shutil.copytree(scene.place.artifacts, saved)
    shutil.rmtree(scene.place.artifacts)
    saved.rename(scene.place.artifacts)
    text, code = run(words)
    assert code == 0, text
    assert "resuming in" in text


def test_a_mended_line_is_read_again(scene: Scene) -> None:
    """A file counts by its content: the same path with other prompts is another corpus."""
    malformed_line(scene)
    words = scene.place.words(stage="corpus")
    assert cli.main(words) == 2
    scene.own_prompts("chat", '{"prompt": "why is it so?"}\n{"prompt": "and what is that?"}\n')
    assert cli.main(words) == 0
    scene.own_prompts("chat", '{"prompt": "why is it so?"}\n{"prompt": "and who is that?"}\n')
    assert cli.main(words) == 0
    assert len(scene.place.complete("corpus")) == 2


def test_a_limit_on_file_sizes_is_one_line_too(scene: Scene) -> None:
    """The disk of a user without root: the kernel refuses any file above a size, as a quota would."""
    words = scene.place.words("corpus.batch_size=18", stage="corpus")  # one shard, of about 30 kB
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        text, code = run(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert code == 2, text
    [line] = [line for line in text.splitlines() if line.startswith("dspark: ")]
    assert "the file would be larger than allowed" in line and "Traceback" not in text
    assert unfinished(scene.place) == [] and not scene.place.complete("corpus")
    assert run(words)[1] == 0
