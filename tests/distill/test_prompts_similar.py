"""Prompts that the target begins like those of another source."""

from dataclasses import dataclass, replace

import pytest
from transformers import PreTrainedTokenizerFast

from distill.chat import user_prefix
from distill.prompts import Prompt, SourceConfig, SourceContext
from distill.prompts.similar import Config
from distill.splits import prepare_prompts
from inference.errors import InputError

TURNS = ["How many apples has Ann, who buys twelve?", "How far does the train go in three hours at ninety?"]
REST = " goes on and is a question after all?"


@dataclass
class Given(SourceConfig):
    """Prompts of maths."""

    kind: str = "given"
    domain: str = "maths"
    turns: tuple[str, ...] = tuple(TURNS)
    reads: int = 0

    def read(self, context: SourceContext) -> list[Prompt]:
        self.reads += 1
        return [Prompt(str(n), self.domain, self.kind, (t,), heldout=self.heldout) for n, t in enumerate(self.turns)]


def made(tokenizer: PreTrainedTokenizerFast, config: Config, **sources: SourceConfig) -> tuple[list[Prompt], list[str]]:
    """The prompts, and all that the target was given before a turn's rest."""
    asked: list[list[int]] = []
    rest = list(tokenizer(REST, add_special_tokens=False)["input_ids"])

    def sample(prompts: list[list[int]], tokens: int, temperature: float, seed: int) -> list[list[int]]:
        asked.extend(prompts)
        return [rest[:tokens] for _ in prompts]

    context = SourceContext(tokenizer, 5, sample, sources={"given": Given(), "mine": config, **sources})
    return config.load(context), [tokenizer.decode(ids) for ids in asked]


def test_a_turn_begins_like_one_of_the_other_source_and_ends_otherwise(chatml: PreTrainedTokenizerFast) -> None:
    config = Config(like="given", limit=12, batch_prompts=4, least_share=0.2, most_share=0.6)
    prompts, asked = made(chatml, config)
    before = chatml.decode(user_prefix(chatml))
    for prompt in prompts:
        own = prompt.turns[0].removesuffix(REST)
        assert before + own in asked, "the target goes on where the beginning ends"
        (other,) = (turn for turn in TURNS if turn.startswith(own))
        assert 0.2 * len(other) - 1 <= len(own) <= 0.6 * len(other)
    assert {prompt.domain for prompt in prompts} == {"maths"}, "the other source's, none being said"
    assert len({prompt.turns[0] for prompt in prompts}) == len(prompts) > 4
    # By turns, so that no prompt is begun twice more often than another.
    starts = [next(n for n, turn in enumerate(TURNS) if turn[:5] in given) for given in asked]
    assert starts[::2] == [starts[0]] * len(starts[::2]) and starts[1] != starts[0]


def test_what_is_said_of_it_goes_before_what_the_other_source_is(chatml: PreTrainedTokenizerFast) -> None:
    config = Config(like="given", limit=2, batch_prompts=2, domain="puzzles", topics=["You ask."], system="Be kind.")
    prompts, asked = made(chatml, config)
    assert {(prompt.domain, prompt.system) for prompt in prompts} == {("puzzles", "Be kind.")}
    assert all(given.startswith(chatml.decode(user_prefix(chatml, system="You ask."))) for given in asked)
    assert config.domain == "puzzles" and Config(like="given").domain == "", "settings are never changed by reading"


def test_the_same_seed_begins_alike(chatml: PreTrainedTokenizerFast) -> None:
    config = Config(like="given", limit=5, batch_prompts=3)
    assert made(chatml, config) == made(chatml, replace(config))


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ("nothing", "source 'nothing', but there is none; name one to train on: given"),
        ("asked", "but it is held out"),
        ("mine", "but it is similar too"),
    ],
)
def test_the_other_source_must_be_one_to_train_on(chatml: PreTrainedTokenizerFast, like: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        made(chatml, Config(like=like), asked=Given(heldout=True))
    assert said.partition(";")[0] in str(error.value) and "given" in str(error.value)


def test_prompts_that_could_not_be_kept_are_not_begun(chatml: PreTrainedTokenizerFast) -> None:
    long = "Why? " * 400
    prompts, asked = made(chatml, Config(like="long", limit=3, batch_prompts=3), long=Given(turns=(long, *TURNS)))
    assert len(prompts) == 3 and not any("Why?" in given for given in asked)
    with pytest.raises(InputError, match="every prompt of long is longer than 1200 characters"):
        made(chatml, Config(like="long", limit=3), long=Given(turns=(long,)))


def test_sources_of_a_run_know_each_other(chatml: PreTrainedTokenizerFast) -> None:
    rest = list(chatml(REST, add_special_tokens=False)["input_ids"])
    context = SourceContext(chatml, 5, lambda prompts, *_: [rest for _ in prompts])
    heldout = Given(heldout=True, turns=("What is eight times nine minus two?",))
    given = Given()
    like = Config(like="given", limit=4, batch_prompts=4)
    found = prepare_prompts(
        {"like_given": like, "given": given, "asked": heldout}, context, validation_share=0.0, seed=0
    )
    assert sum(prompt.source == "like_given" for prompt in found.train) >= 2
    assert given.reads == 1, "what the target may have written is not written twice"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"least_share": 0.5, "most_share": 0.4}, "use 0 <= least <= most < 1"),
        ({"most_share": 1.0}, "use 0 <= least <= most < 1"),
        ({"heldout": True}, "is to train on"),
        ({"limit": -1}, "similar: limit is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(like="given", **settings)  # type: ignore[arg-type]
