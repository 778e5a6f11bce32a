"""Trees of proposed tokens: several continuations in one pass, of which the target's own choice takes one path.

A tree is fixed before a request. Each node stands for the token that the draft finds r-th likeliest after the tokens on
the way to it, so a path of ranks names a node, and how often the target's own continuation has these ranks says what
the node is worth: the best tree of n nodes is that of the n most frequent paths, each of which comes with all its
beginnings (as in Sequoia, Chen et al. 2024, section 3.1, but with paths counted instead of assumed independent).

Beside what the draft proposes a tree may have one more branch from the anchor: a chain of tokens copied from the text
itself, namely what followed where its end stood before (`inference.graphed.written`). Drafted paths are then worth what
they add to that.

Greedy verification of a tree is exact: what stands is the target's own choice after each token on its way, so what is
emitted is the target's own sequence whatever the tree is. A copied token may be a drafted one once more; of the ways
that stand the longest is taken. So is sampling by noise that is drawn beforehand, one set of numbers for each position:
the target's draw is then a choice too, and the draft proposes what would win by the same numbers (Gumbel coupling;
Daliri et al. 2024, arXiv 2408.07978).

Letters in shapes: N nodes, of which the last L are copied, W = N + 1 tokens of a pass, the anchor first; D depth; R
requests.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.errors import InputError

Path = tuple[int, ...]
"""Ranks on the way from the anchor to a node, 0 for the likeliest."""


@dataclass(frozen=True)
class Tree:
    """What is proposed in a round.

    Attributes:
        paths: of the nodes that are drafted, by depth and then by ranks; every beginning of one is another.
        lookup: L, tokens of the branch that is copied from the text; 0 for none. Its nodes come after the drafted ones.

    Raises:
        ValueError: no drafted nodes, a path whose beginning is missing, a path twice, or another order; a negative L.
    """

    paths: tuple[Path, ...]
    lookup: int = 0

    def __post_init__(self) -> None:
        known = set(self.paths)
        if not known or len(known) < len(self.paths) or list(self.paths) != sorted(known, key=_level_order):
            raise ValueError("a tree has nodes, each once, by depth")
        if any(not path or min(path) < 0 or (path[:-1] and path[:-1] not in known) for path in known):
            raise ValueError("a path of a tree lacks a beginning")
        if self.lookup < 0:
            raise ValueError(f"a tree copies {self.lookup} tokens")

    @classmethod
    def of(cls, paths: Iterable[Sequence[int]], *, lookup: int = 0) -> "Tree":
        """The tree of these paths, in any order, and of so many copied tokens."""
        return cls(tuple(sorted({tuple(path) for path in paths}, key=_level_order)), lookup)

    @classmethod
    def chain(cls, length: int, *, lookup: int = 0) -> "Tree":
        """One path of the likeliest tokens, and so many copied ones."""
        return cls(tuple((0,) * depth for depth in range(1, length + 1)), lookup)

    @property
    def size(self) -> int:
        """N, drafted and copied."""
        return len(self.paths) + self.lookup

    @property
    def depth(self) -> int:
        """D, tokens of the longest way, drafted or copied."""
        return max(self.drafted_depth, self.lookup)

    @property
    def drafted_depth(self) -> int:
        """Tokens of the longest path, which is what the draft goes on to."""
        return len(self.paths[-1])

    @property
    def parents(self) -> list[int]:
        """Of each node, counted from 1: 0 is the anchor."""
        place = {path: node for node, path in enumerate(self.paths, start=1)}
        copied = [0, *range(len(self.paths) + 1, self.size)]
        return [*(place.get(path[:-1], 0) for path in self.paths), *copied[: self.lookup]]

    @property
    def most_children(self) -> int:
        """Rank of the least likely token asked for, and one: what the draft's vocabulary must hold."""
        return 1 + max(path[-1] for path in self.paths)

    def within(self, *, depth: int, children: int) -> "Tree | None":
        """Its drafted nodes down to some depth, of so many children of a node, and all that is copied; None for no
        drafted nodes.

        Args:
            depth: most tokens of a path.
            children: ranks below this are kept.
        """
        paths = tuple(path for path in self.paths if len(path) <= depth and max(path) < children)
        return Tree(paths, self.lookup) if paths else None

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {"paths": [list(path) for path in self.paths], "lookup": self.lookup}

    @classmethod
    def from_json(cls, data: Any, *, where: str) -> "Tree":
        """Read what `to_json` wrote.

        Raises:
            InputError: no tree.
        """
        try:
            if not isinstance(data, dict) or not {"paths", "lookup"} <= data.keys():
                raise ValueError("it has paths and a lookup")
            paths = [[int(rank) for rank in path] for path in data["paths"]]
            return cls.of(paths, lookup=int(data["lookup"]))
        except (TypeError, ValueError) as error:
            raise InputError(f"the tree is off: {error}", where=where, mend="publish the pair again") from None


