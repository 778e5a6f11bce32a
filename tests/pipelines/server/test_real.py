"""The embedded target behind the server: several clients at once get what decoding without a draft gives them."""

import asyncio
import json
from pathlib import Path

import pytest
import torch

from inference.target import target_digest
from tests.inference.families import greedy_reference
from tests.inference.real import target_folder
from tests.pipelines.server.serving import Own, live, settings_for

QUESTIONS = ("Why is the sky blue?", "What is 17 times 23?", "Write a haiku about rain.")


@pytest.mark.real
@pytest.mark.slow
def test_the_embedded_target_answers_several_clients_as_it_would_alone(tmp_path: Path) -> None:
    target = target_folder()
    folder = tmp_path / "tiny" / "v1"
    (folder / "draft").mkdir(parents=True)
    (folder / "draft" / "draft.json").write_text('{"kind": "lookup", "longest": 3, "shortest": 1}', encoding="utf-8")
    info = {
        "schema_version": 1,
        "name": "real",
        "version": "v1",
        "target": {"path": str(target), "revision": "", "digest": target_digest(target), "attention": "sdpa"},
        "draft": {"kind": "lookup"},
        "decoding": {"precision": "fp32", "lookahead": {"kind": "fixed", "tokens": 3}},
    }
    (folder / "pair.json").write_text(json.dumps(info), encoding="utf-8")
    settings = settings_for(folder)

    async def ask_all() -> list[tuple[list[int], str]]:
        async with here.async_client() as client:
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="real",
                        messages=[{"role": "user", "content": question}],
                        max_tokens=12,
                        temperature=0,
                        extra_body={"return_token_ids": True},
                    )
                    for question in QUESTIONS
                )
            )
        return [(reply.choices[0].token_ids, reply.choices[0].message.content or "") for reply in replies]

    with live(settings) as here:
        answers = asyncio.run(ask_all())
    own = Own(settings)
    model = own.version.pair.target
    for question, (tokens, text) in zip(QUESTIONS, answers, strict=True):
        expected = greedy_reference(model, torch.tensor(own.prompt(question)), 12)
        end = next((i + 1 for i, token in enumerate(expected) if token in own.version.stops), 12)
        assert tokens == expected[:end]
        assert text == model.tokenizer.decode(tokens, skip_special_tokens=True)
