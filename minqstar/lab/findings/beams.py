"""The paper's findings as numbers: each function returns what its figure draws, all of it plain JSON."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from minqstar.errors import require
from minqstar.evaluate import (
    MAX_NEW_TOKENS,
    decode_all,
    fact_error_rate,
    rewards_and_truth,
)
from minqstar.lab.courses import course, leakage
from minqstar.lab.credit import decisive_figures, example, plain, stitching_figures
from minqstar.lab.searches import exact, learned, paired_trees
from minqstar.lab.studies import CPU, ROWS, Lab, chunks, summary
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import Decoded, decode, greedy, sampler
from minqstar.search.evaluator import Network, Proxy, Table
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.theory.mdp import TokenMDP, solve, tree
from minqstar.theory.tabular import fit
from minqstar.training.checkpoint import Run, load_run
from minqstar.training.scoring import score_groups


def interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """The middle 95% of bootstrapped means."""
    draws = np.random.default_rng(seed).integers(0, len(values), (1000, len(values)))
    return np.quantile(values[draws].mean(-1), (0.025, 0.975)).tolist()


def credit(lab: Lab) -> dict:
    """Section 1: which tokens are paid for."""
    prompt, versions = example(lab.main, lab.rows)
    return {
        "prompt": prompt,
        "versions": {name: plain(of) for name, of in versions.items()},
        **decisive_figures(lab.main, lab.rows),
        **stitching_figures(lab.main, lab.rows),
    }


def beams(lab: Lab) -> dict:
    """Section 2: what a wider beam finds, by beta, by the beam's alpha, and with a labeller who likes length.

    Beside the beams, for each beta: draws of the policy at temperature 1, and the likeliest response under the exact
    pi*, which search would find there.
    """
    bias = 0.3  # reward units a token: more than a filler costs
    studies = [(f"beta {beta:g}", beta, 0.0) for beta in lab.scale.betas]
    studies += [(f"beta {beta:g}, length-biased labels", beta, bias) for beta in lab.scale.biased_betas]
    curves, draws, ceiling = {}, {}, {}
    for name, beta, of in studies:
        what = (lab, beta, of)
        curves[name] = lab.piece(f"beams_{beta:g}_{of:g}", partial(widths, *what))
        draws[name] = lab.piece(f"draws_{beta:g}_{of:g}", partial(drawn, *what))
        if not of:
            ceiling[name] = outcome(lab, likeliest(lab, beta))
    found = {"curves": curves, "draws": draws, "likeliest_under_exact_optimum": ceiling}
    return {"widths": list(lab.scale.widths), "posts": lab.scale.posts, "length_bias": bias, **found}


def outcome(lab: Lab, responses: list[Decoded], bias: float = 0.0, learned: np.ndarray | None = None) -> dict:
    """What the oracle says of one response to each of the first posts.

    Returns are means over the responses that stay in the grammar, None if none does: the true one, the labeller's
    (with its `bias` for each token), and the `learned` ones (N,), if they are given.
    """
    posts, rows = lab.posts[: len(responses)], lab.rows[: len(responses)]
    preferred = np.array([lab.world.judge(post, row["chosen"]).total for post, row in zip(posts, rows, strict=True)])
    verdicts = [lab.world.judge_tokens(post, r.tokens) for post, r in zip(posts, responses, strict=True)]
    total = np.array([verdict.total for verdict in verdicts])
    length = np.array([len(response.tokens) for response in responses])
    wins = (total > preferred) + 0.5 * (total == preferred)  # off the grammar is lost
    kept = ~np.isnan(total)
    returns = {"true_return": total, "labelled_return": total + bias * length}
    returns |= {"learned_return": learned} if learned is not None else {}
    return {
        "win_rate": float(wins.mean()),
        "win_interval": interval(wins),
        "length": float(length.mean()),
        "off_grammar": float(1 - kept.mean()),
        "fact_errors": fact_error_rate(verdicts),
        **{name: float(of[kept].mean()) if kept.any() else None for name, of in returns.items()},
    }


def widths(lab: Lab, beta: float, bias: float) -> dict:
    """By the beam's alpha, at every width: what the oracle says, and the learned return.

    That is the implicit return and the exact V*(s_0), by telescoping; DPO leaves V* open.
    """
    run_ = lab.run(beta, bias=bias)
    prompts, values = [group.prompt for group in lab.groups[: lab.scale.posts]], lab.values(beta, bias)
    found = {}
    with lab.session.progress("beams", len(lab.scale.alphas) * len(lab.scale.widths)) as advance:
        for alpha in lab.scale.alphas:
            line = []
            for width in lab.scale.widths:
                config = BeamConfig(width, alpha=alpha)
                best: list[Decoded] = []
                for some in chunks(prompts, ROWS):
                    searched = beam_search(Network(run_.model), some, run_.tokenizer.eos, MAX_NEW_TOKENS, config)
                    best += [responses[0] for responses in searched]
                learned = lab.returns(run_, [b.tokens for b in best]) + values[: len(best)]
                line.append({**outcome(lab, best, bias, learned), "logp": float(np.mean([b.score for b in best]))})
                advance()
            found[f"alpha {alpha:g}"] = {key: [point[key] for point in line] for key in line[0]}
    return found


def drawn(lab: Lab, beta: float, bias: float) -> dict:
    run_ = lab.run(beta, bias=bias)
    prompts = [group.prompt for group in lab.groups[: lab.scale.posts]]
    return outcome(lab, decode_all(run_.model, prompts, run_.tokenizer.eos, 0))


def likeliest(lab: Lab, beta: float) -> list[Decoded]:
    """The likeliest response under the exact pi*: tree search to its proof."""
    posts = lab.posts[: lab.scale.posts]
    found: list = [None] * len(posts)
    for _, places, mdp in lab.world.tables(posts):
        table = Table(mdp, solve(mdp, beta), beta, lab.main.tokenizer.n_vocab)
        searched, _ = mcts(table, [[]] * len(places), lab.main.tokenizer.eos, MAX_NEW_TOKENS, MCTSConfig(10**4))
        for place, of in zip(places, searched, strict=True):
            require(of.proved, "tree search has not closed an exact tree")
            found[place] = of.response
    return found


def likelihoods(lab: Lab) -> dict:
    """Section 3: implicit rewards during DPO from three references, and their expectation by Eq. 16."""
    courses = {start: course(lab, start) for start in ("all", "chosen", "none")}
    for of in courses.values():
        of["history"] = {name: smooth(values) for name, values in of["history"].items()}
    worst = max(
        abs(m["difference"]) / max(m["standard_error"], 1e-12) for of in courses.values() for m in of["measured"]
    )
    return {"draws": lab.scale.draws, "courses": courses, "largest_difference_in_standard_errors": worst}


def smooth(values: list[float], points: int = 100) -> list[list[float]]:
    """Means over equal stretches: [steps made, mean]; the first value was measured before any."""
    parts = np.array_split(np.arange(len(values)), min(points, len(values)))
    return [[float(part.mean()), float(np.mean(np.array(values)[part]))] for part in parts]


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
        "steps": {str(m["step"]): m["q_gap"] for m in course(lab, "all")["measured"]},
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
    steered = lab.piece("proxy", lambda: {"mixes": [mixed(lab, base, alpha) for alpha in lab.scale.mixes]})["mixes"]
    larger = lab.run(reference=lab.larger_reference)
    alone = {name: lab.piece(f"proxy_{name}", lambda of=of: sampled(lab, Network(of))) for name, of in (
        ("larger_dpo", larger.model), ("small_dpo", lab.main.model)
    )}  # fmt: skip
    parameters = {"larger": base.num_parameters(), "small": lab.main.model.num_parameters()}
    return {"alpha": list(lab.scale.mixes), "parameters": parameters, "steered": steered, **alone}


def mixed(lab: Lab, base, alpha: float) -> dict:
    return sampled(lab, Proxy(Network(base), Network(lab.main.model), Network(lab.main.reference), alpha))


def sampled(lab: Lab, evaluator, choose: Callable | None = None) -> dict:
    """What the oracle says of a draw at temperature 1 for each post, or of what else `choose` makes."""
    choose = choose or sampler(torch.Generator().manual_seed(0))
    prompts = [group.prompt for group in lab.groups]
    draws: list[Decoded] = []
    with lab.session.progress("sampling", len(prompts)) as advance:
        for some in chunks(prompts, ROWS):
            draws += [line[0] for line in decode(evaluator, some, lab.main.tokenizer.eos, MAX_NEW_TOKENS, choose)]
            advance(len(some))
    return outcome(lab, draws)


def leak(lab: Lab) -> dict:
    """Section 7: how much probability DPO moves off the grammar, and what lessens it."""

    def of(name: str, run_: Run) -> dict:
        return lab.piece(f"leak_{name}", lambda: leakage(lab, run_.model))

    def draws(name: str, **rules) -> dict:
        choose = sampler(torch.Generator().manual_seed(0), **rules) if rules else greedy
        return lab.piece(f"leak_by_{name}", lambda: sampled(lab, Network(lab.main.model), choose))

    return {
        "draws": len(lab.groups),
        "reference": lab.piece("leak_reference", lambda: leakage(lab, lab.main.reference)),
        "steps": {str(m["step"]): m["leak"] for m in course(lab, "all")["measured"]},
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
