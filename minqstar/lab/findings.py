"""The paper's findings as numbers: each function returns what its figure draws, all of it plain JSON."""

from collections.abc import Callable

import numpy as np
import torch

from minqstar.checkpoint import Run, load_run
from minqstar.data import Group
from minqstar.lab.credit import credits, decisive_figures, example, stitching_figures
from minqstar.lab.evaluate import (
    MAX_NEW_TOKENS,
    fact_error_rate,
    judged,
    mean_return,
    off_grammar_rate,
    rewards_and_truth,
)
from minqstar.lab.searches import exact, learned, paired_trees
from minqstar.lab.studies import CPU, ROWS, Lab, chunks, summary
from minqstar.lab.tabular import fit
from minqstar.mdp import TokenMDP, tree
from minqstar.scoring import score_groups
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import Decoded, decode, greedy, sampler
from minqstar.search.evaluator import Network, Proxy

WIDTHS = (1, 2, 3, 5, 7, 10, 20)
ALPHAS = (0.0, 1.0)  # of the beam: summed, and divided by length as transformers does by default
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # alpha of proxy tuning


def interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """The middle 95% of bootstrapped means."""
    draws = np.random.default_rng(seed).integers(0, len(values), (1000, len(values)))
    return np.quantile(values[draws].mean(-1), (0.025, 0.975)).tolist()


def credit(lab: Lab) -> dict:
    """Section 1: which tokens are paid for."""
    edit = example(lab.main, lab.rows)
    group = Group(lab.main.tokenizer.encode(edit.post.prompt), edit.versions)
    ((right, one, two),) = credits(lab.main, [group], [edit.post])
    first, second = edit.facts
    versions = {"right": right, f"wrong: {first}": one, f"wrong: {first}, {second}": two}
    return {
        "prompt": edit.post.prompt,
        "versions": {name: of._asdict() for name, of in versions.items()},
        **decisive_figures(lab.main, lab.rows),
        **stitching_figures(lab.main, lab.rows),
    }


def beams(lab: Lab) -> dict:
    """Section 2: what a wider beam finds, by beta, by the beam's alpha, and with a labeller who likes length."""
    bias = 0.3  # reward units a token: more than a filler costs
    studies = [(f"beta {beta:g}", beta, 0.0) for beta in lab.scale.betas]
    studies += [(f"beta {beta:g}, length-biased labels", beta, bias) for beta in lab.scale.biased_betas]
    curves = {}
    for name, beta, of in studies:
        curves[name] = lab.piece(f"beams_{beta:g}_{of:g}", lambda beta=beta, of=of: widths(lab, lab.run(beta, bias=of)))
    return {"widths": list(WIDTHS), "posts": lab.scale.posts, "length_bias": bias, "curves": curves}


def widths(lab: Lab, run_: Run) -> dict:
    """By the beam's alpha: win rate, length, true and implicit return at every width."""
    count = lab.scale.posts
    posts, prompts = lab.posts[:count], [group.prompt for group in lab.groups[:count]]
    preferred = np.array(
        [lab.world.judge(post, row["chosen"]).total for post, row in zip(posts, lab.rows, strict=False)]
    )
    found = {}
    with lab.session.progress("beams", len(ALPHAS) * len(WIDTHS)) as advance:
        for alpha in ALPHAS:
            line = []
            for width in WIDTHS:
                config = BeamConfig(width, alpha=alpha)
                best: list[Decoded] = []
                for some in chunks(prompts, ROWS):
                    searched = beam_search(Network(run_.model), some, run_.tokenizer.eos, MAX_NEW_TOKENS, config)
                    best += [responses[0] for responses in searched]
                verdicts = [judged(lab.world, *both) for both in zip(posts, best, strict=True)]
                total = np.array([verdict.total for verdict in verdicts])
                wins = (total > preferred) + 0.5 * (total == preferred)  # off the grammar is lost
                line.append(
                    {
                        "win_rate": wins.mean(),
                        "win_interval": interval(wins),
                        "length": float(np.mean([len(b.tokens) for b in best])),
                        "true_return": mean_return(verdicts),
                        "implicit_return": lab.returns(run_, [b.tokens for b in best]).mean(),
                        "logp": float(np.mean([b.score for b in best])),
                        "off_grammar": off_grammar_rate(verdicts),
                        "fact_errors": fact_error_rate(verdicts),
                    }
                )
                advance()
            found[f"alpha {alpha:g}"] = {key: [point[key] for point in line] for key in line[0]}
    return found


def likelihoods(lab: Lab) -> dict:
    """Section 3: implicit rewards during DPO from three references, and their expectation by Eq. 16."""
    courses = {start: lab.course(start) for start in ("all", "chosen", "none")}
    for course in courses.values():
        course["history"] = {name: smooth(values) for name, values in course["history"].items()}
    worst = max(
        abs(m["difference"]) / max(m["standard_error"], 1e-12) for of in courses.values() for m in of["measured"]
    )
    return {"draws": lab.scale.draws, "courses": courses, "largest_difference_in_standard_errors": worst}


def smooth(values: list[float], points: int = 100) -> list[list[float]]:
    """Means over equal stretches of steps: [step, mean]."""
    parts = np.array_split(np.arange(len(values)), min(points, len(values)))
    return [[float(part.mean()) + 1, float(np.mean(np.array(values)[part]))] for part in parts]


