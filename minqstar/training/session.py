"""What all stages of one command share: the session, training with a progress bar and saves, the summary."""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minqstar.console import Console
from minqstar.errors import Stopped, UserError, ending_signals, first_line, require
from minqstar.lm.fast import compiled, has_fast_bf16
from minqstar.lm.memory import mask_bytes, require_memory
from minqstar.lm.model import GPT, GPTConfig
from minqstar.lm.tokenizer import Tokens
from minqstar.training.checkpoint import as_json
from minqstar.training.trainer import Trainer
from minqstar.training.writer import RunWriter

LINE_EVERY = 20  # seconds between two lines of progress where there is no terminal


def check_memory(config: GPTConfig, row_length: int, device: torch.device, adapted: bool = False):
    """UserError if the memory is too small for the weights or for the mask of one packed row.

    Weights, gradients and two moments take 16 bytes a parameter; with an adapter the frozen model, its merged copy and
    the reference, at the end, take 12. `train.py --plan` says more.
    """
    with torch.device("meta"):
        parameters = GPT(config).num_parameters()
    require_memory(
        (12 if adapted else 16) * parameters, f"{parameters:,} parameters", "--model.n-layer or --model.n-embd", device
    )
    rows = f"packed rows of {row_length:,} tokens"
    require_memory(mask_bytes(1, row_length, row_length), rows, "the row-length of the stage", device)


class Session:
    """What all stages of one command share: where and in which type they compute, the console, the seconds of phases.

    UserError if `device` is a CUDA device that is not there.
    """

    def __init__(
        self, tokenizer: Tokens, device: str = "auto", dtype: str = "auto", compile: bool = False, save_every: int = 100
    ):
        self.tokenizer, self.compile, self.save_every = tokenizer, compile, save_every
        self.console = Console()
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}
        available = torch.cuda.is_available()
        require(device != "cuda" or available, "no CUDA device is available; use --device cpu")
        self.device = torch.device("cuda" if available and device != "cpu" else "cpu")
        bf16 = dtype == "bfloat16" or (dtype == "auto" and has_fast_bf16(self.device))
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def fast(self, model: GPT) -> GPT:
        """The model to train: the same weights, with --compile in compiled blocks."""
        return compiled(model) if self.compile else model

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
        """A progress bar, or on no terminal a line now and then; what it yields takes how many steps were made."""
        columns = (
            "{task.description:9}",
            BarColumn(8),
            MofNCompleteColumn(),
            "{task.fields[note]}",
            TimeRemainingColumn(compact=True),
        )
        columns = [TextColumn(c) if isinstance(c, str) else c for c in columns]
        with Progress(*columns, console=self.console) as bar:
            task, said = bar.add_task(name, total=total, note=""), time.monotonic()

            def advance(steps: int = 1, note: str = ""):
                nonlocal said
                bar.update(task, advance=steps, note=note)
                if not self.console.is_terminal and time.monotonic() - said > LINE_EVERY:
                    said = time.monotonic()
                    self.console.print(bar)

            yield advance


def note(history: list[dict]) -> str:
    """What the progress bar says: means of the last 20 steps, and the speed so far."""
    recent = history[-20:]
    shown = {"loss": "loss", "accuracy": "acc", "margin": "margin"}
    means = [f"{shown[key]} {sum(m[key] for m in recent) / len(recent):.3f}" for key in shown if key in recent[0]]
    speed = history[-1]["tokens_seen"] / history[-1]["seconds"]
    return " ".join([*means, f"{speed / 1e3:.1f}k tok/s"])


@contextmanager
def signals_wait() -> Iterator[list[int]]:
    """Inside, a signal that ends is only noted, in the list, so that the step in hand can end; a second one stops."""
    came: list[int] = []

    def note_it(number: int, _):
        if came:
            raise Stopped(number)
        came.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield came
        return
    before = {number: signal.signal(number, note_it) for number in ending_signals()}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_stage(session: Session, name: str, trainer: Trainer, writer: RunWriter) -> list[dict]:
    """Train to the end with a progress bar, a log and regular saves; what was logged.

    A signal saves and raises Stopped. A resumed run goes on from its last save.
    """
    epoch, planned = len(trainer.passes) / trainer.per_step, trainer.steps  # steps
    trainer.steps += writer.more
    if writer.resumed:
        restore(session, name, trainer, writer)
    if round(trainer.config.epochs * epoch) < planned:
        asked, made = trainer.config.epochs, planned / epoch
        session.console.print(f"{name}: min-steps makes {made:.3g} passes over the data, more than the {asked:g} asked")
    history = writer.history()
    with session.phase(name), session.progress(name, trainer.steps) as advance, signals_wait() as came:
        advance(trainer.step)
        for metrics in trainer.run():
            history.append(metrics)
            writer.log(metrics)
            if came or trainer.step % session.save_every == 0 or trainer.step == trainer.steps:
                tensors, values = trainer.state_dict()
                writer.save_state(tensors, {**values, **kernels(session)})
            advance(note=note(history))
            if came:
                how = f"continue with {writer.go_on}"
                raise Stopped(came[0], f"stopped after step {trainer.step} of {trainer.steps}; {how}")
    return history


def restore(session: Session, name: str, trainer: Trainer, writer: RunWriter):
    """Put the trainer where the unfinished run stood."""
    tensors, values = writer.resumed
    try:
        trainer.load_state_dict(tensors, values)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"cannot resume from {writer.folder}: {first_line(e)}; start anew with --overwrite") from e
    writer.resumed = None
    session.console.print(f"{name}: resumed at step {trainer.step} of {trainer.steps}")
    for what, now in kernels(session).items():
        if values.get(what) != now:
            was = values.get(what)
            session.console.print(f"{name}: begun with {what} {was}, now {now}: sums may differ in their last bits")


def kernels(session: Session) -> dict:
    """What decides the order of sums, and no more than that."""
    return {"threads": torch.get_num_threads(), "compile": session.compile}


def finish(
    session: Session,
    writer: RunWriter,
    model: GPT,
    history: list[dict],
    used: int,
    skipped: Counter[str],
    held_out: list[dict],
    figures: dict,
):
    """Write what a finished run holds: weights, vocabulary, held-out rows, summary."""
    writer.save_model(model)
    session.tokenizer.save_in(writer.folder)
    writer.write("held_out.jsonl", "".join(json.dumps(row) + "\n" for row in held_out).encode())
    summary = {
        "stage": writer.config["stage"],
        "steps": len(history),
        "seconds": session.seconds,
        "phases": session.phases,
        "device": str(session.device),
        "dtype": session.dtype_name,
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "tokens_seen": history[-1]["tokens_seen"],
        "first_loss": history[0]["loss"],
        "last_loss": sum(m["loss"] for m in history[-20:]) / len(history[-20:]),
        "rows_used": used,
        "rows_skipped": dict(skipped),
        "eval": figures,
    }
    writer.write("summary.json", as_json(summary))
