"""A policy and its reference as a Q-function: `load` a run, `score` texts, `search` for responses.

    import minqstar
    q = minqstar.load("runs/dpo")                        # or load("MODEL", reference="BASE"), Hugging Face folders
    scored = q.score(prompt, " A summary.")[0]          # rewards, logps, ref_logps: one number a token
    answer = q.search(prompt, "beam", width=5)           # the likeliest response that five beams find

A token's *implicit reward* is beta log(pi/pi_ref) (Eq. 10, 11): what the token adds to, or takes from, the return that
its prefix promised.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from minqstar.errors import UserError, require
from minqstar.evaluate import oracle, warn_of_prompt
from minqstar.pair import load_pair
from minqstar.score import Scored, token_rewards
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import Choose, Decoded, best_of_n, decode, greedy, sampler
from minqstar.search.evaluator import Evaluator, ImplicitReward, Network, Proxy, Table
from minqstar.search.mcts import Found, MCTSConfig, mcts
from minqstar.search.tree import Tree
from minqstar.theory.mdp import solve
from minqstar.training.checkpoint import Run, load_run
from minqstar.training.data import Group
from minqstar.world.posts import Post, read_post
from minqstar.world.tldr import BETA, Judgement, World

EXACT_POLICY = "the world's exact policy"
NEEDS_ORACLE = "needs a post of the TL;DR world as the prompt, and a run that learned it"
Judge = Callable[[Decoded], Judgement]


@dataclass(frozen=True)
class SearchConfig:
    """How to look for a response."""

    search: Literal["greedy", "sample", "best-of-n", "beam", "mcts"] = "greedy"
    """How to look for a response."""
    beam: BeamConfig = field(default_factory=BeamConfig)
    mcts: MCTSConfig = field(default_factory=MCTSConfig)
    step: Literal["likelihood", "implicit", "guided"] = "likelihood"
    """Of mcts: what a token earns. likelihood: beta log pi. implicit: beta log(pi/pi_ref). guided: the TL;DR world's
    true r + beta log pi_ref, its exact V* at the leaves, its exact policy as the prior; the run is not asked."""
    proxy_base: Path | None = None
    """A run whose model this run steers (proxy tuning): pi_base (pi/pi_ref)^alpha is searched in place of pi."""
    proxy_alpha: float = 1.0
    """How far it is steered; 0 is the base alone."""
    temperature: float = 1.0
    """Of sample and best-of-n; 1 draws from the policy itself, 0 is greedy."""
    top_k: int = 0
    """Of sample and best-of-n: draw from the k likeliest tokens only; 0 is all."""
    top_p: float = 1.0
    """Of sample and best-of-n: draw from the fewest tokens that together have at least this probability."""
    n: int = 8
    """Draws of best-of-n."""
    rank_by: Literal["likelihood", "reward", "judge"] = "likelihood"
    """What best-of-n keeps: the largest log-probability, implicit return, or true return. The implicit return is
    large also where policy and reference both find a draw odd: the more draws, the odder the best by it."""
    max_new_tokens: int = 64
    """Length limit of the response; one that reaches it is flagged as truncated."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self):
        require(0 < self.n <= 10_000, f"n must be between 1 and 10,000, got {self.n}")
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63, got {self.seed}")
        require(self.max_new_tokens > 0, f"max_new_tokens must be positive, got {self.max_new_tokens}")
        sampler(torch.Generator(), self.temperature, self.top_k, self.top_p)  # which checks them
        require(self.step == "likelihood" or self.search == "mcts", f"--step {self.step} needs --search mcts")
        plain = self.step == "likelihood" or self.proxy_base is None
        require(plain, f"--step {self.step} is not defined for a proxy-tuned mix")


