"""A grammar spelled in tokens: the automaton that all posts of a scenario share, and each post's `TokenMDP`.

Every alternative and every value of a fact becomes a token sequence; sequences that start alike share states until
they part. Each string has one derivation, and no alternative is a prefix of another, so the automaton is
deterministic and the MDP exact. Rewards sit on the last token of what they pay for.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minqstar.lm.tokenizer import Tokenizer
from minqstar.theory.mdp import TokenMDP
from minqstar.world.grammar import EPS, Option, Scenario, payments
from minqstar.world.posts import Post

CLASSES = ("forced", "fact", "clause", "filler")  # what a token decides


class FactValue(NamedTuple):
    """A fact slot's alternative."""

    fact: str
    value: str


def spoken(option: Option | FactValue) -> str:
    return option.value if isinstance(option, FactValue) else option.text or "the end"


def pieces(text: str) -> list[str]:
    """Literal, slot, literal, …: the pieces of an option's text. A slot takes the space before it."""
    return re.split(r"( ?\{\w+\})", text)


class Automaton:
    """A scenario's grammar in tokens: what the `TokenMDP`s of all its posts share.

    An arc (state, token) stands for some *options*: alternatives of a grammar node, or values of a fact. A post
    gives every option a weight and a reward; pi_ref of an arc is the weight of its options over its state's.
    UserError if the vocabulary spells two alternatives so that they cannot be told apart, or joins two texts.
    """

    def __init__(self, scenario: Scenario, tokenizer: Tokenizer):
        self.scenario, self.tokenizer = scenario, tokenizer
        self.options: list[Option | FactValue] = [Option((1.0, 1.0), "", None)]  # 0: what is certain
        self._states: list[tuple[str, list]] = []  # (class or fact, arcs (token, target, options, paid option))
        self._nodes: dict[str | None, int] = {None: -1}  # -1: the terminal state
        self._values = {
            fact: self._add([FactValue(fact, v) for v in values]) for fact, values in scenario.facts.items()
        }
        self._node("start")
        self._check_joints()
        self._tabulate()

    def _add(self, options: list) -> range:
        self.options += options
        return range(len(self.options) - len(options), len(self.options))

    def _node(self, name: str | None) -> int:
        """The state in which a node's alternatives part."""
        if name not in self._nodes:
            spelled = []
            alternatives = list(self._alternatives(name))
            for index, option in zip(self._add(alternatives), alternatives, strict=True):
                literal, *rest = pieces(option.text)
                tokens = self.tokenizer.encode(literal) if option.text else [self.tokenizer.eos]
                spelled.append((tokens, self._chain(rest, option.next), index))
            self._nodes[name] = self._trie(spelled)
        return self._nodes[name]

    def _alternatives(self, name: str, scale: tuple[float, float] = (1.0, 1.0)) -> Iterator[Option]:
        """A node's options, the one that says nothing replaced by what may follow it."""
        for option in self.scenario.grammar[name]:
            weights = (option.weights[0] * scale[0], option.weights[1] * scale[1])
            if option.text or option.next is None:
                yield option._replace(weights=weights)
            else:
                yield from self._alternatives(option.next, weights)

    def _chain(self, pieces: list[str], node: str | None) -> int:
        """The state before `slot, literal, slot, literal, …` and then a node."""
        if not pieces:
            return self._node(node)
        slot, literal, *rest = pieces
        after = self._chain(rest, node)
        if literal:
            after = self._trie([(self.tokenizer.encode(literal), after, 0)])
        fact, space = slot.strip(" {}"), " " * slot.startswith(" ")
        spelled = [(self.tokenizer.encode(space + self.options[i].value), after, i) for i in self._values[fact]]
        return self._trie(spelled, fact)

    def _trie(self, spelled: list[tuple[list[int], int, int]], fact: str = "") -> int:
        """The state from which token sequences part, each leading to a target and standing for an option."""
        branches: dict[int, list] = {}
        for tokens, target, option in spelled:
            branches.setdefault(tokens[0], []).append((tokens[1:], target, option))
        arcs = []
        for token, branch in branches.items():
            options = [option for _, _, option in branch]
            if all(rest for rest, _, _ in branch):
                arcs.append((token, self._trie(branch, fact), options, 0))
            elif len(branch) == 1:
                arcs.append((token, branch[0][1], options, options[0]))
            else:
                texts = " and ".join(repr(spoken(self.options[o])) for o in options)
                problem = "one begins with the other, token by token; word them so that they part"
                self.scenario.require(False, f"alternatives {texts}", f"not prefix-free: {problem}")
        fillers = any(isinstance(o := self.options[i], Option) and o.kind == "filler" for _, _, i in spelled)
        kind = "forced" if len(arcs) == 1 else fact or ("filler" if fillers else "clause")
        self._states.append((kind, arcs))
        return len(self._states) - 1

    def _check_joints(self):
        """A text has one tokenisation only if what is written side by side is tokenised alike apart and joined."""
        encode, values = lru_cache(maxsize=None)(self.tokenizer.encode), self.scenario.facts

        def written(piece: str) -> list[str]:  # what may stand in the place of a piece
            space, fact = " " * piece.startswith(" "), piece.strip(" {}")
            return [space + value for value in values[fact]] if piece.endswith("}") else [piece]

        for name, options in self.scenario.grammar.items():
            for option in options:
                parts = [piece for piece in pieces(option.text) if piece]
                after = [pieces(o.text)[0] for o in self._alternatives(option.next) if o.text] if parts else []
                for left, right in (*pairwise(parts), *((parts[-1], first) for first in after)):
                    for a, b in product(written(left), written(right)):
                        alike = encode(a + b) == encode(a) + encode(b)
                        problem = "joined they are other tokens than apart; begin the second with a space"
                        self.scenario.require(alike, f"node {name!r}, {a!r} before {b!r}", problem)

    def _tabulate(self):
        """States were made last first; number them in topological order and write the shared arrays."""
        S, A = len(self._states), max(len(arcs) for _, arcs in self._states)
        self.token = torch.full((S, A), -1)
        self.next = torch.full((S, A), S)
        self.arc_of: list[dict[int, int]] = []  # for each state, token -> action
        self.kind = [kind if kind in CLASSES else "fact" for kind, _ in reversed(self._states)]
        self.pays = torch.zeros(S, A, dtype=torch.long)  # the option that an arc completes, or 0
        places, members = [], []
        for s, (_, arcs) in enumerate(reversed(self._states)):
            self.arc_of.append({token: a for a, (token, _, _, _) in enumerate(arcs)})
            for a, (token, target, options, paid) in enumerate(arcs):
                self.token[s, a], self.next[s, a], self.pays[s, a] = token, S - 1 - target, paid
                members += [(o, len(places)) for o in options]
                places.append((s, a))
        self._arc_state, self._arc_action = torch.tensor(places).T
        self._membership = torch.zeros(len(self.options), len(places), dtype=torch.float64)
        self._membership[tuple(torch.tensor(members).T)] = 1.0

    def _weights_and_rewards(self, posts: list[Post], eps: float, paid: dict[str, float]) -> tuple[Tensor, Tensor]:
        """Of each post's options, both (N, options)."""
        weights = np.zeros((len(posts), len(self.options)))
        rewards = np.zeros_like(weights)
        nodes = [(i, o) for i, o in enumerate(self.options) if isinstance(o, Option)]
        columns = [i for i, _ in nodes]
        by_subreddit = np.array([o.weights for _, o in nodes])
        subreddit = [self.scenario.subreddits.index(post.subreddit) for post in posts]
        weights[:, columns] = by_subreddit.T[subreddit]
        rewards[:, columns] = [paid[o.kind] for _, o in nodes]
        rows = np.arange(len(posts))
        for fact, values in self.scenario.facts.items():
            first = self._values[fact].start
            right = first + np.array([values.index(post.facts[fact]) for post in posts])
            twin = next((f for f, v in self.scenario.facts.items() if v == values and f != fact), None)
            others = len(values) - 1 - (twin is not None)
            weights[:, self._values[fact]] = eps / others * (0.5 if twin else 1.0)
            if twin:  # half of the mistakes take the other fact of the same kind
                weights[rows, first + np.array([values.index(post.facts[twin]) for post in posts])] = eps / 2
            weights[rows, right] = 1 - eps
            rewards[:, self._values[fact]] = paid["wrong"]
            rewards[rows, right] = paid["right"]
        return torch.from_numpy(weights), torch.from_numpy(rewards)

    def mdp(self, posts: list[Post], eps: float | None = None, paid: dict[str, float] | None = None) -> TokenMDP:
        """The MDPs of N posts of this scenario: log_ref and reward are (N, S, A).

        By default of the world as it is. `eps` is pi_ref's chance of a wrong value, and `paid` what right and wrong
        values and the kinds of alternatives earn, reward units, with the keys of `payments`.
        """
        weights, rewards = self._weights_and_rewards(posts, EPS if eps is None else eps, paid or payments())
        arc_mass = weights @ self._membership  # (N, arcs)
        state_mass = torch.zeros(len(posts), len(self.token), dtype=torch.float64)
        state_mass.index_add_(1, self._arc_state, arc_mass)
        log_ref = torch.full((len(posts), *self.token.shape), -torch.inf, dtype=torch.float64)
        log_ref[:, self._arc_state, self._arc_action] = (arc_mass / state_mass[:, self._arc_state]).log()
        return TokenMDP(self.token, self.next, log_ref, rewards[:, self.pays])

    def masses(self, posts: list[Post], eps: float) -> Tensor:
        """The mass (N, S, A) of the options that each arc stands for, linear in eps: pi_ref is an arc's share of it."""
        weights, _ = self._weights_and_rewards(posts, eps, payments())
        mass = torch.zeros(len(posts), *self.token.shape, dtype=torch.float64)
        mass[:, self._arc_state, self._arc_action] = weights @ self._membership
        return mass

    def walk(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """The states and actions of a token sequence, up to where it leaves the grammar."""
        states, actions, s = [], [], 0
        for token in tokens:
            if s == len(self.token) or token not in self.arc_of[s]:
                break
            states.append(s)
            actions.append(self.arc_of[s][token])
            s = int(self.next[s, actions[-1]])
        return states, actions
