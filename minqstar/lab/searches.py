"""What each search finds for how many tokens: on a trained run, and on the exact policy, whose best is known.

python -m minqstar.lab.searches                      # the table in search/README.md
python -m minqstar.lab.searches --variants           # and every kind of leaf and backup that mcts has
python -m minqstar.lab.searches runs/sft --posts 128
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table as TextTable

from minqstar.cli import run
from minqstar.console import Console
from minqstar.errors import require
from minqstar.evaluate import MAX_NEW_TOKENS, oracle
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import Decoded, best_of_n, by_room, decode, greedy, sampler
from minqstar.search.evaluator import Evaluator, Network, Table
from minqstar.search.mcts import Backup, Found, Leaf, MCTSConfig, mcts
from minqstar.theory.mdp import hard_max, solve
from minqstar.training.checkpoint import Run, held_out, load_run
from minqstar.world.posts import post_of
from minqstar.world.tldr import BETA, World

WIDTHS = (2, 5, 20)
AT_ONCE = 64  # posts searched together
SAME = 1e-4  # nats: sums of fp32 log-probs of one response differ by less, whoever computed them
EXACT = 1e-6  # nats: of the exact policy, in float64

# an evaluator, its prompts, the end tokens, the length limit -> a response to each prompt, and what mcts says of it
Method = Callable[[Evaluator, list[list[int]], tuple[int, ...], int], tuple[list[Decoded], list[Found]]]
# an evaluator, its prompts, their places among all, the length limit
Batches = Iterator[tuple[Evaluator, list[list[int]], list[int], int]]


def first_of(search: Callable[..., list[list[Decoded]]], *options) -> Method:
    """A search that returns several responses, best first, and says nothing of them."""
    return lambda e, prompts, ends, limit: ([r[0] for r in search(e, prompts, ends, limit, *options)], [])


def tree_search(config: MCTSConfig) -> Method:
    def search(
        e: Evaluator, prompts: list[list[int]], ends: tuple[int, ...], limit: int
    ) -> tuple[list[Decoded], list[Found]]:
        found, _ = mcts(e, prompts, ends, limit, config)
        return [f.response for f in found], found

    return search


def best_of(n: int) -> Method:
    draws = sampler(torch.Generator().manual_seed(0))
    return lambda e, p, ends, limit: (best_of_n(e, p, ends, limit, draws, n, lambda _, draw: draw.score), [])


def methods(budgets: dict[int, int], variants: bool) -> Iterator[tuple[str, Method]]:
    """The searches by name; `budgets` is filled with what beams cost before a tree search is given as much.

    With `variants` also every kind of leaf and backup, at half of what five beams cost.
    """
    yield "greedy", first_of(decode, greedy)
    yield "best of 16", best_of(16)
    for width in WIDTHS:
        yield f"beam {width}", first_of(beam_search, BeamConfig(width))
    for width in WIDTHS:
        yield f"mcts as beam {width}", tree_search(MCTSConfig(budget=budgets[width]))
    if variants:
        for leaf, backup in product(get_args(Leaf), get_args(Backup)):
            yield f"mcts {leaf} {backup}", tree_search(MCTSConfig(budgets[5] // 2, leaf=leaf, backup=backup))


def outcomes(
    batches: Callable[[], Batches], count: int, ends: tuple[int, ...], variants: bool
) -> Iterator[tuple[str, np.ndarray, dict]]:
    """Of each search its name, the log-probs it found (N,), and tokens forwarded a post, prompts not counted."""
    budgets: dict[int, int] = {}
    for name, method in methods(budgets, variants):
        logps, tokens, cut, notes = np.zeros(count), 0, 0, []
        for evaluator, prompts, places, limit in batches():
            responses, found = method(evaluator, prompts, ends, limit)
            logps[places] = [response.score for response in responses]
            tokens += int(evaluator.tokens.sum()) - sum(map(len, prompts))
            cut += sum(response.truncated for response in responses)
            notes += found
        figures = {"tokens_forwarded": tokens / count, "truncated": cut / count}
        if notes:
            figures |= {key: float(np.mean([getattr(f, key) for f in notes])) for key in ("proved", "completed")}
        if name.startswith("beam "):
            budgets[int(name.split()[1])] = int(tokens / count)
        yield name, logps, figures


def learned(run: Run, rows: list[dict], variants: bool = False) -> dict[str, dict]:
    """By search: the mean log-prob it finds under the run's policy, nats, and how often it is no worse than greedy."""
    prompts = [run.tokenizer.encode_prompt(row["prompt"]) for row in rows]

    def batches():
        for limit, places in by_room(prompts, run.model.config.block_size, MAX_NEW_TOKENS).items():
            for start in range(0, len(places), AT_ONCE):
                some = places[start : start + AT_ONCE]
                yield Network(run.model), [prompts[i] for i in some], some, limit

    table, baseline = {}, None
    for name, logps, figures in outcomes(batches, len(prompts), run.tokenizer.ends, variants):
        baseline = logps if baseline is None else baseline  # greedy comes first
        table[name] = {"mean_logp": logps.mean(), **figures, "ge_greedy": float((logps >= baseline - SAME).mean())}
    return table


