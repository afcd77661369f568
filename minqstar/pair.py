"""Which models are asked: a finished run, or any policy with any reference, ours or of Hugging Face's kind."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from minqstar.errors import require
from minqstar.training.checkpoint import Run, load_run
from minqstar.training.scoring import weights_hash

BETA = 0.1  # reward units a nat, where nobody says it: the usual one of DPO on language


def load_pair(
    policy: Path | str, reference: Path | str | None = None, beta: float | None = None,
    device: str = "auto", dtype: str = "float32", chat: bool = False,
) -> Run:  # fmt: skip
    """A policy, with its own reference or with a given one: finished runs, or Hugging Face folders.

    Without `beta` it is that of the policy's DPO run, or 0.1. With `chat` a prompt is a user's turn in the chat
    template of the policy. Both models take the shorter context of the two. UserError if a folder is neither, is
    damaged, or if the vocabularies differ.
    """
    available = torch.cuda.is_available()
    require(device != "cuda" or available, "no CUDA device is available; use --device cpu")
    on, kind = torch.device("cuda" if available and device != "cpu" else "cpu"), getattr(torch, dtype)
    pair = load_run(Path(policy), on, kind)
    if reference is not None:
        of = load_run(Path(reference), on, kind)
        same = of.tokenizer.fingerprint == pair.tokenizer.fingerprint
        require(same, f"{policy} and {reference} have different vocabularies: their tokens cannot be compared")
        if beta is None and not pair.reference:
            beta = BETA
        for model, other in ((pair.model, of.model), (of.model, pair.model)):  # a text must fit the context of both
            model.config = replace(model.config, block_size=min(model.config.block_size, other.config.block_size))
        origin = {"path": str(reference), "hash": weights_hash(of.model)}
        pair = replace(pair, reference=of.model, config=pair.config | {"reference": origin})
    if beta is not None:
        require(1e-6 <= beta <= 1e6, f"beta must be between 1e-6 and 1e6, got {beta}")
        require(pair.reference is not None, f"beta {beta} needs a reference: give a DPO run, or a second model")
        pair = replace(pair, beta=beta)
    if chat:
        pair.tokenizer.start_chat()
    return pair


@dataclass(frozen=True)
class PairOptions:
    ref: Path | None = None
    """The reference, a run or a Hugging Face folder. Default: that of the policy's own DPO run."""
    beta: float | None = None
    """Reward units a nat. Default: that of the policy's own DPO run, or 0.1."""
    chat: bool = False
    """Take each prompt for a user's turn, in the chat template of the policy."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a Hugging Face model's weights; bfloat16 is faster and half as large, and its rewards are coarser."""

    def open(self, policy: Path) -> Run:
        """The pair, loaded."""
        return load_pair(policy, self.ref, self.beta, self.device, self.dtype, self.chat)

    def open_both(self, policy: Path) -> Run:
        """The same; UserError if there is no reference."""
        run_ = self.open(policy)
        require(run_.reference is not None, f"{policy} has no reference of its own; give one with --ref")
        return run_
