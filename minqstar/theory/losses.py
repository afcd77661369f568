"""SFT and DPO as pure functions of per-token log-probabilities. Sums, never means: a return is a sum."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minqstar.theory.qfunction import implicit_reward


def response_sums(values: Tensor, response: Tensor, count: int) -> Tensor:
    """Sums (R,) of per-token values (S,) by the response (S,) in [0, count) that each token belongs to."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, response, values)


def sft_loss(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood, nats, summed over the scored tokens (S,)."""
    return -token_logps.sum()


class DPOTerms(NamedTuple):
    """For P pairs, each (P,): the loss in nats, and the returns of the implicit reward, in reward units."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def returns_of(
    token_logps: Tensor, ref_token_logps: Tensor | None, response: Tensor, count: int, beta: float | Tensor
) -> Tensor:
    """Returns (R,) of the implicit reward beta log(pi/pi_ref), reward units; without a reference of beta log pi."""
    ref = torch.zeros_like(token_logps) if ref_token_logps is None else ref_token_logps
    return response_sums(implicit_reward(token_logps, ref, beta), response, count)


def dpo_loss(
    token_logps: Tensor,
    ref_token_logps: Tensor | None,
    response: Tensor,
    count: int,
    beta: float | Tensor,
    rejected_weight: float = 1.0,
) -> DPOTerms:
    """Eq. 8, 9: -log sigmoid(sum_t r_w - sum_t r_l), r = beta log(pi/pi_ref), for `count` / 2 pairs.

    token_logps and ref_token_logps (S,) are nats; response (S,) numbers the responses, 2p chosen and 2p+1 rejected.
    beta may be one for each token (S,): a refiner and a generator have one each (Eq. 17, 18). Without ref_token_logps,
    log pi_ref = 0, it is the loss of CPL (arXiv 2310.13639), whose lambda is `rejected_weight`: sum r_l counts so much.
    """
    rewards = returns_of(token_logps, ref_token_logps, response, count, beta)
    chosen, rejected = rewards.view(-1, 2).unbind(-1)
    return DPOTerms(-F.logsigmoid(chosen - rejected_weight * rejected), chosen, rejected)


def chosen_nll(token_logps: Tensor, response: Tensor, count: int) -> Tensor:
    """The chosen responses' negative log-likelihood (P,), nats a token: the mean over the tokens of each.

    Added to the DPO loss it keeps the chosen ones likely (arXiv 2404.19733). Arguments as for `dpo_loss`.
    """
    ones = torch.ones_like(token_logps)
    sums, lengths = (response_sums(values, response, count)[::2] for values in (-token_logps, ones))
    return sums / lengths


def plackett_luce(returns: Tensor) -> Tensor:
    """log P(y_1 > ... > y_K) = sum_k log(e^{S_k} / sum_{j>=k} e^{S_j}), nats, of returns S (..., K), the best first.

    Theorem 1 of arXiv 2404.12358 holds for this class of preferences too; K = 2 is Bradley-Terry (Eq. 1).
    """
    K = returns.shape[-1]
    if K < 2:
        raise ValueError(f"a ranking needs two responses at the least, got {K}")
    ahead = returns[..., None, :] - returns[..., :, None]  # of each place k: S_j - S_k
    passed = torch.ones(K, K, dtype=torch.bool, device=returns.device).tril(-1)  # j < k are ranked already
    return -ahead.masked_fill(passed, -torch.inf).logsumexp(-1).sum(-1)


def ranking_loss(
    token_logps: Tensor, ref_token_logps: Tensor | None, response: Tensor, sizes: Sequence[int], beta: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The Plackett-Luce loss (N,) of N rankings, nats, and the returns (R,) of the implicit reward, reward units.

    As in `dpo_loss`, but ranking n has sizes[n] responses, numbered from the best on, one ranking after the other.
    """
    rewards = returns_of(token_logps, ref_token_logps, response, sum(sizes), beta)
    return torch.stack([-plackett_luce(ranked) for ranked in rewards.split(list(sizes))]), rewards