def equivalence(lab: Lab) -> dict:
    """Section 4: what searches find for their tokens; and that guided and likelihood search grow one tree."""
    rows = lab.rows[: lab.scale.posts]
    return {
        "posts": len(rows),
        "learned": lab.piece("searches_learned", lambda: learned(lab.main, rows, variants=True)),
        "exact": lab.piece("searches_exact", lambda: exact(lab.world, rows)),
        "identical_trees": paired_trees(lab.world, rows[:64]),
    }


def q_gap(lab: Lab) -> dict:
    """Section 5: how near the learned rewards are to A*, by pairs, beta and steps; and the limit, in a table."""

    def gap(run_: Run) -> dict:
        figures = summary(run_)
        return {name: figures[f"q_gap_{name}"] for name in ("rmse", "correlation", "r2")}

    both = (score_groups(model, lab.groups, lab.main.tokenizer.pad) for model in (lab.main.model, lab.main.reference))
    rewards, truth, classes = rewards_and_truth(lab.world, lab.posts, lab.groups, *both, lab.main.beta)
    some = np.random.default_rng(0).permutation(len(rewards))[:3000]
    tabular = fit(small_tree(), beta=0.5)
    return {
        "pairs": {str(n): gap(lab.run(pairs=n)) for n in lab.scale.pairs},
        "beta": {f"{beta:g}": gap(lab.run(beta)) for beta in lab.scale.betas},
        "steps": {str(m["step"]): m["q_gap"] for m in lab.course("all")["measured"]},
        "scatter": {
            "learned": np.round(rewards[some], 4).tolist(),
            "exact": np.round(truth[some], 4).tolist(),
            "class": classes[some].tolist(),
        },
        "tabular": {"loss": tabular.loss, "policy_gap": tabular.policy_gap, "reward_gap": tabular.reward_gap},
    }


def small_tree() -> TokenMDP:
    """All strings of at most three tokens out of three, with a random pi_ref and random rewards."""
    (token, next_), generator = tree(3, 3), torch.Generator().manual_seed(0)
    logits, reward = (torch.randn(token.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return TokenMDP(token, next_, logits.masked_fill(token < 0, -torch.inf).log_softmax(-1), reward)


def proxy(lab: Lab) -> dict:
    """Section 6: a larger base model steered by the small pair, beside DPO on the larger one itself."""
    base = load_run(lab.larger_reference, CPU).model
    steered = lab.piece("proxy", lambda: {"mixes": [mixed(lab, base, alpha) for alpha in MIXES]})["mixes"]
    larger = lab.run(reference=lab.larger_reference)
    alone = {name: lab.piece(f"proxy_{name}", lambda of=of: sampled(lab, Network(of))) for name, of in (
        ("larger_dpo", larger.model), ("small_dpo", lab.main.model), ("small_base", lab.main.reference)
    )}  # fmt: skip
    parameters = {"larger": base.num_parameters(), "small": lab.main.model.num_parameters()}
    return {"alpha": list(MIXES), "parameters": parameters, "steered": steered, **alone}


def mixed(lab: Lab, base, alpha: float) -> dict:
    return sampled(lab, Proxy(Network(base), Network(lab.main.model), Network(lab.main.reference), alpha))


def sampled(lab: Lab, evaluator, choose: Callable | None = None) -> dict:
    """Draws at temperature 1 for the first posts: wrong facts, true return, off the grammar."""
    choose = choose or sampler(torch.Generator().manual_seed(0))
    prompts = [group.prompt for group in lab.groups]
    draws: list[Decoded] = []
    with lab.session.progress("sampling", len(prompts)) as advance:
        for some in chunks(prompts, ROWS):
            draws += [line[0] for line in decode(evaluator, some, lab.main.tokenizer.eos, MAX_NEW_TOKENS, choose)]
            advance(len(some))
    verdicts = [judged(lab.world, *both) for both in zip(lab.posts, draws, strict=True)]
    totals = np.array([v.total for v in verdicts if v.total == v.total])
    return {
        "fact_error_rate": fact_error_rate(verdicts),
        "judge_return": mean_return(verdicts),
        "judge_interval": interval(totals) if len(totals) else None,
        "off_grammar": off_grammar_rate(verdicts),
    }


def leak(lab: Lab) -> dict:
    """Section 7: how much probability DPO moves off the grammar, and what lessens it."""

    def of(name: str, run_: Run) -> dict:
        return lab.piece(f"leak_{name}", lambda: lab.leak(run_.model))

    def draws(name: str, **rules) -> dict:
        choose = sampler(torch.Generator().manual_seed(0), **rules) if rules else greedy
        return lab.piece(f"leak_by_{name}", lambda: sampled(lab, Network(lab.main.model), choose))

    return {
        "reference": lab.piece("leak_reference", lambda: lab.leak(lab.main.reference)),
        "steps": {str(m["step"]): m["leak"] for m in lab.course("all")["measured"]},
        "beta": {f"{beta:g}": of(f"beta{beta:g}", lab.run(beta)) for beta in lab.scale.betas},
        "pairs": {str(n): of(f"pairs{n}", lab.run(pairs=n)) for n in lab.scale.pairs},
        "decoding": {
            "temperature 1": draws("t1", temperature=1.0),
            "temperature 0.7": draws("t07", temperature=0.7),
            "top-p 0.95": draws("p95", top_p=0.95),
            "top-p 0.9": draws("p9", top_p=0.9),
            "greedy": draws("greedy"),
        },
    }


FINDINGS: dict[str, Callable[[Lab], dict]] = {
    "credit": credit,
    "beams": beams,
    "likelihoods": likelihoods,
    "equivalence": equivalence,
    "q_gap": q_gap,
    "proxy": proxy,
    "leak": leak,
}
