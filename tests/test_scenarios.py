"""A scenario is checked when it is made: each mistake in one clear line, and whatever passes is a world that works."""

import random
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT

from minqstar.errors import UserError
from minqstar.world import scenarios, tldr
from minqstar.world.automaton import Automaton
from minqstar.world.grammar import EPS, PAID, Scenario, endings, option, together
from minqstar.world.posts import draw_post, read_post
from minqstar.world.scenarios import JOB, SCENARIOS
from minqstar.world.tldr import World, world_hash

GOOD = Scenario(
    name="pet",
    subreddits=("pets", "vets"),
    titles=("My pet", "A question"),
    facts={"animal": tuple("cat dog hen pig cow fox".split()), "bought": tuple("123456"), "sold": tuple("123456")},
    sentences=(
        ("I have a {animal}.", "This is my {animal}."),
        ("It was bought in 201{bought} and sold in 201{sold}.", "Bought in 201{bought}, it was sold in 201{sold}."),
    ),
    chatter=("Hello.", "It is fun.", "So long."),
    grammar={
        "start": [option((0.5, 0.25), " My {animal}", "verb", "clause"), option((0.5, 0.75), "", "verb")],
        "verb": [option(0.5, " was sold in 201{sold}.", "end"), option(0.5, " came in 201{bought}.", "end")],
        **endings(" Thanks.", " Bye."),
    },
)


def test_the_example_is_sound(tokenizer, monkeypatch):
    """A scenario with two facts in a wording, twins that are equal and not identical, and a node to skip."""
    monkeypatch.setattr(scenarios, "SCENARIOS", (GOOD,))
    world, rng = World(tokenizer), random.Random(0)
    drawn = [draw_post(rng, "train") for _ in range(200)]
    assert all(read_post(post.prompt) == post and post.facts["bought"] != post.facts["sold"] for post in drawn)
    responses, returns = world.sample(drawn, np.random.default_rng(0))
    post = drawn[0]
    ((automaton, _, mdp),) = world.tables([post])
    mistaken = automaton.walk(tokenizer.encode_response(f" was sold in 201{post.facts['bought']}."))
    skipped = 0.5 if post.subreddit == "pets" else 0.75
    likely = skipped * 0.5 * EPS / 2 * 0.64  # half of the mistakes take the twin's value
    assert mdp.log_ref[0][mistaken].sum().exp().item() == pytest.approx(likely)
    for post, tokens, total in zip(drawn, responses, returns, strict=True):
        assert tokenizer.encode_response(tokenizer.decode(tokens)) == tokens
        assert world.judge(post, tokenizer.decode(tokens)).total == pytest.approx(total)


def changed(node: str = "verb", **changes) -> dict:
    """The example's grammar with one option more in a node, for which the others make room."""
    given = {"weight": 0.5, "text": " is here.", "next": "end"} | changes
    old = [o._replace(weights=(o.weights[0] / 2, o.weights[1] / 2)) for o in GOOD.grammar[node]]
    return {"grammar": GOOD.grammar | {node: [*old, option(**given)]}}


def facts(**changes) -> dict:
    return {"facts": GOOD.facts | changes}


