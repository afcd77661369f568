"""Posts of the TL;DR world: drawn, written, and read back."""

import random
import re
import zlib
from dataclasses import dataclass

from minqstar.world.grammar import Scenario


def known_scenarios() -> tuple[Scenario, ...]:
    """The world's. They are checked when they are made: at the first call, so that a command can say what is wrong."""
    from minqstar.world.scenarios import SCENARIOS

    return SCENARIOS


@dataclass(frozen=True)
class Post:
    """One prompt of the world and what it says."""

    scenario: str
    subreddit: str
    facts: dict[str, str]
    prompt: str


def draw_post(rng: random.Random, split: str) -> Post:
    """A random post whose facts belong to the split: train, validation and test share no set of facts."""
    while True:
        scenario = rng.choice(known_scenarios())
        facts = {fact: rng.choice(values) for fact, values in scenario.facts.items()}
        bucket = zlib.crc32(repr((scenario.name, sorted(facts.items()))).encode()) % 16
        kinds_differ = all(
            facts[f] != facts[g] for f in facts for g in facts if f < g and scenario.facts[f] == scenario.facts[g]
        )
        if kinds_differ and {0: "validation", 1: "test"}.get(bucket, "train") == split:
            break
    subreddit = rng.choice(scenario.subreddits)
    sentences = [rng.choice(wordings) for wordings in scenario.sentences]
    sentences += rng.sample(scenario.chatter, rng.randint(2, 3))
    rng.shuffle(sentences)
    body = " ".join(sentences).format(**facts)
    prompt = f"SUBREDDIT: r/{subreddit} TITLE: {rng.choice(scenario.titles)} POST: {body} TL;DR:"
    return Post(scenario.name, subreddit, facts, prompt)


def read_post(prompt: str | list[dict] | None) -> Post | None:
    """The post that a text states, or None if the world cannot have written it, as of a conversation."""
    head = isinstance(prompt, str) and re.match(r"SUBREDDIT: r/(\w+) ", prompt)
    scenario = next((s for s in known_scenarios() if head and head[1] in s.subreddits), None)
    if scenario is None:
        return None
    facts = {}
    for fact in scenario.facts:
        found = re.search(scenario.pattern(fact), prompt)
        if found is None:
            return None
        facts[fact] = next(filter(None, found.groups()))
    return Post(scenario.name, head[1], facts, prompt)


def post_of(row: dict) -> Post | None:
    """The post of a row that `draw_rows` made, or of any row whose prompt the world could have written."""
    scenarios = {scenario.name: scenario for scenario in known_scenarios()}
    match row.get("facts"):
        case {"scenario": str(name), "subreddit": str(subreddit), **facts} if name in scenarios:
            known = scenarios[name].facts
            fits = facts.keys() == known.keys() and all(facts[fact] in values for fact, values in known.items())
            if fits and subreddit in scenarios[name].subreddits:
                return Post(name, subreddit, facts, row["prompt"])
    return read_post(row.get("prompt"))
