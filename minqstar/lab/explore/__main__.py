"""A page in which the token MDP of a post can be walked, and what DPO learned seen beside its exact Q*, V* and A*.

    python -m minqstar.lab.explore                         # a held-out post of runs/dpo, into explore.html
    python -m minqstar.lab.explore --index 31              # another one
    python -m minqstar.lab.explore --policy A --ref B --data rows.jsonl     # any pair of models, without an oracle
    python -m minqstar.lab.explore --serve                 # the page over the models: type a prompt and a response

The page is one file, whole in itself. It solves the post's token MDP as `theory/mdp.py` does, at every turn of a knob.
"""

import sys
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import tyro

from minqstar.ask import QFunction
from minqstar.cli import run
from minqstar.console import Console
from minqstar.errors import require
from minqstar.evaluate import oracle
from minqstar.files import check_output, replace_file
from minqstar.lab.explore.export import answers_in, in_html, page_data
from minqstar.lab.explore.serve import serve
from minqstar.pair import PairOptions
from minqstar.theory.mdp import implicit_rewards, solve
from minqstar.training.checkpoint import held_out_rows
from minqstar.world.posts import Post, read_post
from minqstar.world.tldr import BETA, World

PARTS = {"STYLE": "page.css", "SOLVER": "solver.js", "PAGE": "page.js"}


@dataclass(frozen=True)
class Options(PairOptions):
    """Walk the token MDP of a post, in a page."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """A DPO run. Default: runs/dpo."""
    policy: Path | None = None
    """In place of a run: any run or Hugging Face folder, with --ref."""
    index: int | None = None
    """Which held-out row, or which of --data. Default: the first post in which a wrong fact is charged before it is
    complete; elsewhere the first row."""
    data: Path | None = None
    """Rows of any of the usual formats. Default: those that the run held out."""
    out: Path = Path("explore.html")
    """The page."""
    serve: bool = False
    """Serve the page on this machine alone, in place of writing it: what is typed there is scored at once."""
    port: int = 8000
    """Where to serve: http://127.0.0.1:PORT."""

    def __post_init__(self):
        require((self.index or 0) >= 0, f"index must not be negative, got {self.index}")
        require(0 <= self.port < 2**16, f"port must be between 0 and 65535, got {self.port}")


NEEDS = (("out", "no --serve"), ("port", "--serve"), ("run", "no --policy"))


def charged_early(world: World, post: Post) -> bool:
    """Whether a token of a fact is charged by A* that is paid nothing: the fact is wrong, and not yet complete."""
    automaton = world.automata[post.scenario]
    mdp = automaton.mdp([post])
    A = implicit_rewards(mdp, solve(mdp, BETA), BETA)[0]
    fact = torch.tensor([kind == "fact" for kind in automaton.kind])
    return bool(((A < -0.5) & (mdp.reward[0] == 0) & fact[:, None]).any())


def page_of(data: dict) -> str:
    """The page of some data, as HTML."""
    folder = files(__package__)
    page = (folder / "page.html").read_text(encoding="utf-8")
    for name, file in PARTS.items():
        page = page.replace(f"/*{name}*/", (folder / file).read_text(encoding="utf-8"))
    title = "Walk the token MDP" if data["world"] else "Which tokens were paid for"
    return page.replace("<!--TITLE-->", escape(title)).replace("/*DATA*/", in_html(data))


def main(options: Options):
    if not options.serve:
        check_output(options.out, ".html", options.data)
    run_ = options.open_both(options.policy or options.run or Path("runs/dpo"))
    q, console = QFunction(run_), Console()
    most = 100 if options.index is None else min(options.index + 1, sys.maxsize)
    rows = list(islice(held_out_rows(run_, options.data), most))
    require(len(rows) > (options.index or 0), f"--index {options.index}: there are {len(rows)} rows only")
    require("prompt" in rows[0], "a plain text has no prompt to walk on from; give rows of prompts and answers")
    posts = [read_post(row["prompt"]) for row in rows]
    world = oracle(run_, posts[options.index or 0 :][:1])
    index = options.index
    if index is None:
        told = (i for i, post in enumerate(posts) if world and post and charged_early(world, post))
        index = next(told, 0)
    row = rows[index]
    data = page_data(q, row["prompt"], answers_in(q, row, world), world)
    if options.serve:
        serve(q, page_of({**data, "live": True}), options.port, console)
        return
    page = page_of({**data, "live": False})
    replace_file(options.out, lambda new: new.write_text(page, encoding="utf-8"))
    console.say(f"wrote {options.out}, {len(page.encode()) / 1e6:.2f} MB: open it in a browser")


if __name__ == "__main__":
    run(main, Options, "python -m minqstar.lab.explore", NEEDS)
