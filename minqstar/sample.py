"""Ask a trained Q-function: summaries with each token coloured by its implicit reward.

python sample.py --search greedy                       # a held-out post of the TL;DR world
python sample.py --search beam --beam.width 5          # the likeliest response that five beams find
python sample.py --search mcts --tree tree.html        # tree search, often with a proof, and its tree to look at
python sample.py --search best-of-n --n 16 --json      # the same for machines
echo "some prompt" | python sample.py --run runs/mine/dpo --prompt-file -
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minqstar.errors import UserError, is_text, require
from minqstar.evaluate import judged
from minqstar.lab.credit import coloured
from minqstar.lab.treeview import tree_page
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import Decoded, best_of_n, decode, greedy, sampler
from minqstar.search.evaluator import Evaluator, ImplicitReward, Network, Proxy
from minqstar.search.evaluator import Table as ExactTable
from minqstar.search.mcts import Found, MCTSConfig, mcts
from minqstar.search.tree import Tree
from minqstar.theory.mdp import solve
from minqstar.theory.qfunction import implicit_reward
from minqstar.training.checkpoint import Run, load_run
from minqstar.training.data import Group, read_jsonl
from minqstar.training.scoring import score_groups
from minqstar.world.automaton import Post
from minqstar.world.tldr import BETA, Judgement, World, read_post


@dataclass(frozen=True)
class Options:
    """Decode a response and show what each of its tokens is worth."""

    run: Path = Path("runs/dpo")
    """The run folder, of DPO or SFT (an SFT run has no implicit rewards)."""
    search: Literal["greedy", "sample", "best-of-n", "beam", "mcts"] = "greedy"
    """How to look for a response."""
    beam: BeamConfig = field(default_factory=BeamConfig)
    mcts: MCTSConfig = field(default_factory=MCTSConfig)
    step: Literal["likelihood", "implicit", "guided"] = "likelihood"
    """Of mcts: what a token earns. likelihood: beta log pi. implicit: beta log(pi/pi_ref). guided: the TL;DR world's
    true r + beta log pi_ref, its exact V* at the leaves, its exact policy as the prior; the run is not asked."""
    tree: Path | None = None
    """Of mcts: draw the search tree into this HTML file."""
    proxy_base: Path | None = None
    """A run whose model this run steers (proxy tuning): pi_base (pi/pi_ref)^alpha is searched in place of pi."""
    proxy_alpha: float = 1.0
    """How far it is steered; 0 is the base alone."""
    prompt: str | None = None
    """The prompt. Default: one that the run held out."""
    prompt_file: Path | None = None
    """Read the prompt from this file; - is standard input."""
    index: int = 0
    """Which held-out row."""
    data: Path | None = None
    """JSONL of other rows. Default: the run's held_out.jsonl."""
    temperature: float = 1.0
    """Of sample and best-of-n; 1 draws from the policy itself."""
    top_k: int = 0
    """Of sample and best-of-n: draw from the k likeliest tokens only; 0 is all."""
    top_p: float = 1.0
    """Of sample and best-of-n: draw from the fewest tokens that together have at least this probability."""
    n: int = 8
    """Draws of best-of-n."""
    rank_by: Literal["reward", "likelihood", "judge"] = "reward"
    """What best-of-n keeps: the largest implicit return, log-probability, or true return."""
    max_new_tokens: int = 64
    """Length limit of the response; one that reaches it is flagged as truncated."""
    seed: int = 0
    """Seed of the draws."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to search."""
    json: bool = False
    """Print one JSON object instead of coloured text."""

    def __post_init__(self):
        require(0 < self.n <= 10_000, f"n must be between 1 and 10,000, got {self.n}")
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63, got {self.seed}")
        require(self.max_new_tokens > 0, f"max-new-tokens must be positive, got {self.max_new_tokens}")
        require(self.index >= 0, f"index must not be negative, got {self.index}")
        sampler(torch.Generator(), self.temperature, self.top_k, self.top_p)  # which checks them
        require(self.tree is None or self.search == "mcts", "--tree draws what --search mcts has grown")
        require(self.step == "likelihood" or self.search == "mcts", f"--step {self.step} needs --search mcts")
        plain = self.step == "likelihood" or self.proxy_base is None
        require(plain, f"--step {self.step} is not defined for a proxy-tuned mix")


