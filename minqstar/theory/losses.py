"""SFT and DPO as pure functions of per-token log-probabilities. Sums, never means: a return is a sum."""

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


def dpo_loss(token_logps: Tensor, ref_token_logps: Tensor, response: Tensor, count: int, beta: float) -> DPOTerms:
    """Eq. 8, 9: -log sigmoid(sum_t r_w - sum_t r_l), r = beta log(pi/pi_ref), for `count` / 2 pairs.

    token_logps and ref_token_logps (S,) are nats; response (S,) numbers the responses, 2p chosen and 2p+1 rejected.
    """
    rewards = response_sums(implicit_reward(token_logps, ref_token_logps, beta), response, count)
    chosen, rejected = rewards.view(-1, 2).unbind(-1)
    return DPOTerms(-F.logsigmoid(chosen - rejected), chosen, rejected)


def chosen_nll(token_logps: Tensor, response: Tensor, count: int) -> Tensor:
    """The chosen responses' negative log-likelihood (P,), nats a token: the mean over the tokens of each.

    Added to the DPO loss it keeps the chosen ones likely (arXiv 2404.19733). Arguments as for `dpo_loss`.
    """
    ones = torch.ones_like(token_logps)
    sums, lengths = (response_sums(values, response, count)[::2] for values in (-token_logps, ones))
    return sums / lengths
