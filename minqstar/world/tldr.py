"""The TL;DR world: posts to summarise, and the exact Q* of every summary token.

The paper shows credit assignment on an edited Reddit summary, judged by eye. Here the same task has an oracle.
A scenario draws facts and writes a post; its *grammar* is pi_ref, a distribution over summaries whose fact
slots are right three times in four. Spelled in tokens the grammar is an automaton, that is a `TokenMDP` of
about a hundred states, so backward induction gives V*, Q*, pi* and the implicit reward of every token, and
`judge` the true return of any text.

    python -m minqstar.world.tldr --out data/tldr        # writes the data set as preference JSONL
"""

import hashlib
import json
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minqstar.console import Console
from minqstar.errors import require
from minqstar.files import check_output
from minqstar.lm.tokenizer import DEFAULT_VOCABULARY, Tokenizer, load_tokenizer, train_vocabulary
from minqstar.theory.mdp import TokenMDP, implicit_rewards, solve, visits
from minqstar.world.automaton import Automaton, FactValue
from minqstar.world.dataset import folder_of
from minqstar.world.grammar import EPS, PAID, RIGHT, WRONG, Option
from minqstar.world.posts import Post, draw_post, known_scenarios, post_of, read_post

BETA = 0.5  # reward units a nat
SPLITS = ("sft", "train", "validation", "test")
WORLD_VERSION = 1  # raised when other code gives other data, or another Q*, from the same world
BATCH = 1024  # posts solved at once: bounds the memory of a table to some 20 MB


def world_hash() -> str:
    """Of all that decides the world: two data sets, or runs, with the same hash know the same Q*."""
    decides = [WORLD_VERSION, EPS, RIGHT, WRONG, PAID, [asdict(scenario) for scenario in known_scenarios()]]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


class Judgement(NamedTuple):
    """What the oracle says of a summary. One that leaves the grammar keeps the facts filled before it left."""

    total: float  # the true return, reward units; nan if the text leaves the grammar or stops in its middle
    right: tuple[str, ...]  # the facts filled with their right value
    wrong: tuple[str, ...]  # the facts filled with another value of the kind


class Exact(NamedTuple):
    """A response of L tokens, EOS included, under the exact optimum; all but `kind` in reward units."""

    reward: Tensor  # (L,) r(s,a) of each token
    value: Tensor  # (L+1,) V* before each token, and after the last: 0
    Q: Tensor  # (L,) Q*(s,a)
    advantage: Tensor  # (L,) A* = beta log(pi*/pi_ref)(a|s), by Eq. 10 the same as r + V*(s') - V*(s)
    kind: list[str]  # what each token decides: one of `automaton.CLASSES`