def read_prompt(options: Options) -> str:
    """The prompt from wherever the options say; without a final newline, which a shell or an editor put there."""
    if options.prompt is not None:
        text = options.prompt
    elif options.prompt_file is not None:
        try:
            piped = str(options.prompt_file) == "-"
            raw = sys.stdin.buffer.read() if piped else options.prompt_file.read_bytes()
            text = raw.decode("utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read {options.prompt_file}: {e}") from e
    else:
        file = options.data or options.run / "held_out.jsonl"
        rows = read_jsonl(file)
        last = len(rows) - 1
        require(options.index <= last, f"{file} ends with row {last}; --index {options.index} is past it")
        text = rows[options.index]["prompt"]
    require(is_text(text), "the prompt is not UTF-8 text")
    return text


def token_rewards(run_: Run, prompt: list[int], tokens: list[int]) -> list[float]:
    """beta log(pi/pi_ref) of each response token, reward units."""
    group = [Group(prompt, (tokens,))]
    policy, reference = (score_groups(model, group, run_.tokenizer.pad)[0][0] for model in (run_.model, run_.reference))
    return implicit_reward(policy, reference, run_.beta).tolist()


EXACT = "the world's exact policy"
Judge = Callable[[Decoded], Judgement]


def evaluator_of(
    options: Options, run_: Run, world: World | None, post: Post | None, device: torch.device
) -> Evaluator:
    """What to search over: the run's policy, its implicit reward, a proxy-tuned mix, or the world's exact tables."""
    if options.step == "guided":
        require(post is not None, "--step guided needs a post of the TL;DR world as the prompt")
        ((_, _, mdp),) = world.tables([post])
        return ExactTable(mdp, solve(mdp, BETA), BETA, run_.tokenizer.n_vocab, guided=True)
    policy = Network(run_.model, run_.beta)
    if options.step == "implicit" or options.proxy_base:
        require(run_.reference is not None, f"{run_.path} is an SFT run: it has no implicit rewards and steers nothing")
    if options.step == "implicit":
        return ImplicitReward(policy, Network(run_.reference), run_.beta)
    if options.proxy_base:
        base = load_run(options.proxy_base, device)
        same = base.tokenizer.fingerprint == run_.tokenizer.fingerprint
        require(same, f"{options.proxy_base} and {run_.path} have different vocabularies")
        return Proxy(Network(base.model), policy, Network(run_.reference), options.proxy_alpha)
    return policy


def search(
    options: Options, run_: Run, evaluator: Evaluator, prompt: list[int], device: torch.device, judge: Judge | None
) -> tuple[list[Decoded], Found | None, Tree | None]:
    """Responses, best first, found as the options say; of mcts also what it says of them, and its tree.

    `judge` is the world's oracle, where the prompt is one of its posts.
    """
    what = ([prompt], run_.tokenizer.eos, options.max_new_tokens)
    if options.search == "mcts":
        (found,), tree = mcts(evaluator, *what, options.mcts)
        return [found.response], found, tree
    if options.search == "beam":
        return beam_search(evaluator, *what, options.beam)[0], None, None
    choose = greedy
    if options.search != "greedy":
        generator = torch.Generator(device).manual_seed(options.seed)
        choose = sampler(generator, options.temperature, options.top_k, options.top_p)
    if options.search != "best-of-n":
        return decode(evaluator, *what, choose)[0], None, None
    if options.rank_by == "judge":
        require(judge is not None, "--rank-by judge needs a post of the TL;DR world as the prompt")
    if options.rank_by == "reward":
        require(
            run_.reference is not None,
            f"{run_.path} is an SFT run without implicit rewards; --rank-by likelihood",
        )

    def true_return(_: int, draw: Decoded) -> float:
        total = judge(draw).total
        return -math.inf if math.isnan(total) else total

    rank = {
        "reward": lambda _, draw: sum(token_rewards(run_, prompt, draw.tokens)),
        "likelihood": lambda _, draw: draw.score,
        "judge": true_return,
    }[options.rank_by]
    return best_of_n(evaluator, *what, choose, options.n, rank), None, None


def policy_name(options: Options) -> str:
    """Whose log-probabilities those of the response are."""
    if options.step == "guided":
        return EXACT
    mix = f" (pi / pi_ref)^{options.proxy_alpha:g}" if options.proxy_base else ""
    return f"{options.proxy_base or options.run}{mix}"


