"""Credit assignment: which tokens of a summary DPO pays for, beside the exact A* where the world knows it (Fig. 1).

    python -m minqstar.lab.credit                                # a held-out post; its summary, with one and two errors
    python -m minqstar.lab.credit --prompt "…" --response "…"    # anything else
    python -m minqstar.lab.credit --html credit.html --png credit.png

A token's implicit reward is beta log(pi/pi_ref) (Eq. 10, 11), an advantage: what the token adds to or takes from the
return that its prefix promised. A wrong fact is charged at its *decisive* token, the first at which the right value
is out of reach.
"""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from rich.text import Text
from torch import Tensor

from minqstar.cli import run
from minqstar.console import Console
from minqstar.errors import is_text, needs, require
from minqstar.evaluate import oracle
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
from minqstar.score import QFunction, Scored
from minqstar.show import coloured, html_tokens, legend, token_table
from minqstar.training.checkpoint import Run, load_run, replace_file
from minqstar.training.data import read_jsonl, tokenize
from minqstar.world.posts import post_of, read_post
from minqstar.world.tldr import World

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>credit assignment</title><style>
body {{ font: 15px/1.6 system-ui, sans-serif; margin: 2em auto; max-width: 62em; color: #1a1a1a; background: #fff; }}
.post {{ color: #555; }}
.line {{ font: 15px/2.1 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap; }}
.line span {{ padding: .15em 0; border-radius: 3px; cursor: default; }}
.line span:hover {{ outline: 2px solid #1a1a1a; }}
h2 {{ font-size: 1em; margin: 1.4em 0 .2em; }}
.of {{ color: #555; font-size: .9em; margin: 0; }}
</style></head><body>
<h1>Which tokens DPO paid for</h1>
<p class="post">{prompt}</p>
<p>Blue is paid, orange is charged, deeper for more. Hold the pointer over a token for its figures.</p>
{parts}
</body></html>
"""


def page(prompt: str, versions: dict[str, Scored]) -> str:
    """One self-contained HTML page."""

    def line(credit: Scored, rewards: Tensor) -> str:
        return f'<div class="line">{html_tokens(credit.tokens, rewards.tolist(), credit.titles)}</div>'

    parts = []
    for name, credit in versions.items():
        parts += [f"<h2>{escape(name)}</h2>", '<p class="of">learned: beta log(pi/pi_ref)</p>']
        parts.append(line(credit, credit.rewards))
        if credit.exact:
            parts += ['<p class="of">exact: A*</p>', line(credit, credit.exact.advantage)]
    return PAGE.format(prompt=escape(prompt), parts="\n".join(parts))


def show(prompt: str, versions: dict[str, Scored], console: Console, table: bool):
    colour = console.color_system is not None
    console.print(Text(prompt, style="dim"))
    console.print(legend(colour))
    for name, credit in versions.items():
        console.print(Text(f"\n{name}", style="bold"))
        console.print(coloured(credit.tokens, credit.rewards.tolist(), colour))
        if credit.exact:
            exact = coloured(credit.tokens, credit.exact.advantage.tolist(), colour)
            console.print(Text.assemble(("exact A*: ", "dim"), exact))
        if table:
            console.print(token_table(credit.tokens, credit.rewards, credit.exact, colour))


@dataclass(frozen=True)
class Options:
    """Show which tokens of a response DPO paid for."""

    run: Path = Path("runs/dpo")
    """A DPO run."""
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
        require(all(is_text(t) for t in (self.prompt, self.response) if t), "the text is not UTF-8")
        require(self.png is None or self.png.suffix == ".png", f"--png writes a .png file, not {self.png}")


def of_the_run(run_: Run) -> tuple[str, dict[str, Scored], dict]:
    """A held-out post's prompt, its summary right and wrong, and the figures over all held-out pairs of the world."""
    file = run_.path / "held_out.jsonl"
    rows = read_jsonl(file) if file.exists() and file.stat().st_size else []
    _, skipped = tokenize(rows, run_.tokenizer, run_.model.config.block_size)
    require(not skipped, f"{file}: {skipped.total()} rows do not fit the run; give --prompt and --response")
    edit, line = example(run_, rows)
    world, figures = oracle(run_, [post_of(row) for row in rows]), {}
    if world is not None and world.wrote(rows):
        figures = decisive_figures(run_, rows) | stitching_figures(world, scored_edits(run_, rows))
    return edit.post.prompt, named(edit, line), figures


NEEDS = (("table", "no --json"),)


def main(options: Options):
    if options.png:
        needs("matplotlib", "figures", "a picture")
    for path in filter(None, (options.html, options.png)):
        require(path.parent.is_dir(), f"cannot write {path}: there is no folder {path.parent}")
    run_ = load_run(options.run, torch.device("cpu"))
    require(run_.reference is not None, f"{options.run} is an SFT run: it has no implicit rewards; give a DPO run")
    own = options.prompt is not None
    if own:
        prompt, figures = options.prompt, {}
        versions = {"response": QFunction(run_).score(prompt, options.response)[0]}
    else:
        prompt, versions, figures = of_the_run(run_)
    if options.html:
        replace_file(options.html, lambda aside: aside.write_text(page(prompt, versions), encoding="utf-8"))
    world, post = World(run_.tokenizer), read_post(prompt)
    of = {name: plain(credit, world, post) for name, credit in versions.items()}
    if options.png:
        save(picture("What each token is paid or charged", prompt, of), options.png)
    if options.json:
        print(json.dumps({"prompt": prompt, "versions": of, "held_out": figures}, allow_nan=False))
        return
    console = Console()
    show(prompt, versions, console, options.table)
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
