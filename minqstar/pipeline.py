"""From data to a finished run, the story of the paper in its order; `train.py` is this file's command.

python train.py                        # everything: data, SFT, DPO, evaluation against the exact Q*
python train.py --data prefs.jsonl     # the same on rows of prompt, chosen, rejected
python train.py --stage sft            # the reference alone

1. Read data: the TL;DR world, whose Q* is known, or anyone's preference pairs.
2. SFT: imitate responses. The result is the reference policy pi_ref.
3. Score the pairs under pi_ref once: DPO needs its log-probs at every step.
4. DPO: move the policy until beta log(pi/pi_ref), summed over a response, explains the preferences (Eq. 8, 9).
5. Evaluate: are beta log(pi/pi_ref), token by token, the exact advantages A* (Eq. 10, 11)?
"""

import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from minqstar.errors import require
from minqstar.evaluate import evaluate, figures_table, mean_nll
from minqstar.files import owner
from minqstar.lm.model import GPT, GPTConfig
from minqstar.lm.tokenizer import DEFAULT_VOCABULARY, load_tokenizer
from minqstar.training.checkpoint import Run, load_run, read_config
from minqstar.training.data import PackedData, reasons_of, tokenize
from minqstar.training.formats import read_jsonl, rereader
from minqstar.training.groups import Group, Groups, rows_of
from minqstar.training.scoring import ReferenceCache, weights_hash
from minqstar.training.session import Session, check_memory, finish, train_stage
from minqstar.training.trainer import DPO, SFT, DPOConfig, SFTConfig, Trainer, plan
from minqstar.training.writer import RunWriter, abandon, claim, otherwise
from minqstar.world.tldr import DataConfig, dataset, world_hash

