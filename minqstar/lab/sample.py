"""Ask a trained Q-function for a response, each token coloured by its implicit reward; `sample.py` is this command.

python sample.py --search greedy                       # a held-out post of the TL;DR world
python sample.py --table                               # token by token: r, V*, A* and the learned reward
python sample.py --search beam --beam.width 5          # the likeliest response that five beams find
python sample.py --search mcts --tree tree.html        # tree search, often with a proof, and its tree to look at
python sample.py --search best-of-n --n 16 --json      # one JSON object
python sample.py --run MODEL --ref BASE --chat --prompt "Hello."    # any pair of Hugging Face folders
echo "some prompt" | python sample.py --run runs/mine/dpo --prompt-file -
"""

import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.table import Table
from rich.text import Text

from minqstar.ask import EXACT_POLICY, Answer, QFunction, SearchConfig
from minqstar.console import Console
from minqstar.errors import require
from minqstar.files import check_output, replace_file
from minqstar.lab.treeview import tree_page
from minqstar.pair import PairOptions
from minqstar.show import coloured, legend, prompt_text, token_table
from minqstar.text import clean, read_prompt
from minqstar.training.checkpoint import Run, held_out_rows


@dataclass(frozen=True)
class Options(PairOptions, SearchConfig):
    """Decode a response and show what each of its tokens is worth."""

    run: Path = Path("runs/dpo")
    """The run folder, of DPO or SFT (an SFT run has no implicit rewards), or a Hugging Face folder."""
    prompt: str | None = None
    """The prompt. Default: one that the run held out."""
    prompt_file: Path | None = None
    """Read the prompt from this file; - is standard input."""
    index: int = 0
    """Which held-out row."""
    data: Path | None = None
    """JSONL of other rows. Default: the run's held_out.jsonl."""
    table: bool = False
    """Print the response token by token; on a post of the TL;DR world with r, V*, A* beside the learned reward."""
    tree: Path | None = None
    """Of mcts: draw the search tree into this HTML file."""
    json: bool = False
    """Print one JSON object instead of coloured text."""

    def __post_init__(self):
        super().__post_init__()
        require(self.index >= 0, f"index must not be negative, got {self.index}")


NEEDS = (
    ("beam", "--search beam"),
    ("mcts step tree", "--search mcts"),
    ("temperature top-k top-p", "--search sample best-of-n"),
    ("n rank-by", "--search best-of-n"),
    ("proxy-alpha", "--proxy-base"),
    ("prompt-file index data", "no --prompt"),
    ("index data", "no --prompt-file"),
    ("table", "no --json"),
)


def prompt_of(options: Options, run_: Run) -> str | list[dict]:
    """The prompt from wherever the options say: typed, in a file, piped, or of a row that the run held out."""
    if options.prompt is not None:
        return clean(options.prompt)
    if options.prompt_file is not None:
        return read_prompt(options.prompt_file)
    rows = list(islice(held_out_rows(run_, options.data, "--prompt, --prompt-file or --data"), options.index + 1))
    last, past = len(rows) - 1, f"--index {options.index} is past it"
    require(options.index <= last, f"{options.data or options.run / 'held_out.jsonl'} ends with row {last}; {past}")
    require("prompt" in rows[options.index], "that row is a plain text, without a prompt; give one with --prompt")
    return rows[options.index]["prompt"]


def as_json(q: QFunction, search: str, answer: Answer) -> dict:
    """All that is known of a response; rewards in reward units, log-probabilities in nats."""
    best, scored, judgement, found = answer.best, answer.scored, answer.judgement, answer.found
    rewards = scored and scored.rewards.tolist()
    on_grammar = judgement is not None and not math.isnan(judgement.total)
    exact = scored and scored.exact
    return {
        "prompt": answer.prompt,
        "text": answer.text,
        "tokens": q.tokenizer.texts_of(best.tokens),
        "token_ids": best.tokens,
        "rewards": rewards,
        "implicit_return": rewards and sum(rewards),
        "exact": exact and {name: getattr(exact, name).tolist() for name in ("reward", "value", "Q", "advantage")},
        "logps": best.logps,
        "logp": best.score,
        "policy": answer.policy,
        "truncated": best.truncated,
        "others": [{"text": q.tokenizer.decode(other.tokens), "logp": other.score} for other in answer.others],
        "judge": judgement
        and {
            "return": judgement.total if on_grammar else None,
            "on_grammar": on_grammar,
            "right": judgement.right,
            "wrong": judgement.wrong,
        },
        "search": search,
        "model_calls": answer.model_calls,
        "tokens_forwarded": answer.tokens_forwarded,
        "nodes": answer.nodes,
        "seconds": answer.seconds,
        "mcts": found and {name: getattr(found, name) for name in ("value", "proved", "completed", "simulations")},
        "run": str(q.run.path),
    }


def show(options: Options, q: QFunction, answer: Answer, console: Console):
    """The response, each token on blue (paid) or orange (charged) as deep as its reward; then what is known of it."""
    console.print(Text(prompt_text(q.tokenizer, {"prompt": answer.prompt}), style="dim"))
    figures = Table.grid(padding=(0, 2))
    colour, scored = console.color_system is not None, answer.scored
    if scored is None:
        console.print(Text(answer.text))
    else:
        rewards = scored.rewards.tolist()
        console.print(coloured(scored.spans, scored.rewards, colour))
        console.print(legend(colour))
        if options.table:
            console.print(token_table(scored.tokens, scored.rewards, scored.exact, colour))
        figures.add_row("implicit return", f"{sum(rewards):+.3f}, the sum of the token rewards")
    cut = ", cut off" * answer.best.truncated
    figures.add_row("log-probability", f"{answer.best.score:.3f} nats, {answer.policy}{cut}")
    if judge := answer.judgement:
        off = math.isnan(judge.total)
        total = "none: the text leaves the grammar" if off else f"{judge.total:+.1f}"
        right, wrong = (", ".join(facts) or "-" for facts in (judge.right, judge.wrong))
        figures.add_row("judge's return", f"{total}  (right: {right}; wrong: {wrong})")
    calls = "lookups" if answer.policy == EXACT_POLICY else "model calls"
    work = f"{answer.model_calls} {calls}, {answer.tokens_forwarded:,} tokens, {answer.seconds:.2f} s"
    figures.add_row("search", f"{options.search}: {work}")
    if of := answer.found:
        completed = "; no response had ended, so the greedy one was completed" * of.completed
        verdict = "proved: no response is better" if of.proved else "not proved to be the best"
        figures.add_row("", f"{of.simulations} simulations, {of.nodes} nodes; {verdict}{completed}")
    for other in answer.others:
        figures.add_row(f"{other.score:.3f} nats", Text(q.tokenizer.decode(other.tokens).strip(), style="dim"))
    console.print(figures)


def main(options: Options):
    if options.tree:
        check_output(options.tree, ".html", options.data, options.prompt_file)
    q = QFunction(options.open(options.run))
    prompt = prompt_of(options, q.run)
    if options.table:
        require(
            q.run.reference is not None, f"{options.run} has no reference of its own: give one with --ref for --table"
        )
    answer = q.search(prompt, options)
    if options.tree:
        page = tree_page(answer.tree, 0, q.tokenizer, prompt_text(q.tokenizer, {"prompt": prompt}), answer.found)
        replace_file(options.tree, lambda new: new.write_text(page, encoding="utf-8"))
    if options.json:
        print(json.dumps(as_json(q, options.search, answer), allow_nan=False))
    else:
        show(options, q, answer, Console())
