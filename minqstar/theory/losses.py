"""SFT and DPO as pure functions of per-token log-probabilities. Sums, never means: a return is a sum."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minqstar.theory.qfunction import implicit_reward


def response_sums(values: Tensor, response: Tensor, count: int) -> Tensor:
    """Sums (R,) of per-token values (S,) by the response (S,) in [0, count) that each token belongs to."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, response, values)


def sft_loss(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood, nats, summed over the scored tokens (S,)."""
    return -token_logps.sum()


class DPOTerms(NamedTuple):
    """For N pairs or rankings, each (N,)."""

    loss: Tensor  # nats
    chosen_reward: Tensor  # the return of the implicit reward of the best response, reward units
    rejected_reward: Tensor  # the mean return of the others, reward units
    accuracy: Tensor  # the share of its pairs of responses whose returns are in order; equal ones are half right


def dpo_loss(
    token_logps: Tensor,
    ref_token_logps: Tensor | None,
    response: Tensor,
    sizes: Sequence[int],
    beta: float | Tensor,
    rejected_weight: float = 1.0,
) -> DPOTerms:
    """Eq. 8, 9: -log sigmoid(sum_t r_w - sum_t r_l), r = beta log(pi/pi_ref); of rankings -log P by Plackett-Luce.

    token_logps and ref_token_logps (S,) are nats; response (S,) numbers the responses, those of a ranking from the best
    on, one ranking after the other. sizes (N,) is how many responses each ranking has: 2 is a pair. beta may be one for
    each token (S,): a refiner and a generator have one each (Eq. 17, 18). Without ref_token_logps, log pi_ref = 0, it
    is the loss of CPL (arXiv 2310.13639), whose lambda is `rejected_weight`: what the others' returns count.
    """
    ref = torch.zeros_like(token_logps) if ref_token_logps is None else ref_token_logps
    returns = response_sums(implicit_reward(token_logps, ref, beta), response, sum(sizes))
    there = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    ranked = returns.new_full(there.shape, -torch.inf).masked_scatter(there.to(returns.device), returns)
    best, others = ranked[:, 0], ranked[:, 1:]
    loss = -plackett_luce(torch.cat((best[:, None], rejected_weight * others), dim=1))
    return DPOTerms(loss, best, _mean(others, there[:, 1:]), _in_order(ranked.detach(), there))


def _mean(values: Tensor, there: Tensor) -> Tensor:
    """The mean (N,) over those of the values (N, K) that are there."""
    there = there.to(values.device)
    return values.masked_fill(~there, 0.0).sum(-1) / there.sum(-1)


def _in_order(ranked: Tensor, there: Tensor) -> Tensor:
    """The share (N,) of pairs that are ranked (N, K) in the order of their values."""
    better, worse = torch.triu_indices(*2 * [ranked.shape[1]], offset=1)
    margin = ranked[:, better] - ranked[:, worse]
    return _mean((margin > 0).to(ranked.dtype) + 0.5 * (margin == 0), there[:, worse])


def plackett_luce(returns: Tensor) -> Tensor:
    """log P(y_1 > ... > y_K) = sum_k log(e^{S_k} / sum_{j>=k} e^{S_j}), nats, of returns S (..., K), the best first.

    -inf stands at the end of rankings that are shorter. Theorem 1 of arXiv 2404.12358 holds for this class of
    preferences too; K = 2 is Bradley-Terry (Eq. 1). ValueError for a ranking of fewer than two.
    """
    K = returns.shape[-1]
    missing = returns == -torch.inf
    if K < 2 or missing[..., 1].any():
        raise ValueError("a ranking needs two responses at the least")
    itself, ahead = torch.eye(K, dtype=torch.bool), torch.ones(K, K, dtype=torch.bool).triu(1)
    behind = ahead.to(returns.device) & ~missing[..., None, :]  # of each place k: the j > k that are there
    margins = torch.where(behind, returns[..., None, :] - returns[..., :, None], -torch.inf)  # S_j - S_k
    return -margins.masked_fill(itself.to(returns.device), 0.0).logsumexp(-1).sum(-1)


def chosen_nll(token_logps: Tensor, response: Tensor, sizes: Sequence[int]) -> Tensor:
    """The best responses' negative log-likelihood (N,), nats a token: the mean over the tokens of each.

    Added to the DPO loss it keeps the chosen ones likely (arXiv 2404.19733). Arguments as for `dpo_loss`.
    """
    best = torch.tensor([0, *sizes[:-1]]).cumsum(0).to(response.device)
    ones = torch.ones_like(token_logps)
    sums, lengths = (response_sums(values, response, sum(sizes))[best] for values in (-token_logps, ones))
    return sums / lengths
