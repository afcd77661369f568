"""Robust or not: token rewards of the same summaries in other words, where the exact A* is known too.

`PARAPHRASES` words every alternative of the grammars anew. Structure, weights, kinds and facts stay, so a reworded
summary says the same, is as likely under the grammar, and earns the same return: only its words, which occur in no
training summary, and with them its tokens differ. "Implicit reward models generalise worse" (arXiv 2507.07981) than
explicit ones: here the claim meets the truth.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from minqstar.errors import require
from minqstar.lab.findings.drawing import BLUE, GREEN, ORANGE, label, panels, styled
from minqstar.lab.findings.intervals import interval
from minqstar.lab.league.measure import Rewards, Truth
from minqstar.training.groups import Group
from minqstar.world.automaton import Automaton, FactValue
from minqstar.world.grammar import Option, Scenario, slots_of
from minqstar.world.posts import Post
from minqstar.world.tldr import World

DEGREES = {"original": "original", "half": "new where no fact stands", "all": "all new"}
PARAPHRASES = {
    "job": {
        " I": " So I", " just": " now", " finally": " soon", " recently": " again", " suddenly": " only just",
        " got an offer from {company}": " heard back from {company}",
        " Offer from {company}": " A call from {company}",
        " as a senior {role}.": " for a senior {role}.",
        " They pay ${offered}k": " Their number is ${offered}k",
        " I want ${asked}k and they pay ${offered}k.": " My goal is ${asked}k and their number is ${offered}k.",
        " but I want ${asked}k.": " but I asked for ${asked}k.",
        " The office is in {city}.": " Would have to live in {city}.",
        " Any advice?": " Should I take it?", " Thoughts?": " Is it fair?", " Please help.": " Need advice.",
    },
    "injury": {
        " Hurt my {part}": " Broke my {part}",
        " Injured my {part}": " Landed on my {part}",
        " playing {sport}": " while I was out playing {sport}",
        " and it has hurt for {since} weeks.": " and the pain began {since} weeks ago.",
        " The doctor": " The nurse", " told": " needs", " wants": " warned", " asked": " urged", " begged": " orders",
        " me to rest {rest} weeks.": " me to stay off it {rest} weeks.",
        " Told to rest {rest} weeks.": " No sports {rest} weeks.",
        " Should I try {remedy}?": " A friend says try {remedy}.",
        " So annoyed.": " I am so bored.", " Any tips?": " How long?", " Help?": " When can I train?",
    },
    "camera": {
        " Want to": " I must", " buy": " find", " get": " need", " grab": " love", " order": " choose",
        " a used {brand}": " this used {brand}",
        " Looking at a used {brand}": " A shop has a used {brand}",
        " to shoot {subject}": " as I want to shoot {subject}",
        " for ${price}0": " and it costs ${price}0",
        " and can spend ${budget}0 but it costs ${price}0.": " but my limit is ${budget}0 and they want ${price}0.",
        " but have only ${budget}0.": " but I only saved ${budget}0.",
        " I will take it to {trip}.": " We are flying to {trip}.",
        " Worth it?": " Is this fair?", " Please advise.": " Help me choose.", " Opinions?": " Should I buy it?",
    },
}  # fmt: skip


def paraphrased(world: World, degree: str = "all") -> World:
    """The world whose summaries are worded anew, to one of DEGREES; its posts are the same.

    "half" rewords the alternatives without a fact slot, about half of all: some answers have none of them, and stay.
    "all" rewords those with a slot too. UserError if an alternative has no paraphrase.
    """
    other = copy.copy(world)
    other.automata = {
        name: Automaton(reworded(automaton.scenario, degree), world.tokenizer)
        for name, automaton in world.automata.items()
    }
    return other


def reworded(scenario: Scenario, degree: str) -> Scenario:
    """The scenario with another grammar: texts without a letter, as a full stop, stay as they are."""
    words = PARAPHRASES.get(scenario.name, {})

    def anew(option: Option) -> Option:
        kept = degree == "original" or (degree == "half" and slots_of(option.text))
        if kept or not re.search("[A-Za-z]", option.text):
            return option
        require(option.text in words, f"{option.text!r} of scenario {scenario.name!r} has no paraphrase; write one")
        return option._replace(text=words[option.text])

    return replace(scenario, grammar={node: [anew(o) for o in options] for node, options in scenario.grammar.items()})


def in_words_of(other: World, world: World, post: Post, tokens: list[int]) -> list[int]:
    """A summary of a world, said in the words of another one of the same structure; ids with EOS."""
    of = world.automata[post.scenario]
    chosen = [other.automata[post.scenario].options[i] for i in of.pays[of.walk(tokens)].tolist() if i]
    values = iter([o.value for o in chosen if isinstance(o, FactValue)])
    text = "".join(o.text for o in chosen if isinstance(o, Option))
    return world.tokenizer.encode_response(re.sub(r"\{\w+\}", lambda _: next(values), text))


def figures(rewards: Rewards, world: World, posts: list[Post], groups: Sequence[Group], beta: float) -> dict:
    """A method on pairs of the world (chosen first), and on the same pairs in other words, by degree.

    `pair_accuracy`, with its 95% interval, is the share of pairs whose chosen answer has the larger return, and
    `optimal_pair_accuracy` the same of the true returns. In `decisive_pair_accuracy` returns sum no forced tokens: the
    grammar leaves no choice there, so their A* is 0. What a method pays them is noise: `forced_rms`, its root mean
    square, reward units. The rest is what `Truth` says of the token rewards.
    """
    found = {}
    for degree in DEGREES:
        other = paraphrased(world, degree)
        pairs = [
            group._replace(responses=tuple(in_words_of(other, world, post, r) for r in group.responses))
            for post, group in zip(posts, groups, strict=True)
        ]
        learned, truth = rewards(pairs), Truth(other, posts, pairs, beta)
        flat = torch.cat([response for pair in learned for response in pair]).double().numpy()
        forced, ends = truth.kinds == "forced", np.cumsum([len(response) for pair in learned for response in pair])
        right, decisive, optimal = (
            ranked_right(np.array([part.sum() for part in np.split(values, ends[:-1])]))
            for values in (flat, np.where(forced, 0.0, flat), truth.A)
        )
        found[degree] = {
            **truth.figures(lambda _, known=learned: known),
            "pair_accuracy": right.mean().item(),
            "pair_interval": interval(right),
            "decisive_pair_accuracy": decisive.mean().item(),
            "optimal_pair_accuracy": optimal.mean().item(),
            "forced_rms": np.sqrt(np.mean(flat[forced] ** 2)).item(),
        }
    return found


def ranked_right(returns: np.ndarray) -> np.ndarray:
    """Of pairs, chosen before rejected, 1 where the chosen one's return is the larger, 0.5 where they are equal."""
    margin = returns[::2] - returns[1::2]
    return np.where(np.abs(margin) < 1e-9, 0.5, margin > 0)


