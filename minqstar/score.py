"""A policy and its reference as a Q-function: `load` a run, `score` texts, `search` for responses.

    import minqstar
    q = minqstar.load("runs/dpo")
    scored = q.score(prompt, " A summary.")[0]          # rewards, logps, ref_logps: one number a token
    answer = q.search(prompt, "beam", width=5)           # the likeliest response that five beams find

A token's *implicit reward* is beta log(pi/pi_ref) (Eq. 10, 11): what the token adds to, or takes from, the return that
its prefix promised.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from io import StringIO
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from minqstar.console import Console
from minqstar.errors import UserError, require
from minqstar.evaluate import oracle, warn_of_prompt
from minqstar.lm.tokenizer import Span
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import Choose, Decoded, best_of_n, decode, greedy, sampler
from minqstar.search.evaluator import Evaluator, ImplicitReward, Network, Proxy, Table
from minqstar.search.mcts import Found, MCTSConfig, mcts
from minqstar.search.tree import Tree
from minqstar.show import html_tokens, summed, token_table
from minqstar.theory.mdp import solve
from minqstar.theory.qfunction import implicit_reward
from minqstar.training.checkpoint import Run, load_run
from minqstar.training.data import Group
from minqstar.training.scoring import score_groups
from minqstar.world.posts import Post, read_post
from minqstar.world.tldr import BETA, Exact, Judgement, World

EXACT_POLICY = "the world's exact policy"
NEEDS_ORACLE = "needs a post of the TL;DR world as the prompt, and a run that learned it"
Judge = Callable[[Decoded], Judgement]


@dataclass(frozen=True)
class Scored:
    """One response of L tokens, EOS included, token by token."""

    ids: list[int]
    tokens: list[str]
    spans: list[Span]  # the tokens that make whole characters together; most stand alone
    rewards: Tensor  # (L,) beta log(pi/pi_ref), reward units
    logps: Tensor  # (L,) log pi, nats
    ref_logps: Tensor  # (L,) log pi_ref, nats
    exact: Exact | None  # of a post of the TL;DR world, if the response stays in its grammar

    @property
    def titles(self) -> list[str]:
        """Each span's figures in words; those of several tokens are sums."""
        named = {"reward": self.rewards, "log pi": self.logps, "log pi_ref": self.ref_logps}
        named |= {"exact A*": self.exact.advantage} if self.exact else {}
        columns = [[f"{name} {value:+.3f}" for value in summed(self.spans, of)] for name, of in named.items()]
        lines = zip(self.spans, zip(*columns, strict=True), strict=True)
        return [f"{span.text!r}: {', '.join(figures)}" for span, figures in lines]

    def __str__(self) -> str:
        """The token table: what Eq. 10 says of each token."""
        console = Console(file=StringIO(), width=80, color_system=None)
        console.print(token_table(self.tokens, self.rewards, self.exact, colour=False))
        return console.file.getvalue()

    def _repr_html_(self) -> str:
        """The response in a notebook: blue is paid, orange is charged."""
        line = "".join(html_tokens(self.spans, self.rewards, self.titles))
        return f'<div style="font-family:monospace;white-space:pre-wrap;line-height:2">{line}</div>'


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


def load(run: Path | str, device: str = "auto") -> "QFunction":
    """A finished run, of SFT or DPO, ready to score and to search. UserError if it is none, or is damaged."""
    available = torch.cuda.is_available()
    require(device != "cuda" or available, "no CUDA device is available; use --device cpu")
    return QFunction(load_run(Path(run), torch.device("cuda" if available and device != "cpu" else "cpu")))


class QFunction:
    """A policy with its reference, its vocabulary and its beta."""

    def __init__(self, run: Run):
        self.run, self.beta, self.tokenizer = run, run.beta, run.tokenizer
        self.device = next(run.model.parameters()).device

    def group(self, prompt: str, responses: Sequence[str]) -> Group:
        """Token ids of a prompt and of complete responses to it. UserError if one does not fit the context.

        A warning says what is odd about the prompt.
        """
        warn_of_prompt(self.run, prompt)
        group = Group(self.tokenizer.encode(prompt), tuple(map(self.tokenizer.encode_response, responses)))
        require(bool(group.prompt), "the prompt is empty")
        most = self.run.model.config.block_size
        for response in group.responses:
            length = len(group.prompt) + len(response)
            require(length <= most, f"prompt and response have {length} tokens; the run's context {most}")
        return group

    def score(self, prompt: str, responses: str | Sequence[str]) -> list[Scored]:
        """The token rewards of one or more complete responses to a prompt."""
        responses = [responses] if isinstance(responses, str) else list(responses)
        return self.score_groups([self.group(prompt, responses)], [read_post(prompt)])[0]

    def score_groups(self, groups: list[Group], posts: Sequence[Post | None], progress=None) -> list[list[Scored]]:
        """For each group its responses' token rewards; exact ones too where the `oracle` knows its post."""
        models = (self.run.model, self.run.reference)
        require(self.run.reference is not None, f"{self.run.path} is an SFT run: it has no implicit rewards")
        policy, reference = (score_groups(model, groups, self.tokenizer.pad, progress) for model in models)
        exact, world = {}, oracle(self.run, [post for post in posts if post])
        if world:
            places = [(i, j) for i, post in enumerate(posts) if post for j in range(len(groups[i].responses))]
            each = [posts[i] for i, _ in places], [groups[i].responses[j] for i, j in places]
            exact = dict(zip(places, world.exact_all(*each, self.beta), strict=True))
        answers = []
        for i, (group, *both) in enumerate(zip(groups, policy, reference, strict=True)):
            line = []
            for j, (ids, logps, ref_logps) in enumerate(zip(group.responses, *both, strict=True)):
                texts, spans = self.tokenizer.texts_of(ids), self.tokenizer.spans(ids)
                rewards = implicit_reward(logps, ref_logps, self.beta)
                line.append(Scored(ids, texts, spans, rewards, logps, ref_logps, exact.get((i, j))))
            answers.append(line)
        return answers

    def search(self, prompt: str, how: str | SearchConfig = "greedy", **options) -> Answer:
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
            scored=self.score_groups([Group(ids, (best.tokens,))], [post])[0][0] if self.run.reference else None,
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
        what = ([prompt], self.tokenizer.eos, config.max_new_tokens)
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
            return lambda _, draw: self.score_groups([Group(prompt, (draw.tokens,))], [None])[0][0].rewards.sum().item()
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