def _level_order(path: Path) -> tuple[int, Path]:
    return len(path), path


class Continuations:
    """What the target went on with after each anchor of its greedy answers, as ranks in the draft's rows, and how much
    of it could be copied.

    Args:
        most_rank: ranks from here on are not told apart: no tree wants so many children of a node.
    """

    def __init__(self, most_rank: int = 16) -> None:
        self._most_rank = most_rank
        self._answers: list[list[tuple[Path, int]]] = []

    def add(self, ranks: Sequence[Sequence[int]], copied: Sequence[int] | None = None) -> None:
        """Count one answer.

        Args:
            ranks: of every anchor, those of the tokens after it; -1 where the draft cannot propose one. What is longer
                than the answer goes on is not looked at.
            copied: of every anchor, how many of the tokens after it a look-up gets right, up to as many as any tree is
                to copy; None for none at all.
        """
        answer = []
        for anchor, (row, right) in enumerate(zip(ranks, copied or [0] * len(ranks), strict=True)):
            known = [rank if 0 <= rank < self._most_rank else -1 for rank in row[: len(ranks) - anchor]]
            path = tuple(known[: known.index(-1)] if -1 in known else known)
            answer.append((path, min(right, len(ranks) - anchor)))
        self._answers.append(answer)

    def best(self, nodes: int, *, depth: int, lookup: int = 0) -> Tree:
        """The tree of the most frequent paths; fewer nodes where fewer were seen, a chain of one where none was.

        A path is counted where the draft goes further by it than the copied tokens do.

        Args:
            nodes: that are drafted, at least 1.
            depth: most tokens of a path.
            lookup: L.
        """
        counts: Counter[Path] = Counter()
        for path, copied in itertools.chain.from_iterable(self._answers):
            way = path[:depth]
            if len(way) > min(copied, lookup):
                counts.update(way[:end] for end in range(1, len(way) + 1))
        found = sorted(counts, key=lambda path: (-counts[path], len(path), path))
        # A path is no more frequent than its beginnings, and comes after them where it is as frequent.
        return Tree.of(found[:nodes] or [(0,)], lookup=lookup)

    def tau(self, tree: Tree) -> float:
        """Tokens of a round where these answers are decoded with a tree: exact, as each is the only one there is."""
        known, tokens, rounds = set(tree.paths), 0, 0
        for answer in self._answers:
            anchor = 0
            while anchor < len(answer):
                path, copied = answer[anchor]
                drafted = next((d for d in range(len(path)) if path[: d + 1] not in known), len(path))
                anchor += 1 + max(drafted, min(copied, tree.lookup))
                rounds += 1
            tokens += len(answer)
        return tokens / max(1, rounds)


@dataclass(frozen=True)
class Level:
    """One step of drafting a tree: the tokens whose children are proposed.

    Attributes:
        depth: of these tokens; 0 is the anchor.
        count: how many of them have children.
        among: int64 `[count]`, where they are among all nodes of their depth; None where they are all.
        before: int64 `[count]`, where their parents are among those of the level before; None where they are as many
            in the same order.
        first: of these tokens among all that are read while drafting; the anchor's step reads nothing new.
        row: of these tokens among those of all levels, the anchor first.
        children: most children of one.
        taken: int64 `[nodes of the next depth]`, `children` times the place of the parent plus the rank; None where
            these are all there are.
    """

    depth: int
    count: int
    among: Tensor | None
    before: Tensor | None
    first: int
    row: int
    children: int
    taken: Tensor | None


