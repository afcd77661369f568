"""The facts of a summary: where they stand, which token decides each, and the same summary with other values."""

from collections.abc import Sequence
from typing import NamedTuple

from minqstar.world.automaton import FactValue
from minqstar.world.posts import Post
from minqstar.world.tldr import World


class Slot(NamedTuple):
    """A fact's place in a summary: tokens start..stop, and the first token there that rules out the right value."""

    fact: str
    start: int
    stop: int
    decisive: int | None  # None where the value is right


def slots(world: World, post: Post, tokens: list[int]) -> list[Slot]:
    """The facts of a summary of the grammar, in their order."""
    automaton, found = world.automata[post.scenario], []
    for i, (state, action) in enumerate(zip(*automaton.walk(tokens), strict=True)):
        option = automaton.options[automaton.pays[state, action]]
        if isinstance(option, FactValue):
            spelled = world.tokenizer.encode(option.value)
            spaced = world.tokenizer.encode(" " + option.value)
            space = " " * (tokens[i + 1 - len(spaced) : i + 1] == spaced)
            start = i + 1 - len(spaced if space else spelled)
            right = world.tokenizer.encode(space + post.facts[option.fact])
            pairs = enumerate(zip(tokens[start : i + 1], right, strict=False))
            wrong = option.value != post.facts[option.fact]
            found.append(
                Slot(option.fact, start, i + 1, next(start + j for j, (a, b) in pairs if a != b) if wrong else None)
            )
    return found


def with_facts(world: World, post: Post, tokens: list[int], facts: dict[str, str]) -> list[int]:
    """The same summary with other values in the slots of some facts."""
    out = list(tokens)
    for slot in reversed(slots(world, post, tokens)):
        if slot.fact in facts:
            space = " " * world.tokenizer.decode(tokens[slot.start : slot.stop]).startswith(" ")
            out[slot.start : slot.stop] = world.tokenizer.encode(space + facts[slot.fact])
    return out


def wrong_value(post: Post, world: World, fact: str) -> str:
    """A value of the fact's kind that the post nowhere states: never another fact's, the likelier mistake."""
    values = world.automata[post.scenario].scenario.facts[fact]
    far = values.index(post.facts[fact]) + len(values) // 2
    others = [values[(far + i) % len(values)] for i in range(len(values))]
    return next(value for value in others if value not in post.facts.values())


class Edited(NamedTuple):
    """A post's summary with all facts right, and with the first one and two of `facts` wrong."""

    post: Post
    facts: tuple[str, str]
    versions: tuple[list[int], list[int], list[int]]


def edited(world: World, post: Post, summary: list[int], facts: Sequence[str] = ()) -> Edited | None:
    """The summary made right, then wrong in two facts (the first two that it states, or those given).

    None if it does not state them.
    """
    stated = list(dict.fromkeys(slot.fact for slot in slots(world, post, summary)))
    chosen = tuple(facts or stated[:2])
    if len(chosen) < 2 or not set(chosen) <= set(stated):
        return None
    right = with_facts(world, post, summary, post.facts)
    wrong = {fact: wrong_value(post, world, fact) for fact in chosen}
    one = with_facts(world, post, right, {chosen[0]: wrong[chosen[0]]})
    return Edited(post, chosen, (right, one, with_facts(world, post, right, wrong)))
