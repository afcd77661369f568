"""What each search finds for how many tokens: on a trained run, and on the exact policy, whose best is known.

python -m minqstar.lab.searches                      # the tables in search/README.md
python -m minqstar.lab.searches --variants           # and every kind of leaf and backup that mcts has
python -m minqstar.lab.searches runs/sft --posts 128
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from minqstar.search.proofs import Proof, best_first, depth_first
from minqstar.theory.mdp import solve
from minqstar.training.checkpoint import Run, held_out, load_run
from minqstar.world.posts import post_of
from minqstar.world.tldr import BETA, World

WIDTHS = (2, 5, 20)
AT_ONCE = 64  # posts searched together
SAME = 1e-4  # nats: sums of fp32 log-probs of one response differ by less, whoever computed them
A_STAR = "A*"  # on a table with W as its heuristic
EXACT = 1e-6  # nats: of the exact policy, in float64

# an evaluator, its prompts, the end tokens, the length limit -> a response to each prompt, and whether it is proved
Noted = Found | Proof
Method = Callable[[Evaluator, list[list[int]], tuple[int, ...], int], tuple[list[Decoded], list[Noted]]]
# an evaluator, its prompts, their places among all, the length limit
Batches = Iterator[tuple[Evaluator, list[list[int]], list[int], int]]


def first_of(search: Callable[..., list[list[Decoded]]], *options) -> Method:
    """A search that returns several responses, best first, and says nothing of them."""
    return lambda e, prompts, ends, limit: ([r[0] for r in search(e, prompts, ends, limit, *options)], [])


def noted(search: Callable[..., list[Noted]]) -> Method:
    """A search that says of each response whether it is proved to be the best."""

    def method(*asked) -> tuple[list[Decoded], list[Noted]]:
        found = search(*asked)
        return [f.response for f in found], found

    return method


def tree_search(config: MCTSConfig) -> Method:
    return noted(lambda *asked: mcts(*asked, config)[0])


def best_of(n: int) -> Method:
    draws = sampler(torch.Generator().manual_seed(0))
    return lambda e, p, ends, limit: (best_of_n(e, p, ends, limit, draws, n, lambda _, draw: draw.score), [])


def methods(budgets: dict[int, int], options: "Options", heuristic: bool) -> Iterator[tuple[str, Method]]:
    """The searches by name; `budgets` is filled with what beams cost before a tree search is given as much.

    With `heuristic` also A*. With `variants` also every kind of leaf and backup, at half of what five beams cost.
    """
    most = options.most
    yield "greedy", first_of(decode, greedy)
    yield "best of 16", best_of(16)
    for width in WIDTHS:
        yield f"beam {width}", first_of(beam_search, BeamConfig(width))
    yield "best first", noted(partial(best_first, most=most))
    yield "depth first", noted(partial(depth_first, most=most))
    if heuristic:
        yield A_STAR, noted(partial(best_first, most=most))
    yield "mcts to a proof", tree_search(MCTSConfig(budget=most))
    for width in WIDTHS:
        yield f"mcts as beam {width}", tree_search(MCTSConfig(budget=budgets[width]))
    if options.variants:
        for leaf, backup in product(get_args(Leaf), get_args(Backup)):
            yield f"mcts {leaf} {backup}", tree_search(MCTSConfig(budgets[5] // 2, leaf=leaf, backup=backup))


def outcomes(
    batches: Callable[[bool], Batches], count: int, ends: tuple[int, ...], options: "Options", heuristic: bool
) -> Iterator[tuple[str, np.ndarray, dict]]:
    """Of each search its name, the log-probs it found (N,), and figures; `batches(True)` are those with a heuristic."""
    budgets: dict[int, int] = {}
    needed = np.full(count, np.nan)  # (N,) prefixes that every proof must evaluate, where a proof is known
    for name, method in methods(budgets, options, heuristic):
        logps, evaluated, proved, cut = *np.zeros((2, count)), np.zeros(count, bool), 0
        for evaluator, prompts, places, limit in batches(name == A_STAR):
            responses, found = method(evaluator, prompts, ends, limit)
            logps[places] = [response.score for response in responses]
            evaluated[places] = evaluator.tokens.cpu().numpy() - [len(prompt) - 1 for prompt in prompts]
            cut += sum(response.truncated for response in responses)
            proved[places] = [f.proved for f in found] or False
            if name == "best first":
                needed[places] = [f.needed if f.proved else np.nan for f in found]
        figures = {"tokens_forwarded": evaluated.mean() - 1, "truncated": cut / count}
        if found:
            figures["proved"] = proved.mean()
            if (known := proved & ~np.isnan(needed)).any():
                figures["proof_efficiency"] = needed[known].sum() / evaluated[known].sum()
        if name.startswith("beam "):
            budgets[int(name.split()[1])] = int(figures["tokens_forwarded"])
        yield name, logps, figures


def learned(run: Run, rows: list[dict], options: "Options") -> dict[str, dict]:
    """By search: the mean log-prob it finds under the run's policy, nats, and how often it is no worse than greedy."""
    prompts = [run.tokenizer.encode_prompt(row["prompt"]) for row in rows]

    def batches(_):
        for limit, places in by_room(prompts, run.model.config.block_size, MAX_NEW_TOKENS).items():
            for start in range(0, len(places), AT_ONCE):
                some = places[start : start + AT_ONCE]
                yield Network(run.model), [prompts[i] for i in some], some, limit

    table, baseline = {}, None
    for name, logps, figures in outcomes(batches, len(prompts), run.tokenizer.ends, options, heuristic=False):
        baseline = logps if baseline is None else baseline  # greedy comes first
        table[name] = {"mean_logp": logps.mean(), **figures, "ge_greedy": float((logps >= baseline - SAME).mean())}
    return table


def exact(world: World, rows: list[dict], options: "Options") -> dict[str, dict]:
    """By search: how often it finds the likeliest response under the exact pi*, and by how much it misses, nats."""
    posts = [post_of(row) for row in rows]
    optimum, tables = np.zeros(len(posts)), []
    for _, places, mdp in world.tables(posts):
        table = Table(mdp, solve(mdp, BETA), BETA, world.tokenizer.n_vocab)
        to_go = table.best_to_go()
        optimum[places] = to_go[:, 0] / BETA  # the best path's sum of log pi*
        tables.append((table, table.shaped(to_go), places))

    def batches(heuristic: bool):
        for table, shaped, places in tables:
            yield shaped if heuristic else table, [[]] * len(places), places, MAX_NEW_TOKENS

    table = {}
    for name, logps, figures in outcomes(batches, len(posts), world.tokenizer.ends, options, heuristic=True):
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
    most: int = 2_000
    """Prefixes of a post that a search for a proof may evaluate."""
    variants: bool = False
    """Also every kind of leaf and backup that mcts has."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self):
        require(self.posts > 0, f"posts must be positive, got {self.posts}")
        require(0 < self.most <= 10**5, f"most must be between 1 and 100,000, got {self.most}")


def main(options: Options):
    run_ = load_run(options.run, torch.device("cpu"))
    rows = held_out(run_, options.data, options.posts)
    figures = {"learned": learned(run_, rows, options)}
    if world := oracle(run_, [post_of(row) for row in rows]):
        figures["exact"] = exact(world, rows, options)
    if options.json:
        print(json.dumps(figures, indent=2, allow_nan=False))
        return
    for name, of in figures.items():
        Console().print(text_table(f"{name} policy, {len(rows)} posts", of))


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.lab.searches")
