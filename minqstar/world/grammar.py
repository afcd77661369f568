"""What a scenario of the TL;DR world is, what is paid for in it, and the check that it passes when it is made.

A post states each fact in one of several wordings. A grammar is a graph of nodes; a node is a choice among
alternatives `option(weight, text, next node)`. A weight may be a pair, one for each of the two subreddits. An
empty text skips to the next node, or ends the summary (EOS) where there is none. `{fact}` is a slot, which pi_ref
fills with the right value most of the time.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minqstar.errors import require

EPS = 0.25  # pi_ref's chance of a wrong value in a fact slot
RIGHT, WRONG = 0.5, -1.0  # of a fact, reward units
PAID = {"clause": 0.3, "filler": -0.4, "": 0.0}  # of an alternative by its kind, reward units
FEWEST = 100  # sets of facts: train, validation and test share none


def payments() -> dict[str, float]:
    """What a right and a wrong value of a fact, and the kinds of alternatives, earn, reward units."""
    return PAID | {"right": RIGHT, "wrong": WRONG}


class Option(NamedTuple):
    """One alternative of a grammar node."""

    weights: tuple[float, float]  # probability in the scenario's first and second subreddit
    text: str
    next: str | None  # the node that follows; None after EOS
    kind: str = ""  # a key of PAID


def option(weight: float | tuple[float, float], text: str, next: str | None, kind: str = "") -> Option:
    return Option(weight if isinstance(weight, tuple) else (weight, weight), text, next, kind)


def endings(*fillers: str) -> dict[str, list[Option]]:
    """Nodes `end` and `end2`: at most two filler sentences, then EOS."""
    share = 0.36 / len(fillers)
    return {
        "end": [option(0.64, "", None), *(option(share, filler, "end2", "filler") for filler in fillers)],
        "end2": [option(0.64, "", None), *(option(share, filler, "stop", "filler") for filler in fillers)],
        "stop": [option(1.0, "", None)],
    }


def slots_of(text: str) -> list[str]:
    """The facts whose slots a text holds."""
    return re.findall(r"\{(\w+)\}", text)


def repeated(texts: Sequence[str]) -> str | None:
    """The first text that stands there before."""
    return next((text for i, text in enumerate(texts) if text in texts[:i]), None)


@dataclass(frozen=True)
class Scenario:
    """What some posts are about. UserError, one line, if anything in it is wrong; `Automaton` checks its tokens."""

    name: str
    subreddits: tuple[str, str]
    titles: tuple[str, ...]
    facts: dict[str, tuple[str, ...]]  # fact -> the values it may take; two facts of one kind have the same
    sentences: tuple[tuple[str, ...], ...]  # for each sentence its wordings
    chatter: tuple[str, ...]  # sentences that state no fact; a post has two or three of them
    grammar: dict[str, list[Option]]  # the summary begins at the node `start`

    def __post_init__(self):
        check_texts(self)
        check_facts(self)
        check_reading(self)
        for name in self.grammar:
            check_node(self, name)
        check_paths(self)

    def require(self, condition: bool, where: str, message: str):
        """UserError that says where in the scenario."""
        require(condition, f"scenario {self.name!r}, {where}: {message}")

    def pattern(self, fact: str) -> str:
        """A regular expression for all wordings of a fact; the group that matched holds the value."""

        def values(slot: re.Match) -> str:
            either = "|".join(map(re.escape, self.facts[slot[1]]))
            return f"({either})" if slot[1] == fact else f"(?:{either})"

        wordings = [w for sentence in self.sentences for w in sentence if fact in slots_of(w)]
        return "|".join(re.sub(r"\\\{(\w+)\\\}", values, re.escape(w)) for w in wordings)


def check_texts(s: Scenario):
    """Names, titles, wordings and chatter: enough of them, none twice, slots only where facts are stated."""
    for word in (s.name, *s.subreddits, *s.facts):
        s.require(bool(re.fullmatch(r"\w+", word)), f"{word!r}", "a name must be one word of letters, digits and _")
    wordings = tuple(wording for sentence in s.sentences for wording in sentence)
    several = {"subreddits": (s.subreddits, 2), "titles": (s.titles, 1), "chatter": (s.chatter, 3)}
    for what, (texts, fewest) in (several | {"sentences": (wordings, 1)}).items():
        s.require(len(texts) >= fewest, what, f"want at least {fewest}, got {len(texts)}")
        twice = repeated(texts)
        s.require(twice is None, what, f"{twice!r} stands there twice; remove one")
    s.require(len(s.subreddits) == 2, "subreddits", f"want two, got {len(s.subreddits)}")
    for text in (*s.titles, *s.chatter):
        s.require(not set(text) & set("{}"), f"{text!r}", "titles and chatter state no facts; remove the braces")
    for text in (*wordings, *(option.text for options in s.grammar.values() for option in options)):
        s.require(not set(re.sub(r"\{\w+\}", "", text)) & set("{}"), f"{text!r}", "write a slot as {fact}")
        unknown = next((fact for fact in slots_of(text) if fact not in s.facts), None)
        s.require(unknown is None, f"{text!r}", f"there is no fact {unknown!r}; the facts are {', '.join(s.facts)}")


def check_facts(s: Scenario):
    """Enough values, none twice, and at most two facts of one kind."""
    for fact, values in s.facts.items():
        where, kind = f"fact {fact!r}", [f for f, others in s.facts.items() if others == values]
        s.require(fact not in ("scenario", "subreddit"), where, "this name is taken; choose another")
        s.require(len(kind) <= 2, where, f"{', '.join(kind)} have the same values; at most two facts may")
        s.require(len(values) > len(kind), where, f"want more than {len(kind)} values, got {len(values)}")
        twice = repeated(values)
        s.require(twice is None, where, f"{twice!r} stands there twice; remove one")
        odd = next((value for value in values if value != value.strip() or not value or set(value) & set("{}")), None)
        s.require(odd is None, where, f"{odd!r} is empty, holds a brace, or begins or ends with a space")
    sets = math.prod(map(len, s.facts.values()))
    message = f"only {sets} sets of values, too few for train, validation and test; give {FEWEST} or more"
    s.require(sets >= FEWEST, "facts", message)


def check_reading(s: Scenario):
    """Every post states every fact, and no sentence is taken for the statement of another one."""
    for fact in s.facts:
        stated = any(all(fact in slots_of(wording) for wording in sentence) for sentence in s.sentences)
        s.require(
            stated, f"fact {fact!r}", f"a post may leave it out: give it a sentence with {{{fact}}} in each wording"
        )
        pattern = re.compile(s.pattern(fact))
        for text in (*s.titles, *s.chatter, *(wording for sentence in s.sentences for wording in sentence)):
            slots = slots_of(text)
            for i in range(max((len(s.facts[slot]) for slot in slots), default=1)):
                filled = {slot: s.facts[slot][i % len(s.facts[slot])] for slot in slots}
                found = pattern.search(text.format(**filled))
                read = found and next(filter(None, found.groups()))
                said = f"{text.format(**filled)!r} is read as {fact} = {read}; word it otherwise"
                s.require(read == filled.get(fact), f"fact {fact!r}", said)


def check_node(s: Scenario, name: str):
    """The options of a node, one by one, and that their weights are a distribution."""
    where, options = f"node {name!r}", s.grammar[name]
    for o in options:
        at = f"{where}, option {o.text!r}"
        s.require(o.kind in PAID, at, f"the kind {o.kind!r} is unknown; it must be one of {list(PAID)}")
        s.require(o.next is None or o.next in s.grammar, at, f"leads to {o.next!r}, which is no node of the grammar")
        s.require(not re.match(r" ?\{", o.text), at, "begins with a slot; put a word before it")
        s.require(not o.text or o.next is not None, at, "ends the summary; lead to a node whose option has no text")
        s.require(bool(o.text) or o.next is None or not o.kind, at, "says nothing, so it cannot be paid; drop its kind")
        s.require(all(0 < w <= 1 for w in o.weights), at, f"its weight must be above 0 and at most 1, got {o.weights}")
    for place, subreddit in enumerate(s.subreddits):
        total = math.fsum(o.weights[place] for o in options)
        s.require(abs(total - 1) < 1e-9, where, f"the weights in r/{subreddit} must sum to 1, not to {total:g}")


def check_paths(s: Scenario):
    """Every node is on some path from `start`, and no path is endless."""
    s.require("start" in s.grammar, "grammar", "there is no node 'start'; the summary begins there")
    done: set[str] = set()

    def walk(node: str, path: tuple[str, ...]):
        s.require(node not in path, f"node {node!r}", f"a loop: {' -> '.join((*path, node))}; a summary must end")
        if node not in done:
            for following in {o.next: None for o in s.grammar[node] if o.next}:
                walk(following, (*path, node))
            done.add(node)

    walk("start", ())
    lost = [name for name in s.grammar if name not in done]
    s.require(not lost, f"node {lost and lost[0]!r}", "nothing leads there; lead an option to it, or remove it")


def together(*scenarios: Scenario) -> tuple[Scenario, ...]:
    """The scenarios of a world. UserError if two have one name, or share a subreddit, by which a post is recognised."""
    subreddits = [name for s in scenarios for name in s.subreddits]
    for what, names in {"name": [s.name for s in scenarios], "subreddit": subreddits}.items():
        twice = repeated(names)
        require(twice is None, f"two scenarios have the {what} {twice!r}; rename one")
    return scenarios
