"""Token rewards of given texts under any pair of models: beta log(pi/pi_ref), token by token (Eq. 10, 11).

    python -m minqstar.score --policy runs/dpo data/tldr/validation.jsonl
    python -m minqstar.score --policy A --ref B rows.jsonl --out scored.jsonl --html scored.html

A and B are finished runs or Hugging Face folders with one vocabulary. Rows hold prompt, chosen and rejected, or prompt
and completion. B's log-probs are kept on disk and used again for the same tokens and weights.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from itertools import combinations, islice
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.table import Table
from rich.text import Text
from torch import Tensor

from minqstar.cli import run
from minqstar.console import Console, progress
from minqstar.errors import require
from minqstar.evaluate import oracle
from minqstar.files import check_output, in_words, replace_file
from minqstar.lm.tokenizer import Span
from minqstar.page import html_page
from minqstar.pair import PairOptions
from minqstar.show import SCALE, coloured, html_tokens, legend, prompt_text, several_lines, summed, token_table
from minqstar.theory.qfunction import implicit_reward
from minqstar.training.checkpoint import Run, load_tensors, save_tensors
from minqstar.training.data import reasons_of, tokenize
from minqstar.training.formats import RANKED, Rows, answers_of
from minqstar.training.groups import Group
from minqstar.training.scoring import score_groups, tensors_hash, weights_hash
from minqstar.world.posts import Post
from minqstar.world.tldr import Exact

ROWS_AT_ONCE = 256
SHOWN = 100  # rows of a page
Logps = list[list[Tensor]]  # of each group and response, a number a token


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
    def total(self) -> float:
        """The implicit return: the sum of the rewards."""
        return self.rewards.double().sum().item()

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


def token_rewards(
    run_: Run, groups: Sequence[Group], posts: Sequence[Post | None], progress=None, reference: Logps | None = None
) -> list[list[Scored]]:
    """For each group its responses' token rewards; exact ones too where the `oracle` knows its post.

    Without `reference` the reference's log-probs are computed.
    """
    require(run_.reference is not None, f"{run_.path} is a policy without its reference: it has no implicit rewards")
    most = max((i for group in groups for ids in group.responses for i in ids), default=0)
    fits = most < run_.reference.config.vocab_size
    require(fits, f"the reference has no token {most}, an id of the policy that stands for no text: it has no reward")
    policy = score_groups(run_.model, groups, run_.tokenizer.pad, progress)
    reference = reference or score_groups(run_.reference, groups, run_.tokenizer.pad, progress)
    exact, world = {}, oracle(run_, [post for post in posts if post])
    if world:
        places = [(i, j) for i, post in enumerate(posts) if post for j in range(len(groups[i].responses))]
        each = [posts[i] for i, _ in places], [groups[i].responses[j] for i, j in places]
        exact = dict(zip(places, world.exact_all(*each, run_.beta), strict=True))
    answers = []
    for i, (group, *both) in enumerate(zip(groups, policy, reference, strict=True)):
        line = []
        for j, (ids, of_policy, of_reference) in enumerate(zip(group.responses, *both, strict=True)):
            texts, spans = run_.tokenizer.texts_of(ids), run_.tokenizer.spans(ids)
            rewards = implicit_reward(of_policy, of_reference, run_.beta)
            line.append(Scored(ids, texts, spans, rewards, of_policy, of_reference, exact.get((i, j))))
        answers.append(line)
    return answers


def kept_logps(folder: Path, key: str, run_: Run, groups: Sequence[Group]) -> Logps:
    """The reference's log-probs of some groups: from a file of an earlier call, or computed and kept in one.

    `key` tells the reference's weights; the file's name depends on it, on the architecture and on every token.
    """
    key = hashlib.sha256(f"{key} {run_.reference.config} {list(groups)}".encode()).hexdigest()
    file, sizes = folder / f"{key}.safetensors", [len(ids) for group in groups for ids in group.responses]
    if file.is_file():
        tensors, values = load_tensors(file)
        whole = values == {"hash": tensors_hash(tensors)} and tensors["logps"].shape == (sum(sizes),)
        require(whole, f"{file} is damaged; remove it")
        pieces = iter(tensors["logps"].split(sizes))
        return [[next(pieces) for _ in group.responses] for group in groups]
    logps = score_groups(run_.reference, groups, run_.tokenizer.pad)
    with in_words(f"cannot keep log-probs in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    tensors = {"logps": torch.cat([line for group in logps for line in group])}
    save_tensors(tensors, file, {"hash": tensors_hash(tensors)})
    return logps


def scored_rows(
    run_: Run, rows: Iterable[dict], cache: Path, skipped: Counter[str]
) -> Iterator[tuple[dict, list[Scored]]]:
    """Each row with its responses' token rewards, in order; none for a row that is skipped, which `skipped` counts."""
    rows, key, limit = iter(rows), weights_hash(run_.reference), run_.model.config.block_size
    while some := list(islice(rows, ROWS_AT_ONCE)):
        groups, why = tokenize(some, run_.tokenizer, limit)
        skipped.update(why)
        kept = kept_logps(cache, key, run_, groups) if groups else []
        lines = token_rewards(run_, groups, [None] * len(groups), reference=kept) if groups else []
        left = [iter(line) for line in lines]
        for row, group in zip(some, groups.of_row, strict=True):
            yield row, [next(left[group]) for _ in answers_of(row)] if group >= 0 else []


