"""The consistency checker, a command: the theory to machine precision, a trained run, and planted faults.

    python -m minqstar.bellman                # the paper's identities on random MDPs
    python -m minqstar.bellman runs/dpo       # and a trained run: its paths, its identities, its distance to Q*

Any two softmaxes fulfil the identities of implied rewards, for any beta. So a run's group mixes its *paths*: what is
on one side comes from the packed, prefix-shared pass that training uses, and on the other from a plain forward pass
of each response alone, in float64 from the logits on. How near the run is to the exact Q* is no identity but a
measurement, and reported as that. The same checks are run with faults planted in their input, each of which must be
flagged, so that a pass means something. Exit status 1 if an identity fails or a fault goes unnoticed.
"""

import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from minqstar.automaton import Post
from minqstar.checkpoint import Run, load_run
from minqstar.cli import require, run
from minqstar.data import Group, PackedData, read_jsonl, tokenize
from minqstar.faults import Fault, check_faults
from minqstar.identities import Result, check_claims, gap, random_claims
from minqstar.mdp import solve
from minqstar.model import GPT
from minqstar.qfunction import expected_implicit_reward, implicit_reward, q_from_logits, reward_from_policy, soft_value
from minqstar.scoring import by_group, score_packed, weights_hash
from minqstar.search.evaluator import Network
from minqstar.tldr import World, post_of

FP32 = 1e-4  # tolerance where two fp32 paths are compared, nats or reward units


@dataclass(frozen=True)
class RunClaim:
    """A policy and its reference, and what is said of them on some prompts with complete responses."""

    policy: GPT
    reference: GPT
    reference_hash: str  # as the run recorded it
    beta: float
    eos: int
    groups: list[Group]
    data: PackedData  # the groups, packed
    cache_shift: int = 0  # how many positions too late cached decoding writes; a fault

    @property
    def responses(self) -> list[tuple[list[int], list[int]]]:
        """Every response with its prompt."""
        return [(group.prompt, response) for group in self.groups for response in group.responses]


@torch.no_grad()
def plain_logits(model: GPT, prompt: list[int], response: list[int]) -> Tensor:
    """Logits (L, V) float64 of a response's tokens: one causal pass over it alone, no packing, no cache."""
    tokens = torch.tensor([prompt + response], device=next(model.parameters()).device)
    hidden = model(tokens)[0, len(prompt) - 1 : -1]
    return model.logits(hidden).double().cpu()


def cached_logps(model: GPT, pairs: list[tuple[list[int], list[int]]], shift: int) -> list[Tensor]:
    """All log-probs (L, V) nats, as decoding one token at a time with a KV cache sees them."""
    longest = max(len(response) for _, response in pairs)
    network = Network(model)
    first = network.start([prompt for prompt, _ in pairs], nodes=longest - 1, depth=longest + shift)
    places = network.places
    network.places = places._replace(lengths=places.lengths + shift, position=places.position + shift)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(response) for _, response in pairs], batch_first=True)
    steps = [first.logps[:, 0].cpu()]
    for node, token in enumerate(padded[:, :-1].T.to(network.device)):
        parents = torch.full((len(pairs), 1), node, device=network.device)
        steps.append(network.extend(parents, token[:, None]).logps[:, 0].cpu())
    whole = torch.stack(steps, dim=1)  # (R, longest, V)
    return [row[: len(response)] for row, (_, response) in zip(whole, pairs, strict=True)]


