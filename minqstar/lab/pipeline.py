"""From data to a finished run: what `train.py` does, callable from the package too."""

import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from minqstar.checkpoint import Run, RunWriter, load_run, read_config
from minqstar.cli import require
from minqstar.data import Group, PackedData, read_jsonl, tokenize
from minqstar.lab.evaluate import evaluate, mean_nll
from minqstar.model import GPT, GPTConfig
from minqstar.scoring import ReferenceCache, has_fast_bf16, weights_hash
from minqstar.tldr import DataConfig, write_dataset
from minqstar.tokenizer import DEFAULT_VOCABULARY, load_tokenizer
from minqstar.trainer import DPO, SFT, DPOConfig, Objective, SFTConfig, StageConfig, plan, train


@dataclass(frozen=True)
class Options:
    """Train a Q-function: SFT, then DPO."""

    stage: Literal["sft", "dpo"] = "dpo"
    """What to train; dpo first trains the SFT run that it starts from, unless that exists."""
    data: Path | None = None
    """JSONL of prompt, chosen, rejected (for sft also prompt, completion). Default: the TL;DR world, generated."""
    runs: Path | None = None
    """Folder for the runs sft and dpo. Default: runs, or runs/NAME with --data NAME.jsonl."""
    overwrite: bool = False
    """Replace runs that exist."""
    vocabulary: Path = DEFAULT_VOCABULARY
    """Vocabulary file in tiktoken's form; its size replaces --model.vocab-size."""
    held_out: float = 0.05
    """Share of the prompts of --data that is kept for evaluation."""
    seed: int = 0
    """Seed of weights, row order and evaluation draws."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto is bfloat16 where the processor is fast at it. Weights are always float32."""
    model: GPTConfig = field(default_factory=GPTConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    world: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        require(0 < self.held_out < 1, f"held-out is a share of the prompts, between 0 and 1, got {self.held_out}")
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")


@dataclass
class Data:
    """What a stage needs: rows to train on by stage, rows held out, and what was skipped."""

    sft: list[dict]
    pairs: list[dict]
    held_out: list[dict]


class Session:
    """What all stages of one command share: tokenizer, device, console, the seconds of each phase."""

    def __init__(self, options: Options):
        self.console = Console(highlight=False)
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.tokenizer = load_tokenizer(options.vocabulary)
        self.options = replace(options, model=replace(options.model, vocab_size=self.tokenizer.n_vocab))
        name = options.data.stem if options.data else ""
        self.runs = options.runs or Path("runs") / name
        available = torch.cuda.is_available()
        require(options.device != "cuda" or available, "no CUDA device is available; use --device cpu")
        self.device = torch.device("cuda" if available and options.device != "cpu" else "cpu")
        bf16 = options.dtype == "bfloat16" or (options.dtype == "auto" and has_fast_bf16(self.device))
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self.started, 2)

    @contextmanager
    def phase(self, name: str):
        """Add what happens inside to the seconds of a phase."""
        before = self.seconds
        yield
        self.phases[name] = round(self.phases.get(name, 0.0) + self.seconds - before, 2)

    @contextmanager
    def progress(self, name: str, total: int):
        """A progress bar; what it yields takes a step's metrics, or how many steps were made."""
        columns = (
            "{task.description:9}",
            BarColumn(8),
            MofNCompleteColumn(),
            "{task.fields[note]}",
            TimeRemainingColumn(compact=True),
        )
        columns = [TextColumn(c) if isinstance(c, str) else c for c in columns]
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(name, total=total, note="")

            def advance(steps: int = 1, note: str = ""):
                bar.update(task, advance=steps, note=note)

            yield advance


def read_data(session: Session) -> Data:
    """The world's files, or the rows of --data with the rows of every k-th prompt held out."""
    options = session.options
    if options.data is None:
        folder = write_dataset(Path("data/tldr"), options.world, session.tokenizer)
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
    kept = set(prompts[1 :: max(2, round(1 / options.held_out))])
    train_rows, held_out = ([row for row in rows if (row["prompt"] in kept) == side] for side in (False, True))
    return Data(train_rows, train_rows, held_out)


def tokenized(session: Session, stage: str, rows: list[dict]) -> tuple[list[Group], Counter[str]]:
    groups, skipped = tokenize(rows, session.tokenizer, session.options.model.block_size)
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        session.console.print(f"{stage}: skipped {skipped.total()} of {len(rows)} rows: {reasons}")
    require(bool(groups), "every row was skipped; a larger --model.block-size or another --vocabulary may help")
    return groups, skipped