@dataclass(frozen=True)
class Answer:
    """What a search found for one prompt."""

    prompt: str
    text: str
    best: Decoded  # token ids, and log pi of each under what was searched
    others: list[Decoded]  # further responses of beams, best first
    scored: Scored | None  # its token rewards; None for a run without a reference
    judgement: Judgement | None  # the oracle's word, where the prompt is a post of the TL;DR world
    policy: str  # whose log-probabilities those of `best` are
    found: Found | None  # of mcts
    tree: Tree | None  # of mcts
    model_calls: int
    tokens_forwarded: int
    nodes: int
    seconds: float

    def _repr_html_(self) -> str:
        return self.scored._repr_html_() if self.scored else self.text


def load(policy: Path | str, reference: Path | str | None = None, beta: float | None = None, **how) -> "QFunction":
    """A policy ready to score and to search: a finished run, or with a `reference` any pair of runs or folders.

    As `pair.load_pair`, whose `device`, `dtype` and `chat` it takes too.
    """
    return QFunction(load_pair(policy, reference, beta, **how))


class QFunction:
    """A policy with its reference, its vocabulary and its beta."""

    def __init__(self, run: Run):
        self.run, self.beta, self.tokenizer = run, run.beta, run.tokenizer
        self.device = next(run.model.parameters()).device

    def group(self, prompt: str | list[dict], responses: Sequence[str | list[dict]]) -> Group:
        """Token ids of a prompt and of complete responses to it. UserError if one does not fit the context.

        A prompt may be a conversation, a list of messages, and a response to it the messages that follow.

        A warning says what is odd about the prompt.
        """
        warn_of_prompt(self.run, prompt)
        answers = [self.tokenizer.encode_answer(prompt, response) for response in responses]
        ids, given = zip(*answers, strict=True) if answers else ((), ())
        group = Group(self.tokenizer.encode_prompt(prompt), ids, given if any(given) else ())
        require(bool(group.prompt), "the prompt is empty")
        most = self.run.model.config.block_size
        for response in group.responses:
            length = len(group.prompt) + len(response)
            require(length <= most, f"prompt and response have {length} tokens; the run's context {most}")
        return group

    def score(self, prompt: str | list[dict], responses: str | Sequence[str | list[dict]]) -> list[Scored]:
        """The token rewards of one or more complete responses to a prompt."""
        responses = [responses] if isinstance(responses, str) else list(responses)
        return token_rewards(self.run, [self.group(prompt, responses)], [read_post(prompt)])[0]

    def search(self, prompt: str | list[dict], how: str | SearchConfig = "greedy", **options) -> Answer:
        """The best response that a search finds: how is greedy, sample, best-of-n, beam or mcts, or a SearchConfig.

        Options are the fields of SearchConfig, and of BeamConfig or MCTSConfig: q.search(prompt, "beam", width=5).
        """
        config = how if isinstance(how, SearchConfig) else search_config(how, options)
        ids, post = self.group(prompt, []).prompt, read_post(prompt)
        world = oracle(self.run, [post])
        judge = (lambda draw: world.judge_tokens(post, draw.tokens)) if world else None
        evaluator = self._evaluator(config, world, post)
        started = time.perf_counter()
        responses, found, tree = self._search(config, evaluator, ids, judge)
        seconds = time.perf_counter() - started
        best, *others = responses
        return Answer(
            prompt=prompt,
            text=self.tokenizer.decode(best.tokens),
            best=best,
            others=others,
            scored=token_rewards(self.run, [Group(ids, (best.tokens,))], [post])[0][0] if self.run.reference else None,
            judgement=judge(best) if judge else None,
            policy=self._policy_name(config),
            found=found,
            tree=tree,
            model_calls=evaluator.calls,
            tokens_forwarded=int(evaluator.tokens.sum()),
            nodes=found.nodes if found else evaluator.nodes,
            seconds=seconds,
        )

    def _evaluator(self, config: SearchConfig, world: World | None, post: Post | None) -> Evaluator:
        """What to search over: the policy, its implicit reward, a proxy-tuned mix, or the world's exact table."""
        run = self.run
        if config.step == "guided":
            require(world is not None, f"--step guided {NEEDS_ORACLE}")
            ((_, _, mdp),) = world.tables([post])
            return Table(mdp, solve(mdp, BETA), BETA, self.tokenizer.n_vocab, guided=True)
        policy = Network(run.model, self.beta)
        paired = (config.step != "implicit" and config.proxy_base is None) or run.reference is not None
        require(paired, f"{run.path} is an SFT run: it has no implicit rewards and steers nothing")
        if config.step == "implicit":
            return ImplicitReward(policy, Network(run.reference), self.beta)
        if config.proxy_base:
            base = load_run(Path(config.proxy_base), self.device)
            same = base.tokenizer.fingerprint == self.tokenizer.fingerprint
            require(same, f"{config.proxy_base} and {run.path} have different vocabularies")
            return Proxy(Network(base.model), policy, Network(run.reference), config.proxy_alpha)
        return policy

    def _search(
        self, config: SearchConfig, evaluator: Evaluator, prompt: list[int], judge: Judge | None
    ) -> tuple[list[Decoded], Found | None, Tree | None]:
        """Responses, best first; of mcts also what it says of them, and its tree."""
        what = ([prompt], self.tokenizer.ends, config.max_new_tokens)
        if config.search == "mcts":
            (found,), tree = mcts(evaluator, *what, config.mcts)
            return [found.response], found, tree
        if config.search == "beam":
            return beam_search(evaluator, *what, config.beam)[0], None, None
        if config.search == "greedy":
            return decode(evaluator, *what, greedy)[0], None, None
        generator = torch.Generator(self.device).manual_seed(config.seed)
        choose: Choose = sampler(generator, config.temperature, config.top_k, config.top_p)
        if config.search == "sample":
            return decode(evaluator, *what, choose)[0], None, None
        return best_of_n(evaluator, *what, choose, config.n, self._rank(config, prompt, judge)), None, None

    def _rank(self, config: SearchConfig, prompt: list[int], judge: Judge | None) -> Callable[[int, Decoded], float]:
        if config.rank_by == "likelihood":
            return lambda _, draw: draw.score
        if config.rank_by == "reward":
            return lambda _, draw: token_rewards(self.run, [Group(prompt, (draw.tokens,))], [None])[0][0].total
        require(judge is not None, f"--rank-by judge {NEEDS_ORACLE}")

        def true_return(_: int, draw: Decoded) -> float:
            total = judge(draw).total
            return -math.inf if math.isnan(total) else total

        return true_return

    def _policy_name(self, config: SearchConfig) -> str:
        """Whose log-probabilities those of the response are."""
        if config.step == "guided":
            return EXACT_POLICY
        mix = f" (pi / pi_ref)^{config.proxy_alpha:g}" if config.proxy_base else ""
        return f"{config.proxy_base or self.run.path}{mix}"


def search_config(how: str, options: dict) -> SearchConfig:
    """The options of one kind of search, by name. UserError for one that is not there."""
    nested = {"beam": BeamConfig, "mcts": MCTSConfig}.get(how)
    inside = {f.name for f in fields(nested)} if nested else set()
    own = {name: options[name] for name in options if name in inside}
    outer = {name: options[name] for name in options if name not in inside}
    known = {f.name for f in fields(SearchConfig)} - {"search", "beam", "mcts"}
    unknown = sorted(outer.keys() - known)
    require(
        not unknown, f"--search {how} has no option {', '.join(unknown)}; it has {', '.join(sorted(inside | known))}"
    )
    kinds = get_args(SearchConfig.__dataclass_fields__["search"].type)
    if how not in kinds:
        raise UserError(f"search must be one of {', '.join(kinds)}, got {how!r}")
    config = SearchConfig(search=how, **outer)
    return replace(config, **{how: nested(**own)}) if own else config