def as_json(row: dict, line: list[Scored]) -> dict:
    """The row with `scored`: of each response tokens, their rewards and log-probs, and sums; of a pair the margin."""
    scored = {}
    for name, one in zip(answers_of(row), line, strict=bool(line)):
        values = {name: getattr(one, name).tolist() for name in ("rewards", "logps", "ref_logps")}
        sums = {"reward": one.total, "logp": one.logps.sum().item(), "ref_logp": one.ref_logps.sum().item()}
        scored[name] = {"tokens": one.tokens, "ids": one.ids, **values, **sums, "eos_reward": one.rewards[-1].item()}
    if RANKED in row:
        scored = {RANKED: list(scored.values())} if scored else {}
    elif len(line) == 2:
        scored["margin"] = line[0].total - line[1].total
    return {**row, "scored": scored or None}


def closing(lines: list[list[tuple[tuple[float, float], ...]]]) -> dict[str, float]:
    """Means over rows of returns and of the rewards of EOS; of preferences the accuracy and margin, with their errors.

    A line is a row's pairs, or its answer alone: of each answer the return and the reward of EOS. What is said of a
    ranking is the mean over its pairs.
    """
    rows = [torch.tensor(line, dtype=torch.float64) for line in lines]  # (pairs, answers, 2)
    mean = torch.stack([pairs.mean(0) for pairs in rows]).mean(0).T.flatten().tolist()
    if len(mean) == 2:
        return {"reward": mean[0], "eos_reward": mean[1]}
    margins = [pairs[:, 0, 0] - pairs[:, 1, 0] for pairs in rows]
    right = [(margin > 0).double() + 0.5 * (margin == 0) for margin in margins]
    figures = {}
    for name, of in (("pair_accuracy", right), ("reward_margin", margins)):
        by_row = torch.stack([values.mean() for values in of])
        figures |= {name: by_row.mean().item(), f"{name}_se": by_row.std(correction=0).item() / len(rows) ** 0.5}
    names = ("chosen_reward", "rejected_reward", "chosen_eos_reward", "rejected_eos_reward")
    return figures | dict(zip(names, mean, strict=True))


