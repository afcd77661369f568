"""What others minimise where DPO takes a logistic loss of sums: each loss pure, with its equation and its paper.

Responses are numbered chosen, rejected, chosen, … as in `losses`. log pi and log pi_ref are sums over a response's
tokens, nats; beta is in reward units a nat.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minqstar.theory.qfunction import implicit_reward


def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected (P,) of values (2P,)."""
    return values.view(-1, 2).unbind(-1)


def ipo(log_pi: Tensor, log_ref: Tensor, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, Eq. 17), (P,) nats squared: (h_w - h_l - 1/(2 beta))^2, h = sum log(pi/pi_ref).

    Its minimiser on a population has E[h_w - h_l] = (p - 1/2)/beta of two responses with the preference p: the
    preference itself, where DPO has its log-odds. So it is pi* of a reward that is p, not of r.
    """
    chosen, rejected = pairs(log_pi - log_ref)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo(log_pi: Tensor, length: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (arXiv 2405.14734, Eq. 6), (P,) nats: -log sigmoid(beta (mean log pi_w - mean log pi_l) - gamma).

    A mean, and no reference: no function of the sums of a reward, so no soft optimum of any MDP with that reward.
    """
    chosen, rejected = pairs(log_pi / length)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def kto(log_pi: Tensor, log_ref: Tensor, desirable: Tensor, beta: float, baseline: Tensor) -> Tensor:
    """KTO (arXiv 2402.01306, Eq. 8), (R,): 1 - sigmoid(R - z) of a desirable response, 1 - sigmoid(z - R) of another.

    R is the implicit return, z = beta KL(pi || pi_ref), `baseline`, without a gradient. Labels are of single responses.
    """
    returns = implicit_reward(log_pi, log_ref, beta)
    return 1 - torch.sigmoid(torch.where(desirable, returns - baseline, baseline - returns))


def tdpo(log_pi: Tensor, log_ref: Tensor, kl: Tensor, beta: float, alpha: float) -> Tensor:
    """TDPO2 (arXiv 2404.11999, Eq. 18), (P,) nats: DPO's margin less alpha beta (KL_l - KL_w), KL_w without a gradient.

    `kl` (R,) is the sum over the response's states of KL(pi_ref || pi), nats.
    """
    chosen, rejected = pairs(implicit_reward(log_pi, log_ref, beta))
    of_chosen, of_rejected = pairs(beta * kl)
    return -F.logsigmoid(chosen - rejected - alpha * (of_rejected - of_chosen.detach()))


def whole_path_residual(log_pi: Tensor, log_ref: Tensor, value: Tensor, returns: Tensor, beta: float) -> Tensor:
    """TBRM (arXiv 2505.15311, Eq. 7), (R,) reward units squared: (V(s_0) + sum beta log(pi/pi_ref) - R)^2.

    The telescoping sum of Eq. 10 as a regression on returns R (R,); V(s_0) is the network's, beta logsumexp(logits).
    """
    return (value + implicit_reward(log_pi, log_ref, beta) - returns) ** 2


def step_residual(
    log_pi: Tensor, log_ref: Tensor, value: Tensor, next_value: Tensor, reward: Tensor, beta: float
) -> Tensor:
    """Eq. 10 as a regression step by step, (S,): (beta log(pi/pi_ref) + V(s) - V(s') - r)^2, with a reward a token."""
    return (implicit_reward(log_pi, log_ref, beta) + value - next_value - reward) ** 2


def gae(reward: Tensor, value: Tensor, lam: float) -> Tensor:
    """Generalised advantages (L,) of one response (arXiv 1506.02438, Eq. 16): sum_k lambda^k delta_{t+k}, no discount.

    delta_t = r_t + V_{t+1} - V_t; value (L+1,) ends in V(end) = 0.
    """
    delta, found, total = reward + value[1:] - value[:-1], [], torch.zeros((), dtype=value.dtype)
    for t in reversed(range(len(delta))):
        total = delta[t] + lam * total
        found.append(total)
    return torch.stack(found[::-1])


def reinforce(log_pi: Tensor, returns: Tensor) -> Tensor:
    """-R log pi, (R,): its mean over draws has minus the gradient of E R (Williams 1992)."""
    return -returns.detach() * log_pi


def leave_one_out(returns: Tensor) -> Tensor:
    """Returns (G, K) less the mean of the K - 1 others of their prompt (RLOO, arXiv 2402.14740, Eq. 10)."""
    K = returns.shape[-1]
    return (returns - returns.mean(-1, keepdim=True)) * K / (K - 1)


def ppo_clip(log_pi: Tensor, log_old: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """PPO (arXiv 1707.06347, Eq. 7), (S,): -min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = pi/pi_old."""
    rho = (log_pi - log_old).exp()
    return -torch.minimum(rho * advantage, rho.clamp(1 - epsilon, 1 + epsilon) * advantage)
