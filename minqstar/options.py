"""What training can be told.

python train.py                        # everything: data, SFT, DPO, evaluation against the exact Q*
python train.py --data prefs.jsonl     # the same on rows of prompt, chosen, rejected
python train.py --stage sft            # the reference alone

python train.py --data prefs.jsonl --sft-data answers.jsonl    # SFT on a file of its own
python train.py --reference runs/dpo --runs runs/second        # DPO against what another run has learned
python train.py --extend 500                                   # 500 steps more for the finished run

python train.py --init MODEL --data prefs.parquet              # DPO of somebody's model on somebody's data
python train.py --init MODEL --data prefs.parquet --plan       # how much memory and time that takes
"""

import itertools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from minqstar.errors import require
from minqstar.lm.borrowed import TOKENIZER
from minqstar.lm.lora import LoRAConfig
from minqstar.lm.model import GPTConfig
from minqstar.lm.pretrained import is_pretrained
from minqstar.lm.tokenizer import DEFAULT_VOCABULARY
from minqstar.training.data import PackedData
from minqstar.training.formats import FORMATS
from minqstar.training.session import Session
from minqstar.training.trainer import DPOConfig, SFTConfig
from minqstar.world.tldr import DataConfig, world_hash

WORLD = Path("data/tldr")  # where the world's data set is


@dataclass(frozen=True)
class Options:
    """Train a Q-function: SFT, then DPO."""

    stage: Literal["sft", "dpo"] = "dpo"
    """What to train; dpo first trains the SFT run that it starts from, unless that exists."""
    data: Path | None = None
    """Preference pairs (for sft also answers): JSON, JSONL or parquet, in any of the usual formats, perhaps compressed.
    Default: the TL;DR world, generated."""
    format: Literal[("auto", *FORMATS)] = "auto"
    """Of the rows of --data; auto looks at the first row, and says what it found."""
    sft_data: Path | None = None
    """Such a file for SFT alone, in place of --data or of the world's; rows whose prompt is held out are left out."""
    chat: bool = False
    """Take a prompt that is a plain text for a user's turn in the chat template. Lists of messages always are."""
    max_length: int = 0
    """Longest prompt with its response, tokens: longer rows are skipped. 0: what the model's context takes."""
    cache: Path = Path("data/cache")
    """Folder in which rows are kept once they are tokenised; it may be removed at any time."""
    init: Path | None = None
    """A run, or a Hugging Face folder, whose model training starts from: SFT, or with --reference DPO. DPO without SFT
    data takes a Hugging Face folder for its reference too. Default: random weights, the reference."""
    reference: Path | None = None
    """A run, or a Hugging Face folder, whose model is DPO's reference. Default: that of the SFT run, which is trained
    first if need be."""
    runs: Path | None = None
    """Folder for the runs sft and dpo. Default: runs, or runs/NAME with --data NAME.jsonl."""
    overwrite: bool = False
    """Replace runs that exist, and discard unfinished ones."""
    resume: bool = False
    """Continue an unfinished run from its last save; all other options as before."""
    extend: int = 0
    """Steps more for the finished run, against its own reference, the schedule stretched; other options as before."""
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
    recompute: bool = False
    """Compute each block's activations again in the backward pass rather than keep them: less memory, more time."""
    plan: bool = False
    """Train nothing: print parameters, bytes, tokens and minutes, before any memory is asked for."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    model: GPTConfig = field(default_factory=GPTConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    world: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        require(0 < self.held_out < 1, f"held_out is a share of the prompts, between 0 and 1, got {self.held_out}")
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63, got {self.seed}")
        require(0 <= self.extend <= 10**9, f"extend must be between 0 and a billion steps, got {self.extend}")
        require(self.save_every > 0, f"save_every must be positive, got {self.save_every}")
        nested = self.runs is None and self.data is not None and name_of(self.data) in ("sft", "dpo")
        require(
            not nested, f"{self.data} would put its runs inside of runs/sft or runs/dpo; choose a folder with --runs"
        )
        made = {(self.folder / stage).resolve() for stage in {self.stage, "sft" if self.has_sft else self.stage}}
        for path in filter(None, (self.data, self.sft_data)):
            within = path.resolve().parent in made
            require(not within, f"{path} is a file of a run that would be made anew; copy it elsewhere first")
        require(0 <= self.max_length <= 2**20, f"max_length must be between 0 and {2**20:,}, got {self.max_length}")
        started = self.stage == "dpo" or self.init
        require(not self.lora.rank or started, "LoRA adapts a model that is there: give one with --init")
        if self.stage == "dpo" and self.init and is_pretrained(self.init) and not (self.sft_data or self.extend):
            object.__setattr__(self, "reference", self.reference or self.init)
        one = not (self.lora.rank and self.init and self.reference and self.init.resolve() != self.reference.resolve())
        require(one, "with LoRA the model without its adapter is the reference: give --init or --reference, not both")
        for path in filter(None, (self.init, self.reference)):
            other = path.resolve() not in made
            require(other, f"{path} would be made anew from itself; give another folder with --runs")

    @property
    def folder(self) -> Path:
        """Where the runs sft and dpo are."""
        return self.runs or Path("runs") / (name_of(self.data) if self.data else "")

    @property
    def has_sft(self) -> bool:
        """Whether SFT is a part of it: a reference that is given, or kept in a run to be extended, needs none."""
        return self.stage == "sft" or not (self.reference or self.extend)

    def source(self, stage: str) -> str:
        """Where the rows of a stage come from, in words."""
        return str((self.sft_data if stage == "sft" else None) or self.data or WORLD)


def name_of(file: Path) -> str:
    """A file's name without its endings: prefs of prefs.jsonl.gz."""
    return Path(file.stem).stem if file.suffix in (".gz", ".zst") else file.stem


# The usual values for a model that others have trained: small steps, no repetition.
SMALL_STEPS = {"matrices": "adamw", "min_steps": 0, "batch_tokens": 16384, "micro_tokens": 1024, "row_length": 1024}
FINE_TUNING = {
    "sft": SFTConfig(**SMALL_STEPS, epochs=1.0, lr=1e-5, adam_lr=1e-5),
    "dpo": DPOConfig(**SMALL_STEPS, lr=2e-6, adam_lr=2e-6, beta=0.1),
    "max_length": 1024,
}


def defaults(args: list[str]) -> Options:
    """What holds where the command line says nothing: other values if it names a model that others have trained."""
    named = [value for name, value in itertools.pairwise(args) if name in ("--init", "--reference")]
    named += [word.partition("=")[2] for word in args if word.startswith(("--init=", "--reference="))]
    borrowed = any((Path(value) / TOKENIZER).is_file() for value in named)
    return Options(**FINE_TUNING) if borrowed else Options()


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
        "chat": session.tokenizer.chat,
        "lora": asdict(options.lora) if options.lora.rank and stage == options.stage else None,
        **({"world": world_hash()} if options.source(stage) == str(WORLD) else {}),
    }


NEEDS = (
    ("dpo", "--stage dpo"),
    ("reference", "--stage dpo"),
    ("model vocabulary", "no --init"),  # they are those of the run
    ("model vocabulary", "no --reference"),
    ("sft sft-data", "no --reference"),
    ("overwrite", "no --extend"),
    ("held-out sft.on format", "--data"),
    ("lora.alpha lora.on", "--lora.rank"),
    ("world", "no --data"),
    ("model.vocab-size", "no --vocabulary"),  # which has that size
)
