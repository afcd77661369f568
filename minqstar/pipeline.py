"""From data to a finished run: what `train.py` does, callable from the package too."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from minqstar.checkpoint import Run, RunWriter, claim, differences, load_run, read_config
from minqstar.cli import require
from minqstar.data import Group, PackedData, read_jsonl, tokenize
from minqstar.lab.evaluate import evaluate, figures_table, mean_nll
from minqstar.lab.session import Options, Session, fingerprint, finish, train_stage
from minqstar.model import GPT
from minqstar.scoring import ReferenceCache, weights_hash
from minqstar.tldr import write_dataset
from minqstar.trainer import DPO, SFT, Trainer, plan


@dataclass
class Data:
    """What a stage needs: rows to train on by stage, and rows held out."""

    sft: list[dict]
    pairs: list[dict]
    held_out: list[dict]


def read_data(session: Session) -> Data:
    """The world's files, or the rows of --data with the rows of every k-th prompt held out."""
    options = session.options
    if options.data is None:
        folder = write_dataset(Path("data/tldr"), options.world, session.tokenizer, session.console.print)
        files = ["sft", "train", "test"] if options.stage == "dpo" else ["sft", "sft", "test"]
        return Data(*(read_jsonl(folder / f"{name}.jsonl") for name in files))
    rows = read_jsonl(options.data)
    pairs = [row for row in rows if "chosen" in row]
    mixed = 0 < len(pairs) < len(rows)
    require(
        not mixed,
        f"{options.data}: some rows have chosen and rejected, others completion; split them into two files",
    )
    require(bool(pairs) or options.stage == "sft", f"{options.data}: DPO needs rows with chosen and rejected")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))  # split by prompt: a prompt may have many rows
    count = min(len(prompts) - 1, max(1, round(options.held_out * len(prompts))))
    kept = {prompts[(2 * i + 1) * len(prompts) // (2 * count)] for i in range(count)}
    if not kept:
        session.console.print(f"{options.data} holds one prompt only: nothing is held out for evaluation")
    train_rows, held_out = ([row for row in rows if (row["prompt"] in kept) == side] for side in (False, True))
    return Data(train_rows, train_rows, held_out)


def tokenized(session: Session, stage: str, rows: list[dict]) -> tuple[list[Group], Counter[str]]:
    groups, skipped = tokenize(rows, session.tokenizer, session.options.model.block_size)
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        session.console.print(f"{stage}: skipped {skipped.total()} of {len(rows)} rows: {reasons}")
    require(bool(groups), "every row was skipped; a larger --model.block-size or another --vocabulary may help")
    return groups, skipped


def sft_data(session: Session, rows: list[dict]) -> tuple[PackedData, Counter[str]]:
    """Groups to imitate, packed; of preference pairs all responses or the chosen ones."""
    options = session.options
    groups, skipped = tokenized(session, "SFT", rows)
    if options.sft.on == "chosen" and "chosen" in rows[0]:
        groups = [Group(group.prompt, group.responses[::2]) for group in groups]
    return PackedData(groups, session.tokenizer.pad, options.sft.row_length), skipped


def sft(session: Session, data: Data, out: Path):
    """Train the reference, or leave the run that is there if it is the same one."""
    options = session.options
    with session.phase("data"):
        packed, skipped = sft_data(session, data.sft)
        held_out, _ = tokenize(data.held_out, session.tokenizer, options.model.block_size)
    config = fingerprint(session, "sft", packed)
    if out.exists() and options.stage == "dpo":
        odd = differences(read_config(out), config)
        if not odd:
            session.console.print(f"SFT: {out} was trained before with these very options")
            return
        message = f"{out} was trained otherwise ({'; '.join(odd[:3])}); use --overwrite, or another --runs"
        require(options.overwrite or options.resume, message)
    torch.manual_seed(options.seed)
    model = GPT(options.model).to(session.device)
    session.console.print(f"SFT: {packed.num_scored:,} tokens to imitate, {model.num_parameters():,} parameters")
    with RunWriter(out, config, options.overwrite, options.resume) as writer:
        trainer = Trainer(session.fast(model), packed, options.sft, SFT(), session.dtype, options.seed)
        history = train_stage(session, "SFT", trainer, writer)
        figures = {"loss": mean_nll(model, held_out, session.tokenizer.pad)} if held_out else {}
        finish(session, writer, model, history, len(data.sft), skipped, data.held_out, figures)


def dpo(session: Session, data: Data, reference_path: Path, out: Path) -> dict:
    """Train the policy against its reference and evaluate the two; the closing figures."""
    options = session.options
    reference = load_run(reference_path, session.device)
    with session.phase("data"):
        groups, skipped = tokenized(session, "DPO", data.pairs)
        packed = PackedData(groups, session.tokenizer.pad, options.dpo.row_length)
    origin = {"path": str(reference_path), "hash": weights_hash(reference.model)}
    config = {**fingerprint(session, "dpo", packed), "reference": origin}
    torch.manual_seed(options.seed)  # whether or not this process has trained the SFT run too
    model = GPT(options.model).to(session.device)
    model.load_state_dict(reference.model.state_dict())
    used = len(data.pairs) - skipped.total()
    session.console.print(f"DPO: {used:,} pairs, beta {options.dpo.beta} against {reference_path}")
    with RunWriter(out, config, options.overwrite, options.resume) as writer:
        with session.phase("reference"), session.progress("reference", len(packed)) as advance:
            passes = plan(packed, options.dpo, options.seed).passes
            cache = ReferenceCache(session.fast(reference.model), packed, session.dtype, passes, advance)
        cache.check(origin["hash"], packed)
        objective = DPO(cache, options.dpo.beta)
        trainer = Trainer(session.fast(model), packed, options.dpo, objective, session.dtype, options.seed)
        history = train_stage(session, "DPO", trainer, writer)
        with session.phase("evaluation"):
            finished = Run(out, config, session.tokenizer, model, reference.model, options.dpo.beta)
            figures = evaluate(finished, data.held_out, options.seed)
        writer.keep_reference(reference)
        finish(session, writer, model, history, len(data.pairs), skipped, data.held_out, figures)
    return figures


def main(options: Options):
    session = Session(options)
    out = session.runs / options.stage
    claim(out, options.overwrite, options.resume)
    with session.phase("data"):
        data = read_data(session)
    sft(session, data, session.runs / "sft")
    if options.stage == "dpo":
        session.console.print(figures_table(dpo(session, data, session.runs / "sft", out)))
    total = session.seconds
    phases = ", ".join(f"{name} {seconds:.0f} ({seconds / total:.0%})" for name, seconds in session.phases.items())
    session.console.print(f"the run is in {out}: {total:.0f} s\n{phases}")