class World:
    """All scenarios under one tokenizer: posts, draws from pi_ref, the judge, and the exact rewards."""

    def __init__(self, tokenizer: Tokenizer | None = None):
        """The world in the words of a tokenizer, by default that of the default vocabulary."""
        self.tokenizer = tokenizer = tokenizer or load_tokenizer(DEFAULT_VOCABULARY)
        self.automata = {scenario.name: Automaton(scenario, tokenizer) for scenario in known_scenarios()}

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
        for option in automaton.pays[states, actions].tolist():
            match automaton.options[option]:
                case Option() as o:
                    total += PAID[o.kind]
                case FactValue(fact, value):
                    right = post.facts[fact] == value
                    filled[right].append(fact)
                    total += RIGHT if right else WRONG
        # rewards are tenths: rounding lets equal returns be equal floats
        total = round(total, 9) if len(states) == len(tokens) else math.nan
        return Judgement(total, tuple(filled[True]), tuple(filled[False]))

    def judge_tokens(self, post: Post, tokens: list[int]) -> Judgement:
        """The same of token ids. A response without its EOS, or with a PAD, which has no text, is off the grammar."""
        verdict = self.judge(post, self.tokenizer.decode(tokens))
        whole = tokens[-1:] == [self.tokenizer.eos] and self.tokenizer.pad not in tokens
        return verdict if whole else verdict._replace(total=math.nan)

    def exact(self, prompt: str, response: str, beta: float = BETA) -> Exact | None:
        """The exact r, V*, Q* and A* of a complete response, token by token; None if a text is not this world's."""
        post = read_post(prompt)
        return post and self.exact_all([post], [self.tokenizer.encode_response(response)], beta)[0]

    def exact_all(self, posts: list[Post], responses: list[list[int]], beta: float = BETA) -> list[Exact | None]:
        """The same of many responses (ids with EOS), one to each post."""
        answers: list[Exact | None] = [None] * len(posts)
        for automaton, indices, mdp in self.tables(posts):
            solution = solve(mdp, beta)
            A_star = implicit_rewards(mdp, solution, beta)
            for row, i in enumerate(indices):
                states, actions = automaton.walk(responses[i])
                if len(states) == len(responses[i]):
                    path = [int(s) for s in states] + [mdp.num_states]
                    of = (table[row, states, actions] for table in (solution.Q, A_star))
                    kinds = [automaton.kind[s] for s in states]
                    answers[i] = Exact(mdp.reward[row, states, actions], solution.V[row, path], *of, kinds)
        return answers

    def wrote(self, rows: list[dict]) -> bool:
        """Whether all of some preference rows could be this world's: their posts, and both of their responses."""
        posts = [post_of(row) for row in rows]
        return all(posts) and not any(
            math.isnan(self.judge(post, row[side]).total)
            for post, row in zip(posts, rows, strict=True)
            for side in ("chosen", "rejected")
        )

    def optimum(self, posts: list[Post], beta: float = BETA) -> dict[str, float]:
        """Exact expectations under pi*, the mean over posts: return, wrong and filled slots, tokens with EOS."""
        total = {"judge_return": 0.0, "wrong": 0.0, "filled": 0.0, "tokens": 0.0}
        for automaton, _, mdp in self.tables(posts):
            visit = visits(mdp, solve(mdp, beta).log_pi)
            is_fact = torch.tensor([isinstance(o, FactValue) for o in automaton.options])[automaton.pays]
            total["judge_return"] += (visit * mdp.reward).sum().item()
            total["wrong"] += (visit * (is_fact & (mdp.reward < 0))).sum().item()
            total["filled"] += (visit * is_fact).sum().item()
            total["tokens"] += visit.sum().item()
        return {key: value / len(posts) for key, value in total.items()}


@dataclass(frozen=True)
class DataConfig:
    """How much of the world to write down, and how its preferences are labelled."""

    pairs: int = 16_000
    """Preference pairs for DPO, two for each post; or half as many rankings, one for each post."""
    ranked: int = 4
    """Responses that are ranked together: 2 for pairs, as in the paper; more for rankings."""
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
            value = getattr(self, name)
            require(0 < value <= 10**7, f"{name} must be between 1 and ten million, got {value}")
        require(self.sft % 4 == 0, f"sft must be a multiple of 4, got {self.sft}")
        require(self.pairs % 2 == 0, f"pairs must be a multiple of 2, got {self.pairs}")
        require(2 <= self.ranked <= 8, f"ranked must be between 2 and 8, got {self.ranked}")
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63, got {self.seed}")
        require(math.isfinite(self.length_bias), f"length_bias must be finite, got {self.length_bias}")


