"""The TL;DR world: posts to summarise, and the exact Q* of every summary token.

The paper shows credit assignment on an edited Reddit summary, judged by eye. Here the same task has an oracle.
A scenario draws facts and writes a post; its *grammar* is pi_ref, a distribution over summaries whose fact
slots are right with probability 1 - EPS. Spelled in tokens the grammar is an automaton, that is a `TokenMDP`
of a few hundred states, so backward induction gives V*, Q*, pi* and the implicit reward of every token.

    python -m minqstar.tldr --out data/tldr        # writes the data set as preference JSONL

Rewards sit on the last token of what they pay for: RIGHT or WRONG for a fact, CLAUSE for an optional clause,
FILLER for a sentence that says nothing. `judge` gives the true return of any text.
"""

import json
import math
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minqstar.cli import require, run
from minqstar.mdp import TokenMDP, implicit_rewards, solve, visits
from minqstar.scenarios import SCENARIOS, Option, Scenario
from minqstar.tokenizer import DEFAULT_VOCABULARY, Tokenizer, load_tokenizer, train_vocabulary

BETA = 0.5  # reward units a nat
EPS = 0.25  # pi_ref's chance of a wrong value in a fact slot
RIGHT, WRONG, CLAUSE, FILLER = 0.5, -1.0, 0.3, -0.4  # reward units
CLASSES = ("forced", "fact", "clause", "filler")  # what a token decides
SPLITS = ("sft", "train", "validation", "test")
WORLD_VERSION = 1  # raised when the same seed gives other data
BATCH = 1024  # posts solved at once: bounds the memory of a table to some 20 MB


@dataclass(frozen=True)
class Post:
    """One prompt of the world and what it says."""

    scenario: str
    subreddit: str
    facts: dict[str, str]
    prompt: str


class Judgement(NamedTuple):
    """What the oracle says of a summary. One that leaves the grammar keeps the facts filled before it left."""

    total: float  # the true return, reward units; nan if the text leaves the grammar or stops in its middle
    right: tuple[str, ...]  # the facts filled with their right value
    wrong: tuple[str, ...]  # the facts filled with another value of the kind


class FactValue(NamedTuple):
    """A fact slot's alternative."""

    fact: str
    value: str


class Automaton:
    """A scenario's grammar in tokens: what the `TokenMDP`s of all its posts share.

    An arc (state, token) stands for some *options*: alternatives of a grammar node, or values of a fact. A post
    gives every option a weight and a reward; pi_ref of an arc is the weight of its options over its state's.
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
                literal, *rest = re.split(r"( ?\{\w+\})", option.text)  # a value takes the space before it
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
                raise ValueError(f"{self.scenario.name}: {[self.options[o] for o in options]} are not prefix-free")
        fillers = any(isinstance(o := self.options[i], Option) and o.kind == "filler" for _, _, i in spelled)
        kind = "forced" if len(arcs) == 1 else fact or ("filler" if fillers else "clause")
        self._states.append((kind, arcs))
        return len(self._states) - 1

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

    def _weights_and_rewards(self, posts: list[Post]) -> tuple[Tensor, Tensor]:
        """Of each post's options, both (N, options)."""
        weights = np.zeros((len(posts), len(self.options)))
        rewards = np.zeros_like(weights)
        paid = {"clause": CLAUSE, "filler": FILLER, "": 0.0}
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
            twin = next((f for f, v in self.scenario.facts.items() if v is values and f != fact), None)
            others = len(values) - 1 - (twin is not None)
            weights[:, self._values[fact]] = EPS / others * (0.5 if twin else 1.0)
            if twin:  # half of the mistakes take the other fact of the same kind
                weights[rows, first + np.array([values.index(post.facts[twin]) for post in posts])] = EPS / 2
            weights[rows, right] = 1 - EPS
            rewards[:, self._values[fact]] = WRONG
            rewards[rows, right] = RIGHT
        return torch.from_numpy(weights), torch.from_numpy(rewards)

    def mdp(self, posts: list[Post]) -> TokenMDP:
        """The MDPs of N posts of this scenario: log_ref and reward are (N, S, A)."""
        weights, rewards = self._weights_and_rewards(posts)
        arc_mass = weights @ self._membership  # (N, arcs)
        state_mass = torch.zeros(len(posts), len(self.token), dtype=torch.float64)
        state_mass.index_add_(1, self._arc_state, arc_mass)
        log_ref = torch.full((len(posts), *self.token.shape), -torch.inf, dtype=torch.float64)
        log_ref[:, self._arc_state, self._arc_action] = (arc_mass / state_mass[:, self._arc_state]).log()
        return TokenMDP(self.token, self.next, log_ref, rewards[:, self.pays])

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


