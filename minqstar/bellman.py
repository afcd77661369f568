"""The consistency checker, a command: the theory to machine precision, a trained run, and planted faults.

    python -m minqstar.bellman                # the paper's identities on random MDPs
    python -m minqstar.bellman --policy A --ref B --data rows.jsonl       # and any pair of models
    python -m minqstar.bellman runs/dpo       # and a trained run: its paths, its identities, its distance to Q*

How near the run is to the exact Q* is no identity but a measurement, and reported as that. The same checks are run
with faults planted in their input, each of which must be flagged, so that a pass means something. Exit status 1 if an
identity fails or a fault goes unnoticed.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.markup import escape
from rich.table import Table

from minqstar.cli import run
from minqstar.console import Console, progress
from minqstar.errors import require
from minqstar.evaluate import gap_figures, oracle
from minqstar.pair import PairOptions
from minqstar.runchecks import RUN_FAULTS, RunClaim, check_run, plain_logits
from minqstar.theory.claims import Result
from minqstar.theory.faults import Fault, check_faults, check_theory
from minqstar.theory.mdp import solve
from minqstar.theory.qfunction import implicit_reward
from minqstar.training.checkpoint import Run, held_out
from minqstar.training.data import PackedData, tokenize
from minqstar.training.scoring import by_group, score_packed
from minqstar.world.posts import Post, post_of
from minqstar.world.tldr import World


def optimality(world: World, posts: list[Post], c: RunClaim, advance: Callable[[], None]) -> dict:
    """How far a run is from the exact optimum, on pairs of the TL;DR world; every figure defined in the README."""
    policy, reference = (by_group(score_packed(m, c.data), c.data, c.groups) for m in (c.policy, c.reference))
    learned = [
        [implicit_reward(p, r, c.beta).double() for p, r in zip(*both, strict=True)]
        for both in zip(policy, reference, strict=True)
    ]
    exact: list[list] = [[None, None] for _ in posts]
    divergence, returns = [], torch.zeros(len(posts), 2, dtype=torch.float64)
    for automaton, indices, mdp in world.tables(posts):
        solution = solve(mdp, c.beta)
        for row, i in enumerate(indices):
            for side, response in enumerate(c.groups[i].responses):
                states, actions = automaton.walk(response)
                require(len(states) == len(response), f"a response to {posts[i].prompt[:40]!r}… is not of the world")
                exact[i][side] = c.beta * (solution.log_pi[row, states, actions] - mdp.log_ref[row, states, actions])
                returns[i, side] = mdp.reward[row, states, actions].sum()
                log_pi = plain_logits(c.policy, c.groups[i].prompt, response).log_softmax(-1)
                optimal = solution.log_pi[row, states]
                here = log_pi.gather(-1, mdp.token[states].clamp(min=0))
                terms = torch.where(optimal > -torch.inf, optimal.exp() * (optimal - here), 0.0)
                divergence.append(terms.sum(-1))
                advance()
    texts = [text for group in c.groups for ids in group.responses for text in world.tokenizer.texts_of(ids)]
    flat, truth = (torch.cat([t for both in rows for t in both]) for rows in (learned, exact))
    worst = (flat - truth).abs().argmax().item()
    margins = torch.tensor([[t.sum() for t in both] for both in learned]).double().diff().flatten()
    divergence = torch.cat(divergence)
    figures, of_margins = (
        gap_figures(a.numpy(), b.numpy()) for a, b in ((flat, truth), (margins, returns.diff().flatten()))
    )
    return {
        **{f"q_gap_{name}": figures[name] for name in ("rmse", "correlation", "r2")},
        "worst_token": {"token": texts[worst], "learned": flat[worst].item(), "exact": truth[worst].item()},
        "kl_from_optimum_mean": divergence.mean().item(),
        "kl_from_optimum_max": divergence.max().item(),
        **{f"margin_{name}": of_margins[name] for name in ("rmse", "correlation")},
    }


@dataclass(frozen=True)
class Report:
    """What was checked, and what came out."""

    identities: list[Result]
    faults: list[Fault]
    optimality: dict | None  # of a run on the TL;DR world

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.identities) and all(fault.flagged_by for fault in self.faults)

    def as_json(self) -> dict:
        return {
            "passed": self.passed,
            "identities": [
                {**r._asdict(), "residual": r.residual if math.isfinite(r.residual) else None, "passed": r.passed}
                for r in self.identities
            ],
            "faults": [{**fault._asdict(), "flagged": bool(fault.flagged_by)} for fault in self.faults],
            "optimality": self.optimality,
        }


def check(run_: Run, rows: list[dict]) -> Report:
    """Check a DPO run on preference rows, with a progress bar."""
    require(run_.reference is not None, f"{run_.path} is a run without its reference; check a DPO run")
    require(all("chosen" in row for row in rows), "the check of a run needs rows with chosen and rejected")
    found, _ = tokenize(rows, run_.tokenizer, run_.model.config.block_size, share=False)
    groups = [group for group in found if not group.given]  # the checks are of responses that the policy wrote whole
    require(bool(groups), "no row fits the context of the run, or others speak inside of every response")
    posts = [post_of(row) for row in rows]
    world = oracle(run_, posts)
    ours = world is not None and len(groups) == len(rows) and world.wrote(rows)
    recorded = run_.config.get("reference", {}).get("hash", "")
    data = PackedData(groups, run_.tokenizer.pad, 256)
    claim = RunClaim(run_.model, run_.reference, recorded, run_.beta, run_.tokenizer.eos, groups, data)
    few = replace(claim, groups=groups[:2], data=PackedData(groups[:2], run_.tokenizer.pad, 256))
    faults, steps = [], (1 + ours) * len(claim.responses) + len(RUN_FAULTS) * len(few.responses)
    with progress(f"checking {run_.path}", steps) as advance:
        sound = check_run(claim, advance)
        for name, plant in RUN_FAULTS.items():
            faults.append(Fault(name, [result.id for result in check_run(plant(few), advance) if not result.passed]))
        return Report(sound, faults, optimality(world, posts, claim, advance) if ours else None)


def show(report: Report, console: Console):
    table = Table("identity", "equation", "cases", "residual", "tolerance", "")
    for r in report.identities:
        verdict = "[green]holds[/]" if r.passed else "[red]FAILS[/]"
        table.add_row(r.id, r.equation, str(r.cases), f"{r.residual:.1e}", f"{r.tolerance:.0e}", verdict)
    console.print(table)
    for r in report.identities:
        if r.note:
            console.print(escape(f"{r.id}: {r.note}"))
    table = Table("planted fault", "flagged by")
    for fault in report.faults:
        first, *more = fault.flagged_by or ["[red]NOBODY[/]"]
        table.add_row(fault.name, first + (f" and {len(more)} more" if more else ""))
    console.print(table)
    if report.optimality:
        table = Table("distance to the exact optimum", "")
        for name, value in report.optimality.items():
            if isinstance(value, dict):
                words = f"{value['token']!r}: {value['learned']:+.2f}, exactly {value['exact']:+.2f}"
            else:
                words = "-" if value is None else f"{value:.4f}"
            table.add_row(name, escape(words))
        console.print(table)


@dataclass(frozen=True)
class Options(PairOptions):
    """Check the paper's identities, and a trained run."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """A DPO run to check too."""
    policy: Path | None = None
    """In place of a run: any run or Hugging Face folder, checked against --ref on --data."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where to compute; the tolerances are those of float32 on a CPU."""
    data: Path | None = None
    """Preference JSONL to check the run on. Default: the rows that it held out."""
    pairs: int = 64
    """How many of its pairs."""
    cases: int = 100
    """Random MDPs of each kind: one beta, one for each state, chance, no reference, two parts, diffusion."""
    seed: int = 0
    """Of the random cases."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self):
        require(not (self.run and self.policy), "give a RUN or --policy, not both")
        for name in ("pairs", "cases"):
            require(0 < getattr(self, name) <= 10**6, f"{name} must be between 1 and a million")
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63, got {self.seed}")


NEEDS = (("data pairs ref beta chat device dtype", "RUN|--policy"),)


def main(options: Options):
    run_ = rows = None
    if options.policy or options.run:
        run_ = options.open(options.policy or options.run)
        rows = held_out(run_, options.data, options.pairs)
    report = Report(check_theory(options.cases, options.seed), check_faults(), None)
    console = Console(markup=True, quiet=options.json)
    show(report, console)
    if run_ is not None:
        of_run = check(run_, rows)
        show(of_run, console)
        report = Report(report.identities + of_run.identities, report.faults + of_run.faults, of_run.optimality)
    console.print("[green]all hold, all faults flagged[/]" if report.passed else "[red]the check FAILED[/]")
    if options.json:
        print(json.dumps(report.as_json(), indent=2, allow_nan=False))
    if not report.passed:
        sys.exit(1)


if __name__ == "__main__":
    run(main, Options, "python -m minqstar.bellman", NEEDS)
