"""What is copied is what followed where a text's end stood before, as a plain search finds it, and the tokens that are
kept on the device are those of the requests."""

from collections.abc import Callable

import pytest
import torch

from inference.graphed import written as written_module
from inference.graphed.rounds import Rounds
from inference.graphed.written import LONGEST, Written, copied, num_copied, padded
from inference.model import CausalModel
from inference.trees import Tree
from tests.inference.families import lean_model
from tests.inference.test_feature_drafts import CONFIGS, network_for
from tests.inference.test_graphed import prompt


def searched(text: list[int], count: int) -> list[int]:
    """What follows the latest of the longest matches, once more from its beginning where it comes to the end."""
    for length in range(min(LONGEST, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                following = text[end:]
                return [following[step % len(following)] for step in range(count)]
    return [text[-1]] * count


def random_texts(kinds: int, *, texts: int = 300, most: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of few kinds of tokens as `copied` reads them, and where they end; other tokens lie behind."""
    generator = torch.Generator().manual_seed(kinds)
    rows = torch.randint(kinds, (texts, most), generator=generator)
    return torch.stack([padded(row) for row in rows]), torch.randint(most, (texts,), generator=generator)


@pytest.mark.parametrize("kinds", [1, 2, 3, 8, 1000])
def test_what_is_copied_is_what_a_search_finds(kinds: int) -> None:
    texts, lengths = random_texts(kinds)
    given = copied(texts, lengths, count=9)
    for row, length, tokens in zip(texts.tolist(), lengths.tolist(), given.tolist(), strict=True):
        start = len(row) - 40
        assert tokens == searched(row[start : start + length + 1], 9)


def test_examples() -> None:
    def after(*text: int) -> list[int]:
        return copied(padded(torch.tensor(text))[None], torch.tensor([len(text) - 1]), count=5)[0].tolist()

    assert after(1, 2, 3, 9, 1, 2) == [3, 9, 1, 2, 3], "what followed, and at the end once more"
    assert after(4, 4) == after(1, 2, 4, 4, 4) == [4] * 5, "a loop goes on"
    assert after(7, 1, 8, 5, 2, 6, 1, 5, 2) == [6, 1, 5, 2, 6], "the latest of equals"
    assert after(3, 1, 8, 3, 1, 5, 2, 1, 4, 3, 1) == [5, 2, 1, 4, 3], "the latest of two, the longer before the later"
    assert after(9, 1, 2, 3, 4, 5, 0, 2, 3, 4, 6, 1, 2, 3, 4) == [5, 0, 2, 3, 4], "four tokens before three later"
    assert after(8, 1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 6, 8, 1, 2, 3, 4) == [6, 8, 1, 2, 3], "no more than four count"
    assert after(1, 2, 3) == [3] * 5, "nothing matches"
    assert after(6) == [6] * 5, "nothing is before it"


def beyond(texts: torch.Tensor, lengths: torch.Tensor, *, count: int) -> torch.Tensor:
    """A mutant that reads one position behind a text's end."""
    return copied(texts, (lengths + 1).clamp(max=39), count=count)


def forgetful(texts: torch.Tensor, lengths: torch.Tensor, *, count: int) -> torch.Tensor:
    """A mutant that has lost the first half of a text."""
    lost = torch.arange(texts.shape[1]) < LONGEST - 1 + lengths[:, None] // 2
    return copied(texts.masked_fill(lost, -1), lengths, count=count)


@pytest.mark.parametrize("mutant", [beyond, forgetful])
def test_mutants_copy_something_else(mutant: Callable[..., torch.Tensor]) -> None:
    texts, lengths = random_texts(3)
    assert not torch.equal(mutant(texts, lengths, count=9), copied(texts, lengths, count=9))


def test_what_lies_behind_a_texts_end_is_not_looked_at() -> None:
    texts, lengths = random_texts(3)
    behind = torch.arange(texts.shape[1]) > LONGEST - 1 + lengths[:, None]
    others = torch.where(behind, (texts + 1) % 3, texts)
    assert not torch.equal(others, texts)
    assert torch.equal(copied(others, lengths, count=9), copied(texts, lengths, count=9))
    assert not torch.equal(beyond(others, lengths, count=9), beyond(texts, lengths, count=9))


@pytest.mark.parametrize("first", [1, 7, 40])
def test_how_much_of_a_finished_text_could_be_copied(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_module, "_TEXTS", 7)
    text = torch.randint(3, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    given = num_copied(torch.tensor(text), first, count=6).tolist()
    wanted = []
    for end in range(first, len(text)):
        said, came = searched(text[:end], 6), text[end : end + 6]
        wanted.append(next((n for n, (a, b) in enumerate(zip(said, came, strict=False)) if a != b), len(came)))
    assert given == wanted and (first > 40 or len(set(given)) > 3)


# On the device


def test_tokens_lie_at_their_positions() -> None:
    kept = Written(3, positions=20, device=torch.device("cpu"))
    kept.begin(1, 5)
    kept.write(torch.tensor([1, 2]), torch.tensor([1, 0]), torch.tensor([[6, 5], [8, 9]]))
    given = kept.copied(torch.tensor([0, 2, 1]), shown=16, count=3)
    assert given.tolist() == [[0, 0, 0], [6, 5, 6], [9, 9, 9]]
    kept.move(1, 0)
    assert kept.copied(torch.tensor([2]), shown=16, count=3).tolist() == [[6, 5, 6]]


@pytest.fixture(scope="module")
def target() -> CausalModel:
    return lean_model("llama", max_position_embeddings=256)


def texts_of(rounds: Rounds) -> list[list[int]]:
    """What is kept of every request up to its anchor."""
    assert rounds.written is not None
    rows, lengths = rounds.written._tokens[:, LONGEST - 1 :].tolist(), rounds.lengths.tolist()
    return [row[: length + 1] for row, length in zip(rows, lengths, strict=True)]


def test_prompts_and_what_rounds_emit_are_kept_wherever_requests_lie(target: CausalModel) -> None:
    network = network_for(CONFIGS["eagle3"], target)
    tree = Tree.of([(0,), (1,), (0, 0)], lookup=6)
    rounds = Rounds(target, network, block=network.block, batch=4, capacity=256, tree=tree)
    # Of one token, of one piece of a prompt, and of two.
    texts = {0: prompt(1).tolist(), 1: prompt(17).tolist(), 3: prompt(150).tolist()}
    rounds.leave(2)
    rounds.begin_all(list(texts), list(texts.values()))

    def go_on(places: int, *, block: int | None = None) -> None:
        rounds.round(shown=256, sampled=False, places=places, block=block)
        for place, numbers in enumerate(rounds.emitted.tolist()[:places]):
            if place in texts:
                texts[place] += numbers[: numbers[-1]]

    def check() -> None:
        kept = texts_of(rounds)
        assert all(kept[place] == text for place, text in texts.items())
        assert int(rounds.lengths[2]) == 0

    check()
    for _ in range(4):
        go_on(4)
        check()
    go_on(4, block=2)
    check()
    # The last request in another place, and rounds of the first places alone; a chain's tokens are kept as well.
    rounds.move(3, 2, length=250)
    texts[2] = texts.pop(3)
    assert texts_of(rounds)[2] == texts[2]
    for block in (None, 1, None):
        go_on(3, block=block)
        assert all(texts_of(rounds)[place] == text for place, text in texts.items())
    # The place of a request that left is begun anew.
    rounds.leave(1)
    texts[1] = prompt(1, seed=5).tolist()
    rounds.begin(1, prompt(1, seed=5))
    go_on(3)
    assert all(texts_of(rounds)[place] == text for place, text in texts.items())


@pytest.mark.parametrize("tree", [None, Tree.chain(2)])
def test_nothing_is_kept_where_nothing_is_copied(target: CausalModel, tree: Tree | None) -> None:
    network = network_for(CONFIGS["eagle3"], target)
    assert Rounds(target, network, block=network.block, capacity=256, tree=tree).written is None