class World:
    """All scenarios under one tokenizer: posts, draws from pi_ref, the judge, and the exact rewards."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.automata = {scenario.name: Automaton(scenario, tokenizer) for scenario in SCENARIOS}

    def tables(self, posts: list[Post]) -> Iterator[tuple[Automaton, list[int], TokenMDP]]:
        """The posts' MDPs in batches of one scenario, with the indices of the posts in each."""
        for name, automaton in self.automata.items():
            indices = [i for i, post in enumerate(posts) if post.scenario == name]
            for start in range(0, len(indices), BATCH):
                batch = indices[start : start + BATCH]
                yield automaton, batch, automaton.mdp([posts[i] for i in batch])

    def sample(self, posts: list[Post], rng: np.random.Generator) -> tuple[list[list[int]], list[float]]:
        """One draw of pi_ref for each post: token ids ending in EOS, and true returns."""
        responses, returns = [[] for _ in posts], [0.0] * len(posts)
        for _, indices, mdp in self.tables(posts):
            cumulative = mdp.log_ref.exp().cumsum(-1)
            cumulative /= cumulative[..., -1:].clone()
            rows, state = torch.arange(len(indices)), torch.zeros(len(indices), dtype=torch.long)
            while (live := state < mdp.num_states).any():
                rows, state = rows[live], state[live]
                u = torch.from_numpy(rng.random(len(rows)))[:, None]
                action = (u >= cumulative[rows, state]).sum(-1)
                reward = mdp.reward[rows, state, action]
                for row, token, r in zip(
                    rows.tolist(), mdp.token[state, action].tolist(), reward.tolist(), strict=True
                ):
                    responses[indices[row]].append(token)
                    returns[indices[row]] += r
                state = mdp.next[state, action]
        return responses, returns

    def judge(self, post: Post, summary: str) -> Judgement:
        """The true return of a complete summary, or the fact that it leaves the grammar."""
        automaton = self.automata[post.scenario]
        tokens = self.tokenizer.encode_response(summary)
        states, actions = automaton.walk(tokens)
        total, filled = 0.0, {True: [], False: []}
        paid = {"clause": CLAUSE, "filler": FILLER, "": 0.0}
        for option in automaton.pays[states, actions].tolist():
            match automaton.options[option]:
                case Option() as o:
                    total += paid[o.kind]
                case FactValue(fact, value):
                    right = post.facts[fact] == value
                    filled[right].append(fact)
                    total += RIGHT if right else WRONG
        # rewards are tenths: rounding lets equal returns be equal floats
        total = round(total, 9) if len(states) == len(tokens) else math.nan
        return Judgement(total, tuple(filled[True]), tuple(filled[False]))

    def exact_rewards(self, posts: list[Post], responses: list[list[int]]) -> list[tuple[list[float], list[str]]]:
        """For each response of the grammar (ids with EOS), its tokens' exact A* at BETA and their classes."""
        answers = [None] * len(posts)
        for automaton, indices, mdp in self.tables(posts):
            A_star = implicit_rewards(mdp, solve(mdp, BETA), BETA)
            for row, i in enumerate(indices):
                states, actions = automaton.walk(responses[i])
                if len(states) != len(responses[i]):
                    raise ValueError(f"response {i} leaves the grammar of {posts[i].scenario!r} at token {len(states)}")
                answers[i] = (A_star[row, states, actions].tolist(), [automaton.kind[s] for s in states])
        return answers

    def optimum(self, posts: list[Post]) -> dict[str, float]:
        """Exact expectations under pi*, the mean over posts: return, wrong and filled slots, tokens with EOS."""
        total = {"judge_return": 0.0, "wrong": 0.0, "filled": 0.0, "tokens": 0.0}
        for automaton, _, mdp in self.tables(posts):
            visit = visits(mdp, solve(mdp, BETA).log_pi)
            is_fact = torch.tensor([isinstance(o, FactValue) for o in automaton.options])[automaton.pays]
            total["judge_return"] += (visit * mdp.reward).sum().item()
            total["wrong"] += (visit * (is_fact & (mdp.reward < 0))).sum().item()
            total["filled"] += (visit * is_fact).sum().item()
            total["tokens"] += visit.sum().item()
        return {key: value / len(posts) for key, value in total.items()}