def answer(options: Options, run_: Run, text: str, device: torch.device) -> dict:
    """All that is known of one response; rewards in reward units, log-probabilities in nats."""
    tokenizer = run_.tokenizer
    prompt = tokenizer.encode(text)
    post = read_post(text)
    world = World(tokenizer) if post else None
    judge = partial(judged, world, post) if post else None
    evaluator = evaluator_of(options, run_, world, post, device)
    started = time.perf_counter()
    responses, found, tree = search(options, run_, evaluator, prompt, device, judge)
    seconds = time.perf_counter() - started
    if options.tree:
        options.tree.write_text(tree_page(tree, 0, tokenizer, text, found), encoding="utf-8")
    best, *others = responses
    rewards = token_rewards(run_, prompt, best.tokens) if run_.reference else None
    judgement = judge(best) if judge else None
    on_grammar = judgement is not None and not math.isnan(judgement.total)
    return {
        "prompt": text,
        "text": tokenizer.decode(best.tokens),
        "tokens": [tokenizer.text_of(token) for token in best.tokens],
        "token_ids": best.tokens,
        "rewards": rewards,
        "implicit_return": rewards and sum(rewards),
        "logps": best.logps,
        "logp": best.score,
        "policy": policy_name(options),
        "truncated": best.truncated,
        "others": [{"text": tokenizer.decode(other.tokens), "logp": other.score} for other in others],
        "judge": judgement
        and {
            "return": judgement.total if on_grammar else None,
            "on_grammar": on_grammar,
            "right": judgement.right,
            "wrong": judgement.wrong,
        },
        "search": options.search,
        "model_calls": evaluator.calls,
        "tokens_forwarded": int(evaluator.tokens.sum()),
        "nodes": found.nodes if found else evaluator.nodes,
        "seconds": seconds,
        "mcts": found and {name: getattr(found, name) for name in ("value", "proved", "completed", "simulations")},
        "run": str(run_.path),
    }


def show(found: dict, console: Console):
    """The response; where there are rewards, each token on blue (paid) or orange (charged) as deep as its own."""
    console.print(Text(found["prompt"], style="dim"))
    figures = Table.grid(padding=(0, 2))
    if found["rewards"] is None:
        console.print(Text(found["text"]))
    else:
        console.print(coloured(found["tokens"], found["rewards"]))
        console.print(Text("blue: paid, orange: charged (reward units)", style="dim"))
        dear = sorted(zip(found["rewards"], found["tokens"], strict=True), key=lambda pair: -abs(pair[0]))[:5]
        words = "  ".join(f"{token.strip() or repr(token)} {reward:+.2f}" for reward, token in dear)
        figures.add_row("largest rewards", words)
        figures.add_row("implicit return", f"{found['implicit_return']:+.3f}")
    figures.add_row("log-probability", f"{found['logp']:.3f} nats, {found['policy']}{', cut off' * found['truncated']}")
    if judge := found["judge"]:
        total = f"{judge['return']:+.1f}" if judge["on_grammar"] else "none: the text leaves the grammar"
        right, wrong = (", ".join(judge[key]) or "-" for key in ("right", "wrong"))
        figures.add_row("judge's return", f"{total}  (right: {right}; wrong: {wrong})")
    calls = "lookups" if found["policy"] == EXACT else "model calls"
    work = f"{found['model_calls']} {calls}, {found['tokens_forwarded']:,} tokens, {found['seconds']:.2f} s"
    figures.add_row("search", f"{found['search']}: {work}")
    if of := found["mcts"]:
        completed = "; no response had ended, so the greedy one was completed" * of["completed"]
        verdict = "proved: no response is better" if of["proved"] else "not proved to be the best"
        figures.add_row("", f"{of['simulations']} simulations, {found['nodes']} nodes; {verdict}{completed}")
    for other in found["others"]:
        figures.add_row(f"{other['logp']:.3f} nats", Text(other["text"].strip(), style="dim"))
    console.print(figures)


def main(options: Options):
    available = torch.cuda.is_available()
    require(options.device != "cuda" or available, "no CUDA device is available; use --device cpu")
    device = torch.device("cuda" if available and options.device != "cpu" else "cpu")
    found = answer(options, load_run(options.run, device), read_prompt(options), device)
    if options.json:
        print(json.dumps(found, allow_nan=False))
    else:
        show(found, Console(highlight=False, markup=False))