def fingerprint(session: Session, stage: str, data: PackedData) -> dict:
    """What decides a stage's weights: two runs that agree here are the same run."""
    options = session.options
    return {
        "stage": stage,
        "model": asdict(options.model),
        stage: asdict(getattr(options, stage)),
        "seed": options.seed,
        "dtype": str(session.dtype).removeprefix("torch."),
        "data": data.fingerprint(),
        "vocabulary": session.tokenizer.fingerprint,
    }


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Where two nested configurations differ, as `name: old -> new`."""
    found = []
    for key in new:
        a, b = old.get(key), new[key]
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {str(a)[:12]} -> {str(b)[:12]}")
    return found


def note(history: list[dict]) -> str:
    """What the progress bar says: means of the last 20 steps, and the speed so far."""
    recent = history[-20:]
    shown = {"loss": "loss", "accuracy": "acc", "margin": "margin"}
    means = [f"{shown[key]} {sum(m[key] for m in recent) / len(recent):.3f}" for key in shown if key in recent[0]]
    speed = history[-1]["tokens_seen"] / history[-1]["seconds"]
    return " ".join([*means, f"{speed / 1e3:.1f}k tok/s"])


def train_stage(
    session: Session,
    name: str,
    model: GPT,
    data: PackedData,
    stage: StageConfig,
    objective: Objective,
    writer: RunWriter,
) -> list[dict]:
    """Train with a progress bar and a metrics file; what was logged."""
    history: list[dict] = []
    _, steps = plan(data, stage)
    with session.phase(name), session.progress(name, steps) as advance:

        def log(metrics: dict):
            history.append(metrics)
            writer.log(metrics)
            advance(note=note(history))

        train(model, data, stage, objective, session.dtype, session.options.seed, log)
    return history


def summary(
    session: Session,
    stage: str,
    model: GPT,
    history: list[dict],
    rows: int,
    skipped: Counter[str],
    figures: dict,
) -> dict:
    return {
        "stage": stage,
        "steps": len(history),
        "seconds": session.seconds,
        "phases": session.phases,
        "device": str(session.device),
        "dtype": str(session.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "tokens_seen": history[-1]["tokens_seen"],
        "first_loss": history[0]["loss"],
        "last_loss": sum(m["loss"] for m in history[-20:]) / len(history[-20:]),
        "rows_used": rows - skipped.total(),
        "rows_skipped": dict(skipped),
        "eval": figures,
    }


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
    identity = fingerprint(session, "sft", packed)
    if out.exists() and options.stage == "dpo":
        odd = differences(read_config(out), identity)
        if not odd:
            session.console.print(f"SFT: {out} was trained before with these very options")
            return
        message = f"{out} was trained otherwise ({'; '.join(odd[:3])}); use --overwrite, or another --runs"
        require(options.overwrite, message)
    torch.manual_seed(options.seed)
    model = GPT(options.model).to(session.device)
    session.console.print(f"SFT: {packed.num_scored:,} tokens to imitate, {model.num_parameters():,} parameters")
    with RunWriter(out, overwrite=True) as writer:
        history = train_stage(session, "SFT", model, packed, options.sft, SFT(), writer)
        figures = {"loss": mean_nll(model, held_out, session.tokenizer.pad)} if held_out else {}
        writer.save_model(model)
        session.tokenizer.save(writer.folder / "vocab.tiktoken")
        writer.write_json("config.json", identity)
        writer.write_json("summary.json", summary(session, "sft", model, history, len(data.sft), skipped, figures))


def dpo(session: Session, data: Data, reference_path: Path, out: Path):
    """Train the policy against its reference and evaluate the two."""
    options = session.options
    reference = load_run(reference_path, session.device)
    with session.phase("data"):
        groups, skipped = tokenized(session, "DPO", data.pairs)
        packed = PackedData(groups, session.tokenizer.pad, options.dpo.row_length)
    model = GPT(options.model).to(session.device)
    model.load_state_dict(reference.model.state_dict())
    session.console.print(
        f"DPO: {len(data.pairs) - skipped.total():,} pairs, beta {options.dpo.beta} against {reference_path}"
    )
    with RunWriter(out, options.overwrite) as writer:
        rows, _ = plan(packed, options.dpo)
        with session.phase("reference"), session.progress("reference", len(packed)) as advance:
            cache = ReferenceCache(reference.model, packed, session.dtype, rows, advance)
        cache.check(weights_hash(reference.model), packed)
        history = train_stage(session, "DPO", model, packed, options.dpo, DPO(cache, options.dpo.beta), writer)
        config = {
            **fingerprint(session, "dpo", packed),
            "reference": {"path": str(reference_path), "hash": cache.key[0]},
        }
        finished = Run(out, config, session.tokenizer, model, reference.model)
        with session.phase("evaluation"):
            figures = evaluate(finished, data.held_out, options.seed)
        writer.save_model(model)
        writer.keep_reference(reference)
        session.tokenizer.save(writer.folder / "vocab.tiktoken")
        writer.write_json("config.json", config)
        writer.write_json("summary.json", summary(session, "dpo", model, history, len(data.pairs), skipped, figures))
    session.console.print(figures_table(figures))


def figures_table(figures: dict) -> Table:
    """The closing figures, with the reference's and the optimum's beside the policy's."""
    table = Table("held-out figure", "reference", "policy", "optimum")
    for name, value in figures.items():
        if isinstance(value, float) and not name.startswith(("ref_", "optimal_")):
            cells = [figures.get(f"ref_{name}"), value, figures.get(f"optimal_{name}")]
            table.add_row(name, *("" if cell is None else f"{cell:.4f}" for cell in cells))
    return table


def main(options: Options):
    session = Session(options)
    out = session.runs / options.stage
    free = options.overwrite or not out.exists()
    require(free, f"{out} exists; replace it with --overwrite, or choose another folder with --runs")
    with session.phase("data"):
        data = read_data(session)
    sft(session, data, session.runs / "sft")
    if options.stage == "dpo":
        dpo(session, data, session.runs / "sft", out)
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in session.phases.items())
    session.console.print(f"the run is in {out}: {session.seconds:.0f} s\n({phases})")