class TreePlan:
    """A tree as tensors, for rounds of fixed shapes.

    Args:
        tree: what is proposed.
        device: where the rounds run.

    Attributes:
        tree: as given.
        levels: the steps of drafting it; what is copied is no part of them.
        depths: int64 `[W]`, of the anchor and the nodes.
        parents: int64 `[W]`; the anchor's is itself.
        above: bool `[W, W]`, which tokens lie on the way to one, itself included.
        seen: bool `[W, W + 2]`, what a token sees in the pass that verifies: the context, the tokens of the pass, what
            is beyond.
        drafting: bool `[1 + E, E + 2]`, what a token that has children sees while the tree is drafted: the context,
            each of the E tokens read, what is beyond. The anchor, which reads nothing new, comes first.
        ways: int64 `[W, D + 1]`, the tokens on the way to one, the last repeated.
    """

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self.tree = tree
        parents, drafted = [0, *tree.parents], 1 + len(tree.paths)
        depths = [0, *(len(path) for path in tree.paths), *range(1, tree.lookup + 1)]
        ways: list[list[int]] = [[0]]
        for node in range(1, len(parents)):
            ways.append([*ways[parents[node]], node])
        above = torch.zeros(len(parents), len(parents), dtype=torch.bool)
        for node, way in enumerate(ways):
            above[node, way] = True
        self.depths, self.parents = torch.tensor(depths, device=device), torch.tensor(parents, device=device)
        self.above, self.seen = above.to(device), _with_ends(above).to(device)
        self.ways = torch.tensor([[*way, *[way[-1]] * (tree.depth + 1 - len(way))] for way in ways], device=device)
        self.levels = _levels(tree, parents[:drafted], depths[:drafted], device)
        inner = sorted(set(parents[:drafted]), key=lambda node: (depths[node], node))
        self.drafting = _with_ends(above[inner][:, inner[1:]]).to(device)

    @property
    def entries(self) -> int:
        """E, tokens read while drafting."""
        return self.drafting.shape[0] - 1


def _levels(tree: Tree, parents: list[int], depths: list[int], device: torch.device) -> list[Level]:
    by_depth = [[node for node, own in enumerate(depths) if own == depth] for depth in range(tree.drafted_depth + 1)]
    inner = [[node for node in nodes if node in set(parents[1:])] for nodes in by_depth[:-1]]
    levels, row = [], 0
    for depth, nodes in enumerate(inner):
        following = by_depth[depth + 1]
        ranks = [tree.paths[node - 1][-1] for node in following]
        children = 1 + max(ranks)
        taken = [nodes.index(parents[node]) * children + rank for node, rank in zip(following, ranks, strict=True)]
        before = [inner[depth - 1].index(parents[node]) for node in nodes] if depth else [0]
        levels.append(
            Level(
                depth=depth,
                count=len(nodes),
                among=_places([by_depth[depth].index(node) for node in nodes], len(by_depth[depth]), device),
                before=_places(before, len(inner[depth - 1]) if depth else 1, device),
                first=row - 1,
                row=row,
                children=children,
                taken=_places(taken, len(nodes) * children, device),
            )
        )
        row += len(nodes)
    return levels


def _places(places: list[int], count: int, device: torch.device) -> Tensor | None:
    """Places among so many; None where it is all of them in order."""
    return None if places == list(range(count)) else torch.tensor(places, device=device)


def _with_ends(above: Tensor) -> Tensor:
    """A column for the context, which all see, in front, and one for what is beyond, which none sees, behind."""
    rows = above.shape[0]
    return torch.cat([torch.ones(rows, 1, dtype=torch.bool), above, torch.zeros(rows, 1, dtype=torch.bool)], dim=1)