def check_run(c: RunClaim) -> list[Result]:
    """A run's group of checks: residuals relative to the largest term, over all responses."""
    count = len(c.responses)
    packed, ref_packed, again = (
        [logps for group in by_group(score_packed(m, c.data), c.data, c.groups) for logps in group]
        for m in (c.policy, c.reference, c.reference)
    )
    cached = cached_logps(c.policy, c.responses, c.cache_shift)
    worst: dict[str, float] = {}

    def see(id: str, residual: float):
        worst[id] = residual if residual != residual else max(residual, worst.get(id, 0.0))

    for i, (prompt, response) in enumerate(c.responses):
        at, chosen = torch.arange(len(response)), torch.tensor(response)
        logits, ref_logits = (plain_logits(m, prompt, response) for m in (c.policy, c.reference))
        log_pi, log_ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
        V = F.pad(soft_value(q_from_logits(logits, c.beta), c.beta), (0, 1))  # the network's gauge; V(terminal) = 0
        plain, ref_plain = log_pi[at, chosen], log_ref[at, chosen]
        r = reward_from_policy(plain, ref_plain, V[:-1], V[1:], c.beta)
        implicit = implicit_reward(packed[i].double(), ref_packed[i].double(), c.beta)
        see("sums to one", gap(cached[i].double().logsumexp(-1), torch.zeros(len(response))))
        see("packed = plain", gap(packed[i].double(), plain))
        see("cached = plain", gap(cached[i][at, chosen].double(), plain))
        see("equal models, zero reward", implicit_reward(again[i], ref_packed[i], c.beta).abs().max().item())
        see("telescoping", gap(r.sum(), V[0] + implicit.sum(), V))
        left = (r + c.beta * ref_plain).cumsum(0) + V[1:]
        see("search values", gap(left, V[0] + c.beta * packed[i].double().cumsum(0), V))
        kl = F.kl_div(log_pi, log_ref, log_target=True, reduction="none").sum(-1)
        see("falling likelihood", gap(expected_implicit_reward(log_pi, log_ref, c.beta), -c.beta * kl))
        see("one scored EOS", float(response.count(c.eos) != 1 or response[-1] != c.eos))
    scored = c.data.num_scored == sum(len(response) for _, response in c.responses)
    see("one scored EOS", float(not scored))
    see("recorded reference", float(weights_hash(c.reference) != c.reference_hash))
    equations = {"telescoping": "sum of 10", "search values": "12 = 13", "falling likelihood": "16"}
    exact = {"equal models, zero reward": 0.0, "one scored EOS": 0.0, "recorded reference": 0.0}
    tolerances = exact | {"falling likelihood": 1e-9}
    return [Result(id, equations.get(id, ""), count, value, tolerances.get(id, FP32)) for id, value in worst.items()]


def _changed(model: GPT, change: Callable[[str, Tensor], Tensor]) -> GPT:
    other = copy.deepcopy(model)
    other.load_state_dict({name: change(name, weight) for name, weight in model.state_dict().items()})
    return other


def _regrouped(c: RunClaim, change: Callable[[list[int]], list[int]]) -> RunClaim:
    groups = [Group(prompt, tuple(change(response) for response in responses)) for prompt, responses in c.groups]
    return replace(c, groups=groups, data=PackedData(groups, 0, c.data.row_length))


def _late(data: PackedData) -> PackedData:
    late = copy.copy(data)
    late.source = np.minimum(data.source + 1, data.row_length - 1)
    return late


def _followed(c: RunClaim) -> GPT:
    policy = c.policy.state_dict()
    return _changed(c.reference, lambda name, weight: 0.95 * weight + 0.05 * policy[name])


