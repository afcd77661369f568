"""From data to a finished run, the story of the paper in its order; `train.py` is this file's command.

1. Read data: the TL;DR world, whose Q* is known, or anyone's preference pairs.
2. SFT: imitate responses. The result is the reference policy pi_ref.
3. Score the pairs under pi_ref once: DPO needs its log-probs at every step.
4. DPO: move the policy until beta log(pi/pi_ref), summed over a response, explains the preferences (Eq. 8, 9).
5. Evaluate: are beta log(pi/pi_ref), token by token, the exact advantages A* (Eq. 10, 11)?
"""

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minqstar.errors import require
from minqstar.evaluate import evaluate, figures_table, mean_nll
from minqstar.files import owner
from minqstar.lm.model import GPT
from minqstar.lm.tokenizer import load_tokenizer
from minqstar.options import NEEDS, WORLD, Options  # noqa: F401 (the rules of the command)
from minqstar.training.checkpoint import Run, load_run, read_config
from minqstar.training.data import PackedData, reasons_of, tokenize
from minqstar.training.formats import read_jsonl
from minqstar.training.groups import Group, Groups, rows_of
from minqstar.training.scoring import ReferenceCache, weights_hash
from minqstar.training.session import Session, check_memory, finish, train_stage
from minqstar.training.trainer import DPO, SFT, Trainer, plan
from minqstar.training.writer import RunWriter, abandon, claim, otherwise
from minqstar.world.tldr import dataset, world_hash


def main(options: Options):
    """All of it: data, SFT, reference, DPO, evaluation."""
    options, session = begin(options)
    out = options.folder / options.stage
    with owner(options.folder):
        claim(out, options.overwrite, options.resume, options.folder / "sft", options.extend)
        with session.phase("data"):
            data = read_data(options, session)
        if options.overwrite and not options.resume:
            abandon(out)  # now, lest it meet another reference after a stop in SFT
        if options.has_sft:
            sft(options, session, data, options.folder / "sft")
        if options.stage == "dpo":
            figures = dpo(options, session, data, options.reference or options.folder / "sft", out)
            if figures:
                session.console.print(figures_table(figures))
    total = session.seconds
    phases = ", ".join(f"{name} {seconds:.0f} ({seconds / total:.0%})" for name, seconds in session.phases.items())
    session.console.print(f"the run is in {out}: {total:.0f} s\n{phases}")
    session.console.say(f"next: {next_commands(options, out)}")


def next_commands(options: Options, out: Path) -> str:
    """What to type after training, as it was typed for training."""
    sample = "python sample.py" if Path(sys.argv[0]).name == "train.py" else "minqstar-sample"
    run = shlex.quote(str(out))
    there = "" if out == Path("runs/dpo") else f" --run {run}"
    after = {"dpo": f"python -m minqstar.bellman {run}", "sft": "train again with --stage dpo in place of --stage sft"}
    return f"{sample}{there}\n      {after[options.stage]}"


def begin(options: Options) -> tuple[Options, Session]:
    """The options with the architecture that holds, and what all stages share."""
    given = [load_run(path, torch.device("cpu")) for path in (options.reference, options.init) if path]
    alike = len({(run.tokenizer.fingerprint, run.model.config) for run in given}) <= 1
    require(alike, f"{options.init} and {options.reference} differ in their vocabulary or architecture")
    tokenizer = given[0].tokenizer if given else load_tokenizer(options.vocabulary)
    model = given[0].model.config if given else replace(options.model, vocab_size=tokenizer.n_vocab)
    options = replace(options, model=model)
    session = Session(tokenizer, options.device, options.dtype, options.compile, options.save_every)
    check_memory(options.model, max(options.sft.row_length, options.dpo.row_length), session.device)
    return options, session


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
                sft = tokenized(options, session, folder / "sft.jsonl")
            if options.stage == "dpo":
                pairs = tokenized(options, session, folder / "train.jsonl")
            test = list(read_jsonl(folder / "test.jsonl"))
        held_out = rows_of(tokenize(test, session.tokenizer, options.model.block_size)[0], test)
    else:
        once = None if options.data.is_file() else list(read_jsonl(options.data))  # a pipe gives its rows only once
        groups, skipped = tokenized(options, session, options.data, once)
        require(groups.pairs or options.stage == "sft", f"{options.data}: DPO needs rows with chosen and rejected")
        held = every_kth_prompt(groups, options.held_out)
        held_out = rows_of(groups, once or read_jsonl(options.data), held)
        sft = pairs = (groups.without(held), skipped)
    if options.has_sft and options.sft_data:
        sft = tokenized(options, session, options.sft_data, without=held_out)
    if not held_out:
        session.console.print("nothing is held out for evaluation: no prompt is left for it that the model can take")
    return Data(sft, pairs, held_out)


def tokenized(
    options: Options, session: Session, file: Path, rows: Iterable[dict] | None = None, without: Sequence[dict] = ()
) -> Tokenized:
    """The rows of a file as token ids, `without` those of some prompts; how many are skipped, and why, is said."""
    groups, skipped = tokenize(rows or read_jsonl(file), session.tokenizer, options.model.block_size)
    prompts, of_row = {tuple(session.tokenizer.encode_prompt(row["prompt"])) for row in without}, groups.of_row
    if held := {i for i, group in enumerate(groups) if tuple(group.prompt) in prompts}:
        skipped["prompt held out"] = sum(group in held for group in of_row)
        groups = groups.without(held)
    if skipped:
        some = f"skipped {skipped.total()} of {len(of_row)} rows: {reasons_of(skipped)}"
        session.console.print(f"{file}: {some}", soft_wrap=True)
    advice = "a larger --model.block-size or another --vocabulary may help"
    require(bool(groups), f"{file}: every row was skipped; {advice}")
    return groups, skipped