def draw_post(rng: random.Random, split: str) -> Post:
    """A random post whose facts belong to the split: train, validation and test share no set of facts."""
    while True:
        scenario = rng.choice(SCENARIOS)
        facts = {fact: rng.choice(values) for fact, values in scenario.facts.items()}
        bucket = zlib.crc32(repr((scenario.name, sorted(facts.items()))).encode()) % 16
        kinds_differ = all(
            facts[f] != facts[g] for f in facts for g in facts if f < g and scenario.facts[f] is scenario.facts[g]
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


def read_post(prompt: str) -> Post | None:
    """The post that a text states, or None if the world cannot have written it."""
    head = re.match(r"SUBREDDIT: r/(\w+) ", prompt)
    scenario = next((s for s in SCENARIOS if head and head[1] in s.subreddits), None)
    if scenario is None:
        return None
    facts = {}
    for fact, values in scenario.facts.items():
        wordings = [w for sentence in scenario.sentences for w in sentence if f"{{{fact}}}" in w]
        patterns = "|".join(re.escape(w).replace(re.escape(f"{{{fact}}}"), rf"({'|'.join(values)})") for w in wordings)
        found = re.search(patterns, prompt)
        if found is None:
            return None
        facts[fact] = next(filter(None, found.groups()))
    return Post(scenario.name, head[1], facts, prompt)


@dataclass(frozen=True)
class DataConfig:
    """How much of the world to write down, and how its preferences are labelled."""

    pairs: int = 20_000
    """Preference pairs for DPO, two for each post."""
    sft: int = 40_000
    """Examples for SFT, four draws of pi_ref for each post."""
    held_out: int = 512
    """Pairs for validation, and as many for test."""
    seed: int = 0
    """Seed of every draw."""
    length_bias: float = 0.0
    """Reward units that the labeller adds for each response token (0: unbiased)."""

    def __post_init__(self):
        for name in ("pairs", "sft", "held_out"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(self.sft % 4 == 0, f"sft must be a multiple of 4, got {self.sft}")
        require(math.isfinite(self.length_bias), f"length_bias must be finite, got {self.length_bias}")


def draw_rows(world: World, config: DataConfig, split: str) -> Iterator[dict]:
    """The rows of one file: `sft` (prompt, completion), or `train`, `validation`, `test` (prompt, chosen, rejected).

    Chosen and rejected are two different draws of pi_ref, labelled by Bradley-Terry on their true returns (Eq. 1).
    """
    rng = random.Random(f"{config.seed} {split}")
    numbers = np.random.default_rng([config.seed, zlib.crc32(split.encode())])
    count = {"sft": config.sft // 4, "train": config.pairs // 2}.get(split, config.held_out)
    posts = [draw_post(rng, "train" if split == "sft" else split) for _ in range(count)]
    facts = [{"scenario": post.scenario, "subreddit": post.subreddit, **post.facts} for post in posts]
    draws = [world.sample(posts, numbers) for _ in range(4 if split in ("sft", "train") else 2)]
    if split == "sft":
        for i, post in enumerate(posts):
            for responses, _ in draws:
                yield {"prompt": post.prompt, "completion": world.tokenizer.decode(responses[i]), "facts": facts[i]}
        return
    pairs = list(zip(draws[::2], draws[1::2], strict=True))
    for (first, _), (second, returns) in pairs:
        while same := [i for i in range(count) if first[i] == second[i]]:
            for i, *drawn in zip(same, *world.sample([posts[i] for i in same], numbers), strict=True):
                second[i], returns[i] = drawn
    for i, post in enumerate(posts):
        for (first, first_return), (second, second_return) in pairs:
            a, b = world.tokenizer.decode(first[i]), world.tokenizer.decode(second[i])
            margin = first_return[i] - second_return[i] + config.length_bias * (len(first[i]) - len(second[i]))
            if numbers.random() >= 1 / (1 + math.exp(-margin)):
                a, b = b, a
            yield {"prompt": post.prompt, "chosen": a, "rejected": b, "facts": facts[i]}


def post_of(row: dict) -> Post | None:
    """The post of a row that `draw_rows` made, or of any row whose prompt the world could have written."""
    match row.get("facts"):
        case {"scenario": str(scenario), "subreddit": str(subreddit), **facts}:
            return Post(scenario, subreddit, facts, row["prompt"])
    return read_post(row["prompt"])


def write_dataset(out: Path, config: DataConfig, tokenizer: Tokenizer) -> Path:
    """Write the four files and a manifest, as one: they are made aside and the folder renamed.

    A folder that holds this very data set already is left as it is; one that holds another is replaced, since
    its manifest says how to make it again. A folder without a manifest is somebody else's: UserError.
    """
    manifest = {"world": WORLD_VERSION, "vocabulary": tokenizer.fingerprint, **asdict(config)}
    if out.exists():
        kept = out / "manifest.json"
        require(kept.is_file(), f"{out} exists and is not a data set of this world; choose another folder")
        if json.loads(kept.read_text()) == manifest:
            return out
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    world = World(tokenizer)
    for split in SPLITS:
        with open(aside / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in draw_rows(world, config, split))
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    return out


def world_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Posts, what their grammar may say about them, and the values of facts: what the vocabulary is trained on."""
    rng = random.Random(seed)
    scenarios = {scenario.name: scenario for scenario in SCENARIOS}
    for _ in range(count):
        post = draw_post(rng, "train")
        scenario = scenarios[post.scenario]
        yield post.prompt
        yield from (o.text.format(**post.facts) for node in scenario.grammar.values() for o in node)
        yield from (" " + " ".join(values) for values in scenario.facts.values())


@dataclass(frozen=True)
class Options:
    """Write the TL;DR world's data set, or train its vocabulary anew."""

    out: Path = Path("data/tldr")
    """Folder for sft.jsonl, train.jsonl, validation.jsonl, test.jsonl and manifest.json."""
    data: DataConfig = DataConfig()
    train_vocabulary: Path | None = None
    """Train the vocabulary on the world's text, write it to this file, and stop."""
    vocabulary_size: int = 1024
    """Tokens of that vocabulary, EOS and PAD included."""


def main(options: Options):
    if options.train_vocabulary:
        train_vocabulary(world_texts(3000), options.vocabulary_size).save(options.train_vocabulary)
        print(f"wrote {options.train_vocabulary}")
    else:
        print(f"the data set is in {write_dataset(options.out, options.data, load_tokenizer(DEFAULT_VOCABULARY))}")


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.tldr")
