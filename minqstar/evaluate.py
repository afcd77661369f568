"""What a trained policy is worth: on anyone's preference pairs, and in the TL;DR world against the exact Q*.

    python -m minqstar.evaluate runs/dpo                                     # repeats the run's figures
    python -m minqstar.evaluate runs/dpo --data data/tldr/validation.jsonl   # on other rows

Every figure is defined by its formula in the README's glossary.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from minqstar.cli import run
from minqstar.console import Console
from minqstar.errors import require
from minqstar.lm.model import GPT
from minqstar.lm.tokenizer import Tokenizer
from minqstar.pair import PairOptions
from minqstar.search.decode import Decoded, by_room, decode, greedy, sampler
from minqstar.search.evaluator import Network
from minqstar.show import figures_table
from minqstar.theory.qfunction import expected_implicit_reward, implicit_reward
from minqstar.training.checkpoint import Run, held_out
from minqstar.training.data import Group, PackedData, tokenize
from minqstar.training.formats import Rows
from minqstar.training.scoring import score_groups
from minqstar.world.automaton import CLASSES
from minqstar.world.posts import Post, post_of, read_post
from minqstar.world.tldr import Judgement, World, world_hash

MAX_NEW_TOKENS = 48  # summaries of the world end within 40
DRAWN, LONGEST = 32, 128  # draws for prompts of others, and tokens of the longest
ROWS_AT_ONCE = 256  # decoded together


def oracle(run_: Run, posts: Sequence[Post | None]) -> World | None:
    """The world with its exact Q*, if it can speak of a run on these posts; the one way from a run to the oracle.

    None if there are no posts or one is not of today's world, or if the run learned another world, which a warning
    says. Of a run that does not say which world it learned, today's is assumed, with a warning.
    """
    if not posts or not isinstance(run_.tokenizer, Tokenizer):
        return None
    today, learned = world_hash(), run_.config.get("world")
    if learned not in (None, today):
        which = f"another world ({str(learned)[:8]}) than today's ({today[:8]}): scenarios, eps or rewards were changed"
        advice = "it is not compared with the exact Q*; undo the change, or train it anew"
        warnings.warn(f"{run_.path} learned {which}; {advice}", stacklevel=1)
        return None
    if not all(posts):
        return None
    if learned is None:
        words = f"does not say which world it learned; it is compared with today's ({today[:8]})"
        warnings.warn(f"{run_.path} {words}", stacklevel=1)
    return World(run_.tokenizer)


def warn_of_prompt(run_: Run, prompt: str | list[dict]):
    """A warning if a prompt is of a kind that the run has not learned from."""
    file = run_.path / "held_out.jsonl"
    row = next(iter(Rows(file))) if file.is_file() and file.stat().st_size else {}
    known = row["prompt"] if isinstance(row.get("prompt"), str) else ""
    if not isinstance(prompt, str):
        return
    if prompt[-1:].isspace() and not known[-1:].isspace():
        words = "the prompt ends in white space; a space belongs to the word behind it, so leave it to the response"
    elif run_.config.get("world") and read_post(prompt) is None:
        words = f"the prompt is no post of the TL;DR world, and {run_.path} has learned from nothing else"
    else:
        return
    warnings.warn(words, stacklevel=1)


def mean_nll(model: GPT, groups: list[Group], pad: int) -> float:
    """The mean of -log pi over all response tokens, nats."""
    return -torch.cat([logps for group in score_groups(model, groups, pad) for logps in group]).mean().item()


def pair_figures(
    policy: list[list[torch.Tensor]], reference: list[list[torch.Tensor]], beta: float
) -> dict[str, float]:
    """Implicit returns of chosen and rejected, and how often the chosen one's is larger."""
    returns = torch.tensor(
        [
            implicit_reward(p, r, beta).double().sum().item()
            for of_policy, of_reference in zip(policy, reference, strict=True)
            for p, r in zip(of_policy, of_reference, strict=True)
        ]
    ).view(-1, 2)
    margin = returns[:, 0] - returns[:, 1]
    return {
        "reward_margin": margin.mean().item(),
        "chosen_reward": returns[:, 0].mean().item(),
        "rejected_reward": returns[:, 1].mean().item(),
        "pair_accuracy": ((margin > 0).double() + 0.5 * (margin == 0)).mean().item(),
    }


