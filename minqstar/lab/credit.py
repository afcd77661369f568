"""Credit assignment: which tokens of a summary DPO pays for, beside the exact A* where the world knows it (Fig. 1).

    python -m minqstar.lab.credit                                # a held-out post; its summary, with one and two errors
    python -m minqstar.lab.credit --prompt "…" --response "…"    # anything else
    python -m minqstar.lab.credit --policy A --ref B --prompt "…" --response "…"    # of any pair of models
    python -m minqstar.lab.credit --html credit.html --png credit.png

A token's implicit reward is beta log(pi/pi_ref) (Eq. 10, 11), an advantage: what the token adds to or takes from the
return that its prefix promised. A wrong fact is charged at its *decisive* token, the first at which the right value
is out of reach.
"""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from minqstar.ask import QFunction
from minqstar.cli import run
from minqstar.console import Console, progress
from minqstar.errors import needs, require
from minqstar.evaluate import oracle
from minqstar.files import check_output, replace_file
from minqstar.lab.findings.credit import (
    decisive_figures,
    example,
    named,
    picture,
    plain,
    scored_edits,
    stitching_figures,
)
from minqstar.lab.findings.drawing import save
from minqstar.page import html_page, html_table
from minqstar.pair import PairOptions
from minqstar.score import Scored
from minqstar.show import SCALE, coloured, html_tokens, legend, summed, token_table
from minqstar.text import clean
from minqstar.training.checkpoint import Run, held_out
from minqstar.world.posts import post_of, read_post
from minqstar.world.tldr import World


def said(credit: Scored) -> str:
    """The sums of a response; the exact ones stand below its table, too."""
    exact = token_table(credit.tokens, credit.rewards, credit.exact).caption
    return f"sum of learned rewards {credit.rewards.sum():+.2f}" + (f"; {exact}" if exact else "")


def page(prompt: str, versions: dict[str, Scored], wrong: dict[str, set[int]]) -> str:
    """One self-contained HTML page; `wrong` holds by name the tokens to underline."""
    words = "The colour behind a token is its learned reward, beta log(pi/pi_ref)."
    if any(credit.exact for credit in versions.values()):
        words += " The strip below it is the exact A*. Wrong facts are underlined."
    charged, parts = [], [f"<p>{words}</p>"]
    for name, credit in versions.items():
        exact, spans = credit.exact and credit.exact.advantage, credit.spans
        line = "".join(html_tokens(spans, credit.rewards, credit.titles, exact, wrong[name]))
        parts.append(f'<h2>{escape(name)}</h2>\n<p class="line strips" dir="auto">{line}</p>\n<p>{said(credit)}</p>')
        table = html_table(token_table(credit.tokens, credit.rewards, credit.exact, colour=False))
        parts.append(f"<details><summary>Token by token</summary>{table}</details>")
        charged += zip(summed(spans, credit.rewards), spans, [exact] * len(spans), strict=True)
    value, span, exact = min(charged, key=lambda of: of[0])
    title = f"DPO charges “{span.text.strip()}” most: {value:+.2f}" if value < 0 else "DPO charges no token here"
    title += f" (exactly {summed([span], exact)[0]:+.2f})" if value < 0 and exact is not None else ""
    return html_page(title, prompt, SCALE, "reward units: blue is paid, orange is charged", "\n".join(parts))


def show(prompt: str, versions: dict[str, Scored], wrong: dict[str, set[int]], console: Console, table: bool):
    colour = console.color_system is not None
    console.print(Text(prompt, style="dim"))
    console.print(legend(colour))
    for name, credit in versions.items():
        console.print(Text(f"\n{name}", style="bold"))
        lines = Table.grid(Column(), Column(overflow="fold"), padding=(0, 1))
        for kind, values in (("learned", credit.rewards), ("exact A*", credit.exact and credit.exact.advantage)):
            if values is not None:
                lines.add_row(Text(kind, style="dim"), coloured(credit.spans, values, colour, wrong[name]))
        console.print(lines)
        console.print(Text(said(credit), style="dim"))
        if table:
            console.print(token_table(credit.tokens, credit.rewards, credit.exact, colour))