MISTAKES = {
    "slot first": (changed(text="{animal} is here."), r"option '\{animal\} is here.': begins with a slot"),
    "slot after a space": (changed(text=" {animal} is here."), "begins with a slot; put a word before it"),
    "unknown node": (changed(next="nowhere"), "leads to 'nowhere', which is no node of the grammar"),
    "unknown fact": (changed(text=" is a {colour}."), "there is no fact 'colour'; the facts are animal, bought"),
    "unknown fact in a post": ({"sentences": (*GOOD.sentences, ("It is {colour}.",))}, "no fact 'colour'"),
    "unknown kind": (changed(kind="bonus"), "the kind 'bonus' is unknown; it must be one of"),
    "loop": (changed("end", next="start"), "a loop: start -> verb -> end -> start; a summary must end"),
    "loop of one": (changed("end", next="end"), "node 'end': a loop: start -> verb -> end -> end"),
    "unreachable": ({"grammar": GOOD.grammar | {"lost": [option(1.0, "", "end")]}}, "node 'lost': nothing leads there"),
    "no start": ({"grammar": endings(" Bye.")}, "there is no node 'start'"),
    "empty node": (
        {"grammar": GOOD.grammar | {"verb": []}},
        r"node 'verb': the weights in r/pets must sum to 1, not to 0",
    ),
    "weights of one subreddit": (changed(weight=(0.5, 0.4)), "the weights in r/vets must sum to 1, not to 0.9"),
    "weights beyond one": (changed(weight=0.7), "the weights in r/pets must sum to 1, not to 1.2"),
    "no weight": (changed(weight=0.0), "its weight must be above 0 and at most 1"),
    "no end": (changed(next=None), "ends the summary; lead to a node whose option has no text"),
    "silence paid": (changed(text="", kind="clause"), "says nothing, so it cannot be paid"),
    "brace": (changed(text=" is { animal }."), r"write a slot as \{fact\}"),
    "never stated": (facts(colour=("red", "blue")), "fact 'colour': a post may leave it out"),
    "seldom stated": ({"sentences": (("A {animal}.", "A pet."), GOOD.sentences[1])}, "fact 'animal': a post may leave"),
    "read wrongly": (
        {"sentences": (*GOOD.sentences, ("I have a {animal}.x",)), "chatter": (*GOOD.chatter, "I have a cat. Or not.")},
        "'I have a cat. Or not.' is read as animal = cat; word it otherwise",
    ),
    "cut short": (
        {**facts(animal=("cat", "cat fish", "dog")), "sentences": (("I have a {animal}",), GOOD.sentences[1])},
        "'I have a cat fish' is read as animal = cat; word it otherwise",
    ),
    "value twice": (facts(animal=("cat", "dog", "cat")), "fact 'animal': 'cat' stands there twice"),
    "odd value": (facts(animal=("cat", " dog")), "' dog' is empty, holds a brace, or begins or ends with a space"),
    "one value": (facts(animal=("cat",)), "fact 'animal': want more than 1 values, got 1"),
    "three of a kind": (
        facts(animal=tuple("123456")),
        "animal, bought, sold have the same values; at most two facts may",
    ),
    "taken name": (facts(scenario=("a", "b")), "fact 'scenario': this name is taken"),
    "few facts": (facts(animal=("cat", "dog")), "only 72 sets of values, too few for train, validation and test"),
    "wording twice": (
        {"sentences": (*GOOD.sentences, GOOD.sentences[0])},
        r"'I have a \{animal\}.' stands there twice",
    ),
    "title with a slot": ({"titles": ("My {animal}",)}, "titles and chatter state no facts; remove the braces"),
    "no title": ({"titles": ()}, "titles: want at least 1, got 0"),
    "little chatter": ({"chatter": GOOD.chatter[:2]}, "chatter: want at least 3, got 2"),
    "one subreddit": ({"subreddits": ("pets",)}, "subreddits: want at least 2, got 1"),
    "three subreddits": ({"subreddits": ("a", "b", "c")}, "subreddits: want two, got 3"),
    "odd name": ({"name": "my pet"}, "'my pet': a name must be one word of letters"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_in_a_scenario_is_one_clear_line(what):
    change, message = MISTAKES[what]
    with pytest.raises(UserError, match=message) as error:
        replace(GOOD, **change)
    assert str(error.value).startswith("scenario '") and "\n" not in str(error.value)


def test_a_mistake_in_the_worlds_own_file_is_one_clear_line_of_every_command(main_run):
    """Of those too whose modules import the world's: nothing is checked before a command is at work."""
    shutil.copytree(ROOT / "minqstar", main_run / "minqstar", ignore=shutil.ignore_patterns("__pycache__"))
    file = main_run / "minqstar/world/scenarios.py"
    file.write_text(file.read_text().replace(' to shoot {subject}", "price"', ' to shoot {subject}", "nowhere"'))
    env = ENVIRONMENT | {"PYTHONPATH": str(main_run)}
    for module, *options in (["minqstar.world.tldr"], ["minqstar.lab.credit", "--run", "dpo"]):
        line = [sys.executable, "-m", module, *options]
        done = subprocess.run(line, cwd=main_run, env=env, capture_output=True, text=True)
        where = "scenario 'camera', node 'shoot', option ' to shoot {subject}'"
        message = f"python -m {module}: {where}: leads to 'nowhere', which is no node of the grammar\n"
        assert (done.returncode, done.stderr) == (1, message)


UNCLEAR = {
    "prefix": (changed(text=" was sold"), r"alternatives ' was sold in 201\{sold\}.' and ' was sold': not prefix-free"),
    "twice": (changed(text=" came in 201{bought}."), "not prefix-free"),
    "twice by a skip": (changed("start", text=" came in 201{bought}."), "not prefix-free"),
    "two ends": (changed("end", text="", next=None), "alternatives 'the end' and 'the end': not prefix-free"),
    "values": (facts(animal=("cat", "cat fish", "dog", "hen")), "alternatives 'cat' and 'cat fish': not prefix-free"),
    "glued to a value": (changed(text=" is{animal}s."), "node 'verb', 'cat' before 's.': joined they are other"),
    "glued to a text": (changed(text=" is t", next="glue"), "node 'verb', ' is t' before 'he.': joined"),
}


@pytest.mark.parametrize("what", UNCLEAR)
def test_what_tokens_cannot_tell_apart_is_refused(what, tokenizer):
    """Only the vocabulary knows: alternatives that begin with each other, texts that melt together."""
    change, message = UNCLEAR[what]
    if what == "glued to a text":
        change["grammar"]["glue"] = [option(1.0, "he.", "end")]
    with pytest.raises(UserError, match=message) as error:
        Automaton(replace(GOOD, **change), tokenizer)
    assert str(error.value).startswith("scenario 'pet', ") and "\n" not in str(error.value)


def test_scenarios_are_told_apart_by_their_names():
    with pytest.raises(UserError, match="two scenarios have the name 'pet'"):
        together(GOOD, replace(GOOD, subreddits=("a", "b")))
    with pytest.raises(UserError, match="two scenarios have the subreddit 'vets'"):
        together(GOOD, replace(GOOD, name="other", subreddits=("a", "vets")))
    assert together(*SCENARIOS, GOOD) == (*SCENARIOS, GOOD)


@pytest.mark.parametrize("what", ["reward", "right", "wrong", "eps", "weight", "wording", "order of facts", "version"])
def test_the_hash_knows_all_that_decides_the_world(what, monkeypatch):
    before = world_hash()
    match what:
        case "reward":
            monkeypatch.setitem(PAID, "filler", -1.0)
        case "right" | "wrong" | "eps":
            monkeypatch.setattr(tldr, what.upper(), 0.1)
        case "version":
            monkeypatch.setattr(tldr, "WORLD_VERSION", 0)
        case _:
            start = [option(weight, o.text, o.next) for weight, o in zip((0.3, 0.7), JOB.grammar["start"], strict=True)]
            new = {
                "weight": {"grammar": JOB.grammar | {"start": start}},
                "wording": {"titles": ("A title", *JOB.titles[1:])},
                "order of facts": {"facts": dict(reversed(JOB.facts.items()))},  # the same seed draws other posts
            }[what]
            monkeypatch.setattr(scenarios, "SCENARIOS", (replace(JOB, **new), *SCENARIOS[1:]))
    assert world_hash() != before
    monkeypatch.undo()
    assert world_hash() == before