def row_html(number: int, row: dict, line: list[Scored], prompt: str) -> str:
    """A row of the page: the prompt, which is not scored, then each response on the colours of its rewards."""
    parts = [f"<h2>Row {number}</h2>", f'<p class="post" dir="auto">{escape(several_lines(prompt))}</p>']
    for name, one in zip(answers_of(row), line, strict=True):
        spans = "".join(html_tokens(one.spans, one.rewards, one.titles))
        parts.append(f'<p class="of">{name}: {one.total:+.3f}</p><p class="line" dir="auto">{spans}</p>')
    return "\n".join(parts)


def show_row(row: dict, line: list[Scored], prompt: str, console: Console):
    """A row as it was scored: the prompt dim, for it is not scored, and each token that is."""
    colour = console.color_system is not None
    console.print(Text(several_lines(prompt), style="dim"))
    console.print(legend(colour))
    for name, one in zip(answers_of(row), line, strict=True):
        console.print(Text.assemble((f"{name} {one.total:+.3f}: ", "bold"), coloured(one.spans, one.rewards, colour)))


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    """Score the responses of a file, token by token."""

    data: Annotated[Path, tyro.conf.Positional]
    """Preference pairs or answers: JSON, JSONL or parquet, in any of the usual formats."""
    policy: Path
    """A DPO run; or, with --ref, any run or Hugging Face folder."""
    out: Path | None = None
    """Write the rows, each with its token rewards, into this JSONL file."""
    html: Path | None = None
    """Write a page of the first rows."""
    cache: Path = Path("data/ref_logps")
    """Folder in which the reference's log-probs are kept."""
    json: bool = False
    """Print the closing figures as one JSON object instead."""

    def __post_init__(self):
        require(self.out is None or self.out != self.html, f"out and html are both {self.out}; give two files")


def main(options: Options):
    for path, kind in ((options.out, ".jsonl"), (options.html, ".html")):
        if path:
            check_output(path, kind, options.data)
    rows = list(Rows(options.data))
    run_ = options.open_both(options.policy)
    console, skipped = Console(quiet=options.json), Counter()
    lines, parts, written = [], [], []
    with progress(f"scoring {len(rows)} rows", len(rows)) as advance:
        for number, (row, line) in enumerate(scored_rows(run_, rows, options.cache, skipped), 1):
            if line and not lines:
                show_row(row, line, prompt_text(run_.tokenizer, row), console)
            if line:  # of a ranking all of its pairs
                answers = ((one.total, one.rewards[-1].item()) for one in line)
                lines.append(list(combinations(answers, min(2, len(line)))))
            if line and options.html and len(parts) < SHOWN:
                parts.append(row_html(number, row, line, prompt_text(run_.tokenizer, row)))
            if options.out:
                written.append(json.dumps(as_json(row, line), allow_nan=False) + "\n")
            advance()
    require(bool(lines), f"{options.data}: every row was skipped: {reasons_of(skipped)}")
    if options.out:
        replace_file(options.out, lambda new: new.write_text("".join(written), encoding="utf-8"))
    if options.html:
        words = f"The first {len(parts)} of {len(rows)} rows under {run_.path}, against its reference."
        unit = "reward units: blue is paid, orange is charged"
        page = html_page("Which tokens were paid for", words, SCALE, unit, "\n".join(parts))
        replace_file(options.html, lambda new: new.write_text(page, encoding="utf-8"))
    figures = {"rows": len(rows), "skipped": skipped.total(), "beta": run_.beta, **closing(lines)}
    if options.json:
        print(json.dumps(figures, allow_nan=False))
        return
    table = Table("figure", "", box=None)
    for name, value in figures.items():
        if not name.endswith("_se"):
            error = f" ± {figures[f'{name}_se']:.4f}" if f"{name}_se" in figures else ""
            table.add_row(name, f"{value:.4f}{error}" if isinstance(value, float) else str(value))
    console.print(table)
    if skipped:
        console.print(f"skipped {skipped.total()} of {len(rows)} rows: {reasons_of(skipped)}")


if __name__ == "__main__":
    run(main, Options, "python -m minqstar.score")
