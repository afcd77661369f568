"""What training can be told.

python train.py                        # everything: data, SFT, DPO, evaluation against the exact Q*
python train.py --data prefs.jsonl     # the same on rows of prompt, chosen, rejected
python train.py --stage sft            # the reference alone

python train.py --data prefs.jsonl --sft-data answers.jsonl    # SFT on a file of its own
python train.py --reference runs/dpo --runs runs/second        # DPO against what another run has learned
python train.py --extend 500                                   # 500 steps more for the finished run
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minqstar.errors import require
from minqstar.lm.model import GPTConfig
from minqstar.lm.pretrained import is_pretrained
from minqstar.lm.tokenizer import DEFAULT_VOCABULARY
from minqstar.training.trainer import DPOConfig, SFTConfig
from minqstar.world.tldr import DataConfig

WORLD = Path("data/tldr")  # where the world's data set is


@dataclass(frozen=True)
class Options:
    """Train a Q-function: SFT, then DPO."""

    stage: Literal["sft", "dpo"] = "dpo"
    """What to train; dpo first trains the SFT run that it starts from, unless that exists."""
    data: Path | None = None
    """JSONL of prompt, chosen, rejected (for sft also prompt, completion). Default: the TL;DR world, generated."""
    sft_data: Path | None = None
    """JSONL for SFT alone, in place of --data or of the world's; rows whose prompt is held out are left out."""
    init: Path | None = None
    """A run whose model training starts from: SFT, or with --reference DPO. Default: random weights, the reference."""
    reference: Path | None = None
    """A run whose model is DPO's reference. Default: that of the SFT run, which is trained first if need be."""
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
    model: GPTConfig = field(default_factory=GPTConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    world: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        require(0 < self.held_out < 1, f"held_out is a share of the prompts, between 0 and 1, got {self.held_out}")
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63, got {self.seed}")
        require(0 <= self.extend <= 10**9, f"extend must be between 0 and a billion steps, got {self.extend}")
        require(self.save_every > 0, f"save_every must be positive, got {self.save_every}")
        nested = self.runs is None and self.data is not None and self.data.stem in ("sft", "dpo")
        require(
            not nested, f"{self.data} would put its runs inside of runs/sft or runs/dpo; choose a folder with --runs"
        )
        made = {(self.folder / stage).resolve() for stage in {self.stage, "sft" if self.has_sft else self.stage}}
        for path in filter(None, (self.data, self.sft_data)):
            within = path.resolve().parent in made
            require(not within, f"{path} is a file of a run that would be made anew; copy it elsewhere first")
        for path in filter(None, (self.init, self.reference)):
            ours = not is_pretrained(path)
            require(ours, f"{path} is a Hugging Face folder: it can be scored and searched; training starts from runs")
            other = path.resolve() not in made
            require(other, f"{path} would be made anew from itself; give another folder with --runs")

    @property
    def folder(self) -> Path:
        """Where the runs sft and dpo are."""
        return self.runs or Path("runs") / (self.data.stem if self.data else "")

    @property
    def has_sft(self) -> bool:
        """Whether SFT is a part of it: a reference that is given, or kept in a run to be extended, needs none."""
        return self.stage == "sft" or not (self.reference or self.extend)

    def source(self, stage: str) -> str:
        """Where the rows of a stage come from, in words."""
        return str((self.sft_data if stage == "sft" else None) or self.data or WORLD)


NEEDS = (
    ("dpo", "--stage dpo"),
    ("reference", "--stage dpo"),
    ("sft sft-data", "no --reference"),
    ("model vocabulary", "no --reference"),  # they are those of the run
    ("model vocabulary", "no --init"),
    ("overwrite", "no --extend"),
    ("held-out sft.on", "--data"),
    ("world", "no --data"),
    ("model.vocab-size", "no --vocabulary"),  # which has that size
)