def every_kth_prompt(groups: Groups, share: float) -> set[int]:
    """The groups of a share of the prompts, at least one, evenly spread; none where there is one prompt only."""
    of_prompt: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        of_prompt.setdefault(hash(tuple(group.prompt)), []).append(i)
    prompts = list(of_prompt.values())
    count = min(len(prompts) - 1, max(1, round(share * len(prompts))))
    return {i for k in range(count) for i in prompts[(2 * k + 1) * len(prompts) // (2 * count)]}


def sft(options: Options, session: Session, data: Data, out: Path):
    """Train the reference pi_ref by imitation, or leave the run that is there if it is the same one."""
    with session.phase("data"):
        groups, skipped = data.sft
        used = groups.used
        if options.sft.on == "chosen":
            require(groups.pairs, "--sft.on chosen needs rows with chosen and rejected")
            groups = Groups(Group(group.prompt, group.responses[::2]) for group in groups)
        packed = PackedData(groups, session.tokenizer.pad, options.sft.row_length)
        held_out, _ = tokenize(data.held_out, session.tokenizer, options.model.block_size)
    init, of = start(options.init, session)
    config = {**fingerprint(options, session, "sft", packed), "init": of}
    if out.exists() and options.stage == "dpo":
        before = read_config(out)
        odd = otherwise(before, config, options.source("sft"))
        if not odd:
            unknown = "; it does not say on which world" if "world" in config.keys() - before.keys() else ""
            session.console.print(f"SFT: {out} was trained before with these very options{unknown}")
            return
        message = f"{out} was trained {odd}; use --overwrite, or another --runs"
        require(options.overwrite or options.resume, message)
    torch.manual_seed(options.seed)
    model = GPT(options.model).to(session.device)
    if init:
        model.load_state_dict(init.state_dict())
    session.console.print(f"SFT: {packed.num_scored:,} tokens to imitate, {model.num_parameters():,} parameters")
    with RunWriter(out, config, options.overwrite, options.resume, options.source("sft"), options.extend) as writer:
        trainer = Trainer(session.fast(model), packed, options.sft, SFT(), session.dtype, options.seed)
        history = train_stage(session, "SFT", trainer, writer)
        figures = {"loss": mean_nll(model, held_out, session.tokenizer.pad)} if held_out else {}
        finish(session, writer, model, history, used, skipped, data.held_out, figures)


def dpo(options: Options, session: Session, data: Data, reference_path: Path, out: Path) -> dict:
    """Train the policy against its reference and evaluate the two; the closing figures."""
    own = options.extend and options.reference is None  # the one it keeps, whatever has become of that run
    run = load_run(out if own else reference_path, session.device)
    init, of_init = start(options.reference and options.init, session)
    groups, skipped = data.pairs
    with session.phase("data"):
        packed = PackedData(groups, session.tokenizer.pad, options.dpo.row_length)
    reference, of = (run.reference, run.config["reference"]) if own else (run.model, origin(run))
    config = {**fingerprint(options, session, "dpo", packed), "reference": of, "init": of_init}
    torch.manual_seed(options.seed)  # whether or not this process has trained the SFT run too
    model = GPT(options.model).to(session.device)
    model.load_state_dict((init or reference).state_dict())  # pi = pi_ref: the first loss is ln 2
    session.console.print(f"DPO: {groups.used:,} pairs, beta {options.dpo.beta} against {of['path']}")
    with RunWriter(out, config, options.overwrite, options.resume, options.source("dpo"), options.extend) as writer:
        if not options.extend:
            writer.keep_reference(run)
        with session.phase("reference"), session.progress("reference", len(packed)) as advance:
            passes = plan(packed, options.dpo, options.seed).passes
            cache = ReferenceCache(session.fast(reference), packed, session.dtype, passes, advance)
        cache.check(of["hash"], packed)
        objective = DPO(cache, options.dpo.beta)
        trainer = Trainer(session.fast(model), packed, options.dpo, objective, session.dtype, options.seed)
        history = train_stage(session, "DPO", trainer, writer)
        with session.phase("evaluation"):
            finished = Run(out, config, session.tokenizer, model, reference, options.dpo.beta)
            figures = evaluate(finished, data.held_out, options.seed)
        finish(session, writer, model, history, groups.used, skipped, data.held_out, figures)
    return figures


def origin(run: Run) -> dict:
    """Where a model came from: what tells it apart is its hash."""
    return {"path": str(run.path), "hash": weights_hash(run.model)}


def start(path: Path | None, session: Session) -> tuple[GPT | None, dict | None]:
    """The model of a run that another stage starts from, and where it came from."""
    run = load_run(path, session.device) if path else None
    return run and run.model, run and origin(run)


def fingerprint(options: Options, session: Session, stage: str, data: PackedData) -> dict:
    """What decides a stage's weights, and the world that they know: two runs that agree here are the same run."""
    return {
        "stage": stage,
        "model": asdict(options.model),
        stage: asdict(getattr(options, stage)),
        "seed": options.seed,
        "dtype": session.dtype_name,
        "data": data.fingerprint,
        "file": options.source(stage),
        "vocabulary": session.tokenizer.fingerprint,
        **({"world": world_hash()} if options.source(stage) == str(WORLD) else {}),
    }