WORLD = Path("data/tldr")  # where the world's data set is


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
    """Replace runs that exist, and discard unfinished ones."""
    resume: bool = False
    """Continue an unfinished run from its last save; all other options as before."""
    save_every: int = 100
    """Steps between two saves of the training state."""
    vocabulary: Path = DEFAULT_VOCABULARY
    """Vocabulary file in tiktoken's form. Default: the one made for the TL;DR world."""
    held_out: float = 0.05
    """Share of the prompts of --data that is kept for evaluation."""
    seed: int = 0
    """Seed of weights, row order and evaluation draws."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto is bfloat16 where the processor is fast at it. Weights are always float32."""
    compile: bool = False
    """Compile the model's blocks (torch.compile): a minute to begin with, for runs of wide models or many steps."""
    model: GPTConfig = field(default_factory=GPTConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    world: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        require(0 < self.held_out < 1, f"held_out is a share of the prompts, between 0 and 1, got {self.held_out}")
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63, got {self.seed}")
        require(self.save_every > 0, f"save_every must be positive, got {self.save_every}")
        nested = self.runs is None and self.data is not None and self.data.stem in ("sft", "dpo")
        require(
            not nested, f"{self.data} would put its runs inside of runs/sft or runs/dpo; choose a folder with --runs"
        )
        within = self.data and {self.data.resolve().parent} & {(self.folder / run).resolve() for run in ("sft", "dpo")}
        require(not within, f"{self.data} is a file of a run that would be made anew; copy it elsewhere first")

    @property
    def folder(self) -> Path:
        """Where the runs sft and dpo are."""
        return self.runs or Path("runs") / (self.data.stem if self.data else "")

    @property
    def source(self) -> str:
        """Where the rows come from, in words."""
        return str(self.data or WORLD)


NEEDS = (
    ("dpo", "--stage dpo"),
    ("held-out sft.on", "--data"),
    ("world", "no --data"),
    ("model.vocab-size", "no --vocabulary"),  # which has that size
)


def main(options: Options):
    """All of it: data, SFT, reference, DPO, evaluation."""
    options, session = begin(options)
    out = options.folder / options.stage
    with owner(options.folder):
        claim(out, options.overwrite, options.resume, options.folder / "sft")
        with session.phase("data"):
            data = read_data(options, session)
        if options.overwrite and not options.resume:
            abandon(out)  # now, lest it meet another reference after a stop in SFT
        sft(options, session, data, options.folder / "sft")
        if options.stage == "dpo":
            figures = dpo(options, session, data, options.folder / "sft", out)
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
    """The options with the vocabulary's size in the model's, and what all stages share."""
    tokenizer = load_tokenizer(options.vocabulary)
    options = replace(options, model=replace(options.model, vocab_size=tokenizer.n_vocab))
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
    if options.data is None:
        with dataset(WORLD, options.world, session.tokenizer, session.console.print) as folder:
            sft = tokenized(options, session, folder / "sft.jsonl")
            pairs = tokenized(options, session, folder / "train.jsonl") if options.stage == "dpo" else None
            test = list(read_jsonl(folder / "test.jsonl"))
        held_out = rows_of(tokenize(test, session.tokenizer, options.model.block_size)[0], test)
    else:
        rows = rereader(options.data)
        groups, skipped = tokenized(options, session, options.data, rows())
        require(groups.pairs or options.stage == "sft", f"{options.data}: DPO needs rows with chosen and rejected")
        held = every_kth_prompt(groups, options.held_out)
        held_out = rows_of(groups, rows(), held)
        sft = pairs = (groups.without(held), skipped)
    if not held_out:
        session.console.print("nothing is held out for evaluation: no prompt is left for it that the model can take")
    return Data(sft, pairs, held_out)


def tokenized(options: Options, session: Session, file: Path, rows: Iterable[dict] | None = None) -> Tokenized:
    """The rows of a file as token ids; how many are skipped, and why, is said. UserError if all are."""
    groups, skipped = tokenize(rows or read_jsonl(file), session.tokenizer, options.model.block_size)
    if skipped:
        some = f"{skipped.total()} of {len(groups.of_row)} rows"
        session.console.print(f"{file}: skipped {some}: {reasons_of(skipped)}", soft_wrap=True)
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
    config = fingerprint(options, session, "sft", packed)
    if out.exists() and options.stage == "dpo":
        before = read_config(out)
        odd = otherwise(before, config, options.source)
        if not odd:
            unknown = "; it does not say on which world" if "world" in config.keys() - before.keys() else ""
            session.console.print(f"SFT: {out} was trained before with these very options{unknown}")
            return
        message = f"{out} was trained {odd}; use --overwrite, or another --runs"
        require(options.overwrite or options.resume, message)
    torch.manual_seed(options.seed)
    model = GPT(options.model).to(session.device)
    session.console.print(f"SFT: {packed.num_scored:,} tokens to imitate, {model.num_parameters():,} parameters")
    with RunWriter(out, config, options.overwrite, options.resume, options.source) as writer:
        trainer = Trainer(session.fast(model), packed, options.sft, SFT(), session.dtype, options.seed)
        history = train_stage(session, "SFT", trainer, writer)
        figures = {"loss": mean_nll(model, held_out, session.tokenizer.pad)} if held_out else {}
        finish(session, writer, model, history, used, skipped, data.held_out, figures)


def dpo(options: Options, session: Session, data: Data, reference_path: Path, out: Path) -> dict:
    """Train the policy against its reference and evaluate the two; the closing figures."""
    reference = load_run(reference_path, session.device)
    groups, skipped = data.pairs
    with session.phase("data"):
        packed = PackedData(groups, session.tokenizer.pad, options.dpo.row_length)
    origin = {"path": str(reference_path), "hash": weights_hash(reference.model)}
    config = {**fingerprint(options, session, "dpo", packed), "reference": origin}
    torch.manual_seed(options.seed)  # whether or not this process has trained the SFT run too
    model = GPT(options.model).to(session.device)
    model.load_state_dict(reference.model.state_dict())  # pi = pi_ref: the first loss is ln 2
    session.console.print(f"DPO: {groups.used:,} pairs, beta {options.dpo.beta} against {reference_path}")
    with RunWriter(out, config, options.overwrite, options.resume, options.source) as writer:
        writer.keep_reference(reference)
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
        finish(session, writer, model, history, groups.used, skipped, data.held_out, figures)
    return figures


def fingerprint(options: Options, session: Session, stage: str, data: PackedData) -> dict:
    """What decides a stage's weights, and the world that they know: two runs that agree here are the same run."""
    return {
        "stage": stage,
        "model": asdict(options.model),
        stage: asdict(getattr(options, stage)),
        "seed": options.seed,
        "dtype": session.dtype_name,
        "data": data.fingerprint(),
        "vocabulary": session.tokenizer.fingerprint,
        **({} if options.data else {"world": world_hash()}),
    }