RUN_FAULTS: dict[str, Callable[[RunClaim], RunClaim]] = {
    "run: mask off by one": lambda c: replace(c, data=_late(c.data)),
    "run: dropped EOS": lambda c: _regrouped(c, lambda response: response[:-1] if len(response) > 1 else [0]),
    "run: truncated taken for terminal": lambda c: _regrouped(c, lambda response: response[: (len(response) + 1) // 2]),
    "run: bf16 reference": lambda c: replace(c, reference=_changed(c.reference, lambda _, w: w.bfloat16().float())),
    "run: reference moves with the policy": lambda c: replace(c, reference=_followed(c)),
    "run: cache one position late": lambda c: replace(c, cache_shift=1),
}


def gap_figures(learned: np.ndarray, exact: np.ndarray) -> dict:
    """Learned implicit rewards against the exact A*, both (tokens,) in reward units."""
    error = learned - exact
    varied = len(error) > 1 and learned.std() > 0 and exact.std() > 1e-9  # forced tokens all have A* = 0
    return {
        "rmse": float(np.sqrt(np.mean(error**2))) if len(error) else None,
        "correlation": float(np.corrcoef(learned, exact)[0, 1]) if varied else None,
        "r2": float(1 - np.mean(error**2) / exact.var()) if varied else None,
        "tokens": len(error),
    }


def optimality(run_: Run, posts: list[Post], c: RunClaim) -> dict:
    """How far a run is from the exact optimum, on pairs of the TL;DR world; every figure defined in the README."""
    world = World(run_.tokenizer)
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
    tokens = [token for group in c.groups for response in group.responses for token in response]
    flat, truth = (torch.cat([t for both in rows for t in both]) for rows in (learned, exact))
    worst = (flat - truth).abs().argmax().item()
    margins = torch.tensor([[t.sum() for t in both] for both in learned]).double().diff().flatten()
    divergence = torch.cat(divergence)
    figures, of_margins = (
        gap_figures(a.numpy(), b.numpy()) for a, b in ((flat, truth), (margins, returns.diff().flatten()))
    )
    return {
        **{f"q_gap_{name}": figures[name] for name in ("rmse", "correlation", "r2")},
        "worst_token": {
            "token": run_.tokenizer.text_of(tokens[worst]),
            "learned": flat[worst].item(),
            "exact": truth[worst].item(),
        },
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


def check(cases: int = 100, seed: int = 0, run_: Run | None = None, rows: list[dict] | None = None) -> Report:
    """Check the theory on random MDPs and, with a DPO run and preference rows, the run on those rows."""
    results, faults = check_claims(list(random_claims(cases, seed))), check_faults()
    if run_ is None:
        return Report(results, faults, None)
    require(run_.reference is not None, f"{run_.path} is a run without its reference; check a DPO run")
    require(all("chosen" in row for row in rows), "the check of a run needs rows with chosen and rejected")
    groups, _ = tokenize(rows, run_.tokenizer, run_.model.config.block_size, share=False)
    require(bool(groups), "no row fits the context of the run")
    data = PackedData(groups, run_.tokenizer.pad, 256)
    recorded = run_.config.get("reference", {}).get("hash", "")
    claim = RunClaim(run_.model, run_.reference, recorded, run_.beta, run_.tokenizer.eos, groups, data)
    sound = check_run(claim)
    for name, plant in RUN_FAULTS.items():
        few = replace(claim, groups=groups[:2], data=PackedData(groups[:2], run_.tokenizer.pad, 256))
        faults.append(Fault(name, [result.id for result in check_run(plant(few)) if not result.passed]))
    posts = [post_of(row) for row in rows]
    ours = len(groups) == len(rows) and World(run_.tokenizer).wrote(rows)
    return Report(results + sound, faults, optimality(run_, posts, claim) if ours else None)


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
    console.print("[green]all hold, all faults flagged[/]" if report.passed else "[red]the check FAILED[/]")


@dataclass(frozen=True)
class Options:
    """Check the paper's identities, and a trained run."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """A DPO run to check too."""
    data: Path | None = None
    """Preference JSONL to check the run on. Default: the rows that it held out."""
    pairs: int = 64
    """How many of its pairs."""
    cases: int = 100
    """Random MDPs."""
    seed: int = 0
    """Of the random MDPs."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self):
        for name in ("pairs", "cases"):
            require(0 < getattr(self, name) <= 10**6, f"{name} must be between 1 and a million")
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63, got {self.seed}")


def main(options: Options):
    run_ = rows = None
    if options.run is not None:
        run_ = load_run(options.run, torch.device("cpu"))
        rows = read_jsonl(options.data or options.run / "held_out.jsonl")[: options.pairs]
    report = check(options.cases, options.seed, run_, rows)
    if options.json:
        print(json.dumps(report.as_json(), indent=2, allow_nan=False))
    else:
        show(report, Console(highlight=False))
    if not report.passed:
        sys.exit(1)


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.bellman")
