"""What the stages train on: the world's files or anyone's, as token ids from the cache, some prompts held out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minqstar.errors import require
from minqstar.options import WORLD, Options
from minqstar.show import show_mask
from minqstar.training.cache import TokenCache
from minqstar.training.data import encoded, reasons_of, row_key, tokenize
from minqstar.training.formats import Rows, as_pairs
from minqstar.training.groups import Groups, rows_of
from minqstar.training.session import Session
from minqstar.world.tldr import dataset

Tokenized = tuple[Groups, Counter[str]]  # what is trained on, and how many rows were skipped for which reason


@dataclass
class Data:
    """What the stages need: rows to train on, and rows held out, which can all be used."""

    sft: Tokenized | None
    pairs: Tokenized | None
    held_out: list[dict]


def read_data(options: Options, session: Session) -> Data:
    """The world's files; or the rows of --data, those of every k-th prompt held out."""
    sft = pairs = None
    if options.data is None:
        with dataset(WORLD, options.world, session.tokenizer, session.console.print) as folder:
            if options.has_sft and options.sft_data is None:
                sft = to_train(options, session, read(options, session, folder / "sft.jsonl"))
            if options.stage == "dpo":
                pairs = to_train(options, session, read(options, session, folder / "train.jsonl"))
            test = list(Rows(folder / "test.jsonl"))
        held_out = rows_of(tokenize(test, session.tokenizer, options.max_length)[0], test)
    else:
        file = read(options, session, options.data, options.format)
        groups, skipped = to_train(options, session, file)
        require(groups.compared or options.stage == "sft", f"{options.data}: DPO needs rows with chosen and rejected")
        held = every_kth_prompt(groups, options.held_out)
        held_out = as_pairs(file.held(held))
        sft = pairs = (groups.without(held), skipped)
    if options.has_sft and options.sft_data:
        sft = to_train(options, session, read(options, session, options.sft_data), held_out)
    if not held_out:
        session.console.print("nothing is held out for evaluation: no prompt is left for it that the model can take")
    return Data(sft, pairs, held_out)


def read(options: Options, session: Session, path: Path, form: str = "auto") -> TokenCache:
    """A file's rows as token ids, from the cache if they are in it; what they are, and how the first is trained on."""
    console = session.console
    with session.progress("reading", 100) as advance:
        told = 0

        def reach(share: float):
            nonlocal told
            advance(int(100 * share) - told)
            told = int(100 * share)

        file = TokenCache(Rows(path, form), session.tokenizer, options.max_length, options.cache, reach, console.print)
        reach(1.0)
    if path.parent != WORLD:
        not_used = f"; not used: {', '.join(file.unused)}" if file.unused else ""
        before = "" if file.made else "; read before"
        console.say(f"{path}: {len(file.groups.of_row):,} rows of format {file.form}{not_used}{before}")
        if file.groups:
            show_mask(console, session.tokenizer, file.groups[0])
    return file


def to_train(options: Options, session: Session, file: TokenCache, without: Sequence[dict] = ()) -> Tokenized:
    """The groups of a file, `without` those of some rows' prompts; how many rows are skipped, and why, is said."""
    groups, skipped, path = file.groups, file.skipped, file.rows.path
    held_out = [row_key(row, *encoded(row, session.tokenizer)) for row in without]
    held = np.flatnonzero(np.isin(groups.prompt_keys(), held_out))
    if len(held):
        skipped["prompt held out"] = int(np.isin(groups.of_row, held).sum())
        groups = groups.without(held)
    if skipped:
        some = f"skipped {skipped.total()} of {len(file.groups.of_row)} rows: {reasons_of(skipped)}"
        session.console.say(f"{path}: {some}")
    advice = "a larger --model.block-size or --max-length, or another --vocabulary, may help"
    require(bool(groups), f"{path}: every row was skipped; {advice}")
    return groups, skipped


def every_kth_prompt(groups: Groups, share: float) -> set[int]:
    """The groups of a share of the prompts, at least one, evenly spread; none where there is one prompt only."""
    _, first, prompt = np.unique(groups.prompt_keys(), return_index=True, return_inverse=True)
    order = np.argsort(first)  # prompts as they come
    count = min(len(order) - 1, max(1, round(share * len(order))))
    held = [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count)]
    return set(np.flatnonzero(np.isin(prompt, held)).tolist())
