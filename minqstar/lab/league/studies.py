"""What is asked of the league's trained models: where they go with all data, beams, other words, lost probability."""

from collections.abc import Callable

from minqstar.evaluate import MAX_NEW_TOKENS
from minqstar.lab.findings.lab import ROWS, chunks, outcome
from minqstar.lab.league import limits, robust, squeeze
from minqstar.lab.league.methods import METHODS
from minqstar.lab.league.study import League
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.evaluator import Network

BEAMS = (1, 2, 5, 7)  # of the paper's Fig. 5


def compare_beams(league: League) -> dict:
    """Appendix E, Fig. 5: beams on PPO's policies beside DPO's, against the preferred summaries of held-out posts."""
    prompts, ends = [group.prompt for group in league.groups[: league.lab.scale.posts]], league.lab.main.tokenizer.ends
    curves: dict[str, list[dict]] = {}
    for name in ("dpo", "ppo", "ppo_true"):
        model, curves[name] = league.model(name, 0), []
        for width in BEAMS:
            found = []
            for some in chunks(prompts, ROWS):
                searched = beam_search(Network(model), some, ends, MAX_NEW_TOKENS, BeamConfig(width))
                found += [best[0] for best in searched]
            curves[name].append(outcome(league.lab, found))
    return {"widths": list(BEAMS), "posts": len(prompts), "curves": curves}


def compare_robust(league: League) -> dict:
    what = (league.world, league.posts, league.groups, league.beta)
    return {name: robust.figures(league.credit(name, league.model(name, 0)), *what) for name in METHODS}


def compare_flows(league: League) -> dict:
    kept = slice(league.lab.scale.posts)
    what = (league.world, league.posts[kept], league.groups[kept], league.beta)
    policies = [name for name, method in METHODS.items() if method.credit != "head"]
    found = {name: squeeze.figures(league.model(name, 0), league.reference, *what) for name in policies}
    return {"optimum": squeeze.optimum(*what), **found}


STUDIES: dict[str, Callable[[League], dict]] = {
    "limits": lambda _: limits.limits(),
    "beams": lambda league: league.lab.piece("league_beams", lambda: compare_beams(league)),
    "robust": lambda league: league.lab.piece("league_robust", lambda: compare_robust(league)),
    "squeeze": lambda league: league.lab.piece("league_squeeze", lambda: compare_flows(league)),
}