def exact(world: World, rows: list[dict], variants: bool = False) -> dict[str, dict]:
    """By search: how often it finds the likeliest response under the exact pi*, and by how much it misses, nats."""
    posts = [post_of(row) for row in rows]
    optimum, tables = np.zeros(len(posts)), []
    for _, places, mdp in world.tables(posts):
        solution = solve(mdp, BETA)
        log_pi = torch.where(solution.log_pi > -torch.inf, solution.log_pi, 0.0)
        optimum[places] = hard_max(replace(mdp, reward=log_pi))[0][:, 0]  # the best path's sum of log pi*
        tables.append((mdp, solution, places))

    def batches():
        for mdp, solution, places in tables:
            yield Table(mdp, solution, BETA, world.tokenizer.n_vocab), [[]] * len(places), places, MAX_NEW_TOKENS

    table = {}
    for name, logps, figures in outcomes(batches, len(posts), world.tokenizer.ends, variants):
        regret = optimum - logps
        found = float((regret < EXACT).mean())
        table[name] = {"optimum_found": found, "mean_regret": regret.mean(), **figures}
    return table


def text_table(title: str, figures: dict[str, dict]) -> TextTable:
    columns = list(dict.fromkeys(key for row in figures.values() for key in row))
    table = TextTable(
        "search",
        *(key.replace("_", "\n", 1) for key in columns),
        title=title,
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for name, row in figures.items():
        table.add_row(
            name, *(f"{row[key]:.{1 if key.startswith('tokens') else 3}f}" if key in row else "" for key in columns)
        )
    return table


@dataclass(frozen=True)
class Options:
    """Compare searches: what each finds, and for how many tokens, on a run and on the exact policy."""

    run: Annotated[Path, tyro.conf.Positional] = Path("runs/dpo")
    """The run folder, of DPO or SFT."""
    data: Path | None = None
    """JSONL whose prompts are searched from. Default: the rows that the run held out."""
    posts: int = 256
    """How many of the rows."""
    variants: bool = False
    """Also every kind of leaf and backup that mcts has."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self):
        require(self.posts > 0, f"posts must be positive, got {self.posts}")


def main(options: Options):
    run_ = load_run(options.run, torch.device("cpu"))
    rows = held_out(run_, options.data, options.posts)
    figures = {"learned": learned(run_, rows, options.variants)}
    if world := oracle(run_, [post_of(row) for row in rows]):
        figures["exact"] = exact(world, rows, options.variants)
    if options.json:
        print(json.dumps(figures, indent=2, allow_nan=False))
        return
    for name, of in figures.items():
        Console().print(text_table(f"{name} policy, {len(rows)} posts", of))


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.lab.searches")