@dataclass(frozen=True)
class Options(PairOptions):
    """Show which tokens of a response DPO paid for."""

    run: Path | None = None
    """A DPO run. Default: runs/dpo."""
    policy: Path | None = None
    """In place of a run: any run or Hugging Face folder, with --ref."""
    prompt: str | None = None
    """With --response: what to show. Default: a held-out post, its summary with no, one and two wrong facts."""
    response: str | None = None
    """The response to the prompt."""
    html: Path | None = None
    """Write a self-contained page, too."""
    png: Path | None = None
    """Write a picture, too; needs matplotlib (the extra `figures`)."""
    table: bool = False
    """Print each response token by token, too; on a post of the TL;DR world with r, V* and A*."""
    json: bool = False
    """Print one JSON object instead: every token's figures, and those over the run's held-out pairs."""

    def __post_init__(self):
        require((self.prompt is None) == (self.response is None), "--prompt and --response go together")
        require(self.png is None or self.png.suffix == ".png", f"--png writes a .png file, not {self.png}")


def figures_of(run_: Run, rows: list[dict]) -> dict:
    """How well rewards match A* over all rows, if they are pairs of the world; with a progress bar."""
    world = oracle(run_, [post_of(row) for row in rows])
    if world is None or not world.wrote(rows):
        return {}
    with progress(f"scoring {len(rows)} held-out pairs", 4) as advance:  # pairs and edits, each by two models
        decisive = decisive_figures(run_, rows, advance)
        return decisive | stitching_figures(world, scored_edits(run_, rows, advance))


NEEDS = (("table", "no --json"), ("run", "no --policy"))


def main(options: Options):
    if options.png:
        needs("matplotlib", "figures", "a picture")
        check_output(options.png, ".png")
    if options.html:
        check_output(options.html, ".html")
    run_ = options.open_both(options.policy or options.run or Path("runs/dpo"))
    if options.prompt is not None:
        rows, prompt = [], clean(options.prompt, "the prompt")
        response = clean(options.response, "the response")
        versions = {"response": QFunction(run_).score(prompt, response)[0]}
    else:
        rows = held_out(run_, instead="--prompt and --response")
        edit, line = example(run_, rows)
        prompt, versions = edit.post.prompt, named(edit, line)
    known = any(credit.exact for credit in versions.values())
    world, post = (World(run_.tokenizer), read_post(prompt)) if known else (None, None)
    of = {name: plain(credit, world, post) for name, credit in versions.items()}
    wrong = {name: {i for start, stop, _ in of[name]["wrong"] for i in range(start, stop)} for name in of}
    if options.html:
        replace_file(options.html, lambda new: new.write_text(page(prompt, versions, wrong), encoding="utf-8"))
    if options.png:
        save(picture("What each token is paid or charged", prompt, of), options.png)
    console = Console(quiet=options.json)
    show(prompt, versions, wrong, console, options.table)
    figures = figures_of(run_, rows) if rows else {}
    if options.json:
        print(json.dumps({"prompt": prompt, "versions": of, "held_out": figures}, allow_nan=False))
    if figures:
        number = {name: "none" if value is None else f"{value:.3f}" for name, value in figures.items()}
        console.print(
            f"{figures['edited_posts']} held-out summaries edited: an error changes its own token's reward by "
            f"{number['first_change']} (A* {number['first_change_exact']}), a second one's by "
            f"{number['second_change']} ({number['second_change_exact']}), later choices by "
            f"{number['later_change']} ({number['later_change_exact']})\n"
            f"all held-out tokens: correlation to A* {number['correlation']}, r2 {number['r2']}; AUROC of decisive "
            f"tokens {number['auroc']} (A* {number['auroc_exact']}, log pi_ref alone {number['auroc_reference']})"
        )


if __name__ == "__main__":
    run(main, Options, "python -m minqstar.lab.credit", NEEDS)