@styled
def draw(results: dict[str, dict]):
    """What other words leave of each method, by name: of its returns, of their decisive part, of facts' credit."""
    message = "In other words implicit rewards lose what they knew; a reward head has little to lose"
    figure, (line,) = panels(message, 3, height=1.6 + 0.3 * len(results))
    places = np.arange(len(results))
    measures = {
        "Which answer is better": ("pair accuracy", lambda of: of["pair_accuracy"]),
        "… by decisive tokens only": ("pair accuracy", lambda of: of["decisive_pair_accuracy"]),
        "Which fact is wrong": ("correlation with A*, facts", lambda of: of["by_class"]["fact"]["correlation"]),
    }
    for axis, (title, (words, measure)) in zip(line, measures.items(), strict=True):
        for degree, colour, marker in zip(DEGREES, (BLUE, GREEN, ORANGE), "o^s", strict=True):
            values = np.array([measure(of[degree]) for of in results.values()], dtype=float)
            axis.plot(values, places, marker, color=colour, label=DEGREES[degree])
        axis.set_yticks(places, list(results) if axis is line[0] else [""] * len(results))
        axis.set_ylim(len(results) - 0.5, -0.5)
        label(axis, title, words, "")
    line[1].sharex(line[0])
    for axis in line[:2]:
        best = next(iter(results.values()))["original"]["optimal_pair_accuracy"]
        axis.axvline(best, color="black", linewidth=0.8, label="true returns")
    figure.legend(*line[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(DEGREES) + 1)
    return figure
