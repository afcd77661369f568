"""Batch and model to per-token log-probabilities: the one path that policy and reference both take."""

import hashlib
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minqstar.errors import require
from minqstar.lm.lora import base_model
from minqstar.lm.model import GPT
from minqstar.training.data import Batch, Group, PackedData

LOGITS_AT_ONCE = 2**26  # elements: the head works on this many at a time, 256 MB in fp32
SOFTMAX_AT_ONCE = 2**22  # elements: of those the softmax makes so many fp32 ones at a time


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class TargetLogps(torch.autograd.Function):
    """log softmax(logits)[target] (S,), so d/dlogits = onehot(target) - softmax(logits).

    Between the passes only the logits (S, V) are kept, as the head made them: autograd would keep their log_softmax
    in fp32, and make a gradient in fp32.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        parts = zip(*(t.split(_rows(logits)) for t in (logits, target)), strict=True)
        return torch.cat([-F.cross_entropy(_precise(part), target, reduction="none") for part, target in parts])

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        logits, target = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        parts = zip(*(t.split(_rows(logits)) for t in (dlogits, logits, target, d[:, None])), strict=True)
        for out, part, target, d in parts:
            minus = _precise(part).softmax(-1).mul_(-d)
            out.copy_(minus.scatter_add_(-1, target[:, None], d))
        return dlogits, None


def _rows(logits: Tensor) -> int:
    return max(1, SOFTMAX_AT_ONCE // logits.shape[-1])


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()  # bfloat16 would sum the exponents in bfloat16


def _target_logps(model: GPT, hidden: Tensor, target: Tensor) -> Tensor:
    return TargetLogps.apply(model.logits(hidden), target)


def token_logps(model: GPT, batch: Batch) -> Tensor:
    """log pi(target | its prefix) of the batch's scored tokens, (S,) nats, fp32 (fp64 for a double model).

    The head sees scored positions only. Where their logits exceed LOGITS_AT_ONCE it takes them in chunks, whose
    logits are computed again in the backward pass rather than kept.
    """
    hidden = model(batch.tokens, batch.positions, batch.mask(), keep=batch.source, before=batch.before)  # (S, C)
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if len(hidden) <= size:
        return _target_logps(model, hidden, batch.target)
    chunks = zip(hidden.split(size), batch.target.split(size), strict=True)
    return torch.cat([checkpoint(_target_logps, model, h, t, use_reentrant=False) for h, t in chunks])


def usable(logps: Tensor) -> Tensor:
    """The log-probs; UserError if one is not finite, as with weights that are huge."""
    require(bool(logps.isfinite().all()), "log-probabilities overflow: the model's weights are too large; train anew")
    return logps


@torch.no_grad()
def score_packed(model: GPT, data: PackedData, tokens_at_once: int = 8192, progress=None) -> Tensor:
    """log pi of all scored tokens of a data set, (N,) nats, fp32, by its rows; `progress` is told each part."""
    device, logps = next(model.parameters()).device, []
    for batch in data.batches(range(len(data)), max(1, tokens_at_once // data.row_length)):
        logps.append(usable(token_logps(model, batch.to(device)).cpu()))
        if progress:
            progress(len(batch.tokens) / len(data))
    return torch.cat(logps)


def score_groups(model: GPT, groups: list[Group], pad: int, progress=None) -> list[list[Tensor]]:
    """log pi of every response token, nats: for each group a tensor (length,) a response."""
    data = PackedData(groups, pad, row_length=256)
    return by_group(score_packed(model, data, progress=progress), data, groups)


def by_group(logps: Tensor, data: PackedData, groups: list[Group]) -> list[list[Tensor]]:
    """The values (N,) of all scored tokens, as lists by group and response; 0 for tokens that are given."""
    answers, at = [[] for _ in groups], 0
    for member in data.order.tolist():
        group = groups[member]
        for place, response in enumerate(group.responses):
            own = torch.ones(len(response), dtype=torch.bool)
            own[list(group.given[place]) if group.given else []] = False
            values = logps.new_zeros(len(response))
            stop = at + int(own.sum())
            values[own] = logps[at:stop]
            answers[member].append(values)
            at = stop
    return answers


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 of every tensor's name, shape, type and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_hash(model: GPT) -> str:
    """The hash of all of a model's weights, without its adapter."""
    return tensors_hash(base_model(model).state_dict())


class ReferenceCache:
    """Per-token log-probs of a frozen reference on a packed data set, with the key of both."""

    def __init__(self, model: GPT, data: PackedData, dtype: torch.dtype, passes: list[np.ndarray], progress=None):
        """Score every row on the model's device, in the passes that training will make. No random number is drawn.

        Gradients are recorded, though nobody asks for them: without, a compiled model is another graph, which rounds
        otherwise, and an unchanged policy would not earn exactly 0.
        """
        device = next(model.parameters()).device
        self.key = (weights_hash(model), data.fingerprint)
        self.data = data
        self.logps = torch.empty(data.num_scored)
        with autocast(device, dtype):
            for rows in passes:
                logps = token_logps(model, data.batch(rows).to(device)).detach()
                self.logps[torch.from_numpy(data.scored(rows))] = usable(logps.float().cpu())
                if progress:
                    progress(len(rows))

    def check(self, reference_hash: str, data: PackedData):
        """UserError unless the cache was made by this reference on these tokens."""
        require(self.key[0] == reference_hash, "the cached log-probs come from another reference; compute them again")
        require(self.key[1] == data.fingerprint, "the cached log-probs belong to other data; compute them again")

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """The log-probs (S,) of the scored tokens of some rows, in the order of `data.batch(rows)`."""
        return self.logps[torch.from_numpy(self.data.scored(rows))]