@torch.no_grad()
def why_it_falls(run_: Run, groups: Sequence[Group], policy: list, reference: list) -> dict[str, float]:
    """What moves the implicit returns of pairs beside what was preferred, reward units.

    `chosen_expected_reward`: along the chosen answers the sum of E_{a ~ pi_ref}[beta log(pi/pi_ref)], which is
    -beta KL(pi_ref || pi) at each state (Eq. 16), a mean over answers. And EOS's own rewards.
    """
    pairs = [zip(*both, strict=True) for both in zip(policy, reference, strict=True)]
    eos = [[implicit_reward(p[-1], r[-1], run_.beta) for p, r in pair] for pair in pairs]
    data, total = PackedData(groups, run_.tokenizer.pad, 256), 0.0
    for batch in data.batches(range(len(data)), max(1, 8192 // data.row_length)):
        batch = batch.to(next(run_.model.parameters()).device)
        seen = (batch.tokens, batch.positions, batch.mask())
        of_chosen = {"keep": batch.source[batch.response % 2 == 0], "before": batch.before}
        models = (run_.model, run_.reference)
        for hidden in zip(*(model(*seen, **of_chosen).split(1024) for model in models), strict=True):
            logps = [m.logits(h).float().log_softmax(-1) for m, h in zip(models, hidden, strict=True)]
            total += expected_implicit_reward(*logps, run_.beta).double().sum().item()
    chosen, rejected = torch.tensor(eos).double().mean(0).tolist()
    return {"chosen_expected_reward": total / len(groups), "chosen_eos_reward": chosen, "rejected_eos_reward": rejected}


def draw_figures(run_: Run, groups: Sequence[Group], seed: int) -> dict[str, float]:
    """How long draws are, tokens, EOS included: of some prompts, and none longer than LONGEST."""
    prompts = [group.prompt for group in groups[:DRAWN]]
    drawn = [decode_all(m, prompts, run_.tokenizer.ends, seed, LONGEST) for m in (run_.model, run_.reference)]
    ours, theirs = (float(np.mean([len(draw.tokens) for draw in draws])) for draws in drawn)
    return {"mean_length": ours, "ref_mean_length": theirs}


def fact_error_rate(verdicts: list[Judgement]) -> float:
    """Of the slots that were filled; 0 if none was."""
    wrong = sum(len(v.wrong) for v in verdicts)
    return wrong / max(1, wrong + sum(len(v.right) for v in verdicts))


def mean_return(verdicts: list[Judgement]) -> float | None:
    """Of those that stay in the grammar; None if none does."""
    totals = [v.total for v in verdicts if v.total == v.total]
    return float(np.mean(totals)) if totals else None


def off_grammar_rate(verdicts: list[Judgement]) -> float:
    return float(np.mean([v.total != v.total for v in verdicts]))


def decode_all(
    model: GPT, prompts: list[list[int]], ends: tuple[int, ...], seed: int | None, longest: int = MAX_NEW_TOKENS
) -> list[Decoded]:
    """One response to each prompt: a draw at temperature 1, or greedy without a seed."""
    evaluator = Network(model)
    generator = torch.Generator(next(model.parameters()).device)
    choose = greedy if seed is None else sampler(generator.manual_seed(seed))
    answers: dict[int, Decoded] = {}
    for limit, places in by_room(prompts, model.config.block_size, longest).items():
        for start in range(0, len(places), ROWS_AT_ONCE):
            some = places[start : start + ROWS_AT_ONCE]
            drawn = decode(evaluator, [prompts[i] for i in some], ends, limit, choose)
            answers |= {i: draw for i, (draw,) in zip(some, drawn, strict=True)}
    return [answers[i] for i in range(len(prompts))]


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


def rewards_and_truth(
    world: World, posts: list[Post], groups: list[Group], policy: list, reference: list, beta: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all tokens of the world's pairs the learned rewards, the exact A* (both reward units), and the classes."""
    rewards, truth, kinds = [], [], []
    for side in (0, 1):
        oracle = world.exact_all(posts, [group.responses[side] for group in groups], beta)
        for p, r, exact in zip(policy, reference, oracle, strict=True):
            rewards += implicit_reward(p[side], r[side], beta).tolist()
            truth += exact.advantage.tolist()
            kinds += exact.kind
    return np.array(rewards), np.array(truth), np.array(kinds)


def world_figures(
    world: World, run_: Run, rows: list[dict], groups: list[Group], policy: list, reference: list, seed: int
) -> dict:
    """The figures that need the oracle, on the world's own rows (in order, none skipped)."""
    ends, beta = run_.tokenizer.ends, run_.beta
    posts = [post_of(row) for row in rows]
    prompts = [group.prompt for group in groups]
    draws = decode_all(run_.model, prompts, ends, seed)
    kept = (draws, decode_all(run_.reference, prompts, ends, seed), decode_all(run_.model, prompts, ends, None))
    ours, theirs, greedy_ones = (
        [world.judge_tokens(post, draw.tokens) for post, draw in zip(posts, d, strict=True)] for d in kept
    )
    preferred, other = (
        [world.judge(post, row[side]).total for post, row in zip(posts, rows, strict=True)]
        for side in ("chosen", "rejected")
    )
    optimum = world.optimum(posts, beta)

    sampled = [Group(group.prompt, (draw.tokens,)) for group, draw in zip(groups, draws, strict=True)]
    ref_logps = score_groups(run_.reference, sampled, run_.tokenizer.pad)
    log_ratio = [sum(draw.logps) - ref[0].double().sum().item() for draw, ref in zip(draws, ref_logps, strict=True)]

    learned, exact, classes = rewards_and_truth(world, posts, groups, policy, reference, beta)
    whole = gap_figures(learned, exact)
    return {
        "kl_to_ref": float(np.mean(log_ratio)),
        "fact_error_rate": fact_error_rate(ours),
        "ref_fact_error_rate": fact_error_rate(theirs),
        "optimal_fact_error_rate": optimum["wrong"] / optimum["filled"],
        "judge_return": mean_return(ours),
        "ref_judge_return": mean_return(theirs),
        "optimal_judge_return": optimum["judge_return"],
        "optimal_pair_accuracy": float(
            np.mean([(c > r) + 0.5 * (c == r) for c, r in zip(preferred, other, strict=True)])
        ),
        "win_rate_vs_preferred": float(
            np.mean([(v.total > c) + 0.5 * (v.total == c) for v, c in zip(ours, preferred, strict=True)])
        ),
        "off_grammar_rate": off_grammar_rate(ours),
        "ref_off_grammar_rate": off_grammar_rate(theirs),
        "greedy_off_grammar_rate": off_grammar_rate(greedy_ones),
        "mean_length": float(np.mean([len(draw.tokens) for draw in draws])),
        "optimal_mean_length": optimum["tokens"],
        **{f"q_gap_{name}": whole[name] for name in ("rmse", "correlation", "r2")},
        "q_gap_by_class": {name: gap_figures(learned[classes == name], exact[classes == name]) for name in CLASSES},
    }


def evaluate(run_: Run, rows: list[dict], seed: int = 0) -> dict:
    """All figures of a DPO run on held-out pairs; those against the oracle where it knows every row.

    No figures at all if no row is usable. UserError if a row is not a pair.
    """
    require(all("chosen" in row for row in rows), "evaluation needs rows with chosen and rejected")
    groups, skipped = tokenize(rows, run_.tokenizer, run_.model.config.block_size, share=False)
    if not groups:
        return {}
    policy, reference = (score_groups(model, groups, run_.tokenizer.pad) for model in (run_.model, run_.reference))
    figures = {"pairs": len(rows) - skipped.total(), **pair_figures(policy, reference, run_.beta)}
    figures |= why_it_falls(run_, groups, policy, reference)
    world = oracle(run_, [post_of(row) for row in rows])
    if world and len(groups) == len(rows) and world.wrote(rows):
        figures |= world_figures(world, run_, rows, groups, policy, reference, seed)
    else:
        figures |= draw_figures(run_, groups, seed)
    return figures


@dataclass(frozen=True)
class Options(PairOptions):
    """Evaluate a DPO run on held-out pairs."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """The run folder. Default: runs/dpo."""
    policy: Path | None = None
    """In place of a run: any run or Hugging Face folder, judged against --ref."""
    data: Path | None = None
    """Preference JSONL. Default: the rows that the run held out, which repeats its summary."""
    seed: int = 0
    """Seed of the draws."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self):
        require(not (self.run and self.policy), "give a RUN or --policy, not both")
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63, got {self.seed}")


def main(options: Options):
    run_ = options.open_both(options.policy or options.run or Path("runs/dpo"))
    rows = held_out(run_, options.data)
    figures = evaluate(run_, rows, options.seed)
    if options.json:
        print(json.dumps(figures, indent=2, allow_nan=False))
    else:
        Console().print(figures_table(figures))


if __name__ == "__main__":
    run(main, Options, "python -m minqstar.evaluate")