def draw_rows(world: World, config: DataConfig, split: str) -> Iterator[dict]:
    """The rows of one file: `sft` (prompt, completion), or `train`, `validation`, `test` (prompt, chosen, rejected).

    Chosen and rejected are two different draws of pi_ref, labelled by Bradley-Terry on their true returns (Eq. 1).
    With `config.ranked` above 2 a row of `train` has `ranked`: so many draws, in an order drawn by Plackett-Luce.
    """
    rng = random.Random(f"{config.seed} {split}")
    numbers = np.random.default_rng([config.seed, zlib.crc32(split.encode())])
    count = {"sft": config.sft // 4, "train": config.pairs // 2}.get(split, config.held_out)
    posts = [draw_post(rng, "train" if split == "sft" else split) for _ in range(count)]
    facts = [{"scenario": post.scenario, "subreddit": post.subreddit, **post.facts} for post in posts]
    several = 4 if config.ranked == 2 or split == "sft" else config.ranked
    draws = [world.sample(posts, numbers) for _ in range(several if split in ("sft", "train") else 2)]
    if split == "sft":
        for i, post in enumerate(posts):
            for responses, _ in draws:
                yield {"prompt": post.prompt, "completion": world.tokenizer.decode(responses[i]), "facts": facts[i]}
        return
    compared = [draws[start : start + config.ranked] for start in range(0, len(draws), config.ranked)]
    for some in compared:
        for place, (responses, returns) in enumerate(some):
            while same := [i for i in range(count) if any(responses[i] == other[i] for other, _ in some[:place])]:
                for i, *drawn in zip(same, *world.sample([posts[i] for i in same], numbers), strict=True):
                    responses[i], returns[i] = drawn
    for i, post in enumerate(posts):
        for some in compared:
            texts = [world.tokenizer.decode(responses[i]) for responses, _ in some]
            seen = [returns[i] + config.length_bias * len(responses[i]) for responses, returns in some]
            ranked = [texts[place] for place in draw_ranking(seen, numbers)]
            yield {"prompt": post.prompt, **labelled(ranked), "facts": facts[i]}


def draw_ranking(returns: Sequence[float], numbers: np.random.Generator) -> list[int]:
    """The places of some responses, the best first: of two by Bradley-Terry (Eq. 1), of more by Plackett-Luce."""
    if len(returns) == 2:
        better = 1 / (1 + math.exp(-max(returns[0] - returns[1], -700.0)))  # exp overflows beyond
        return [0, 1] if numbers.random() < better else [1, 0]
    return np.argsort(-(np.array(returns) + numbers.gumbel(size=len(returns)))).tolist()


def labelled(ranked: list[str]) -> dict:
    """The fields of a row that hold responses, from the best on: a pair's, or a ranking's."""
    return dict(zip(("chosen", "rejected"), ranked, strict=True)) if len(ranked) == 2 else {"ranked": ranked}


def dataset(
    out: Path, config: DataConfig, tokenizer: Tokenizer, say: Callable[[str], None] = print
) -> AbstractContextManager[Path]:
    """Inside, the folder `out` holds this very data set, four files and a manifest (see `folder_of`): read it there."""
    manifest = {"world": world_hash(), "vocabulary": tokenizer.fingerprint, **asdict(config)}
    world = cache(lambda: World(tokenizer))
    files = {f"{split}.jsonl": partial(lambda split: draw_rows(world(), config, split), split) for split in SPLITS}
    words = {"world": "its world is not today's: other scenarios, eps or rewards"}
    return folder_of(out, manifest, files, say, words)


def world_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Posts, what their grammar may say about them, and the values of facts: what the vocabulary is trained on."""
    rng = random.Random(seed)
    scenarios = {scenario.name: scenario for scenario in known_scenarios()}
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


NEEDS = (("out data", "no --train-vocabulary"), ("vocabulary-size", "--train-vocabulary"))


def main(options: Options):
    say = Console().say
    if options.train_vocabulary:
        check_output(options.train_vocabulary, ".tiktoken")
        train_vocabulary(world_texts(3000), options.vocabulary_size).save(options.train_vocabulary)
        say(f"wrote {options.train_vocabulary}: {options.vocabulary_size} tokens")
    else:
        with dataset(options.out, options.data, load_tokenizer(DEFAULT_VOCABULARY), say) as folder:
            say(f"the data set is in {folder}")


if __name__ == "__main__":
    from minqstar.cli import run

    run(main, Options, "python -m minqstar.world.tldr", NEEDS)
