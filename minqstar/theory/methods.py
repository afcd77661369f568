"""What others minimise where DPO takes a logistic loss of sums: each loss pure, with its equation and its paper.

Responses are numbered chosen, rejected, chosen, … as in `losses`. log pi and log pi_ref are sums over a response's
tokens, nats; beta is in reward units a nat. Two more methods need no function of their own: CPL is `losses.dpo_loss`
without a reference, RPO is `dpo_loss` plus a weight times `losses.chosen_nll`. "Leads to" says what the loss of a
whole population has for its minimiser, with pairs drawn from pi_ref and labels by Bradley-Terry. The tests prove it.
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

    The paper's beta is tau. It leads to pi_ref exp(P / beta) / Z, with P(y) the probability that y beats a draw from
    pi_ref: pi* of the reward P, not of r. These are sums, as in the paper's equation. TRL divides each h by its
    number of tokens first: another loss wherever lengths differ.
    """
    chosen, rejected = pairs(log_pi - log_ref)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo(log_pi: Tensor, length: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (arXiv 2405.14734, Eq. 6), (P,) nats: -log sigmoid(beta (mean log pi_w - mean log pi_l) - gamma).

    A mean, and no reference. With gamma = 0 it leads to pi(y) = exp(|y| (R(y) + c) / beta), c so that the sum is 1:
    a response's return counts as often as it has tokens. gamma > 0 asks each pair for more than its log-odds.
    """
    chosen, rejected = pairs(log_pi / length)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def kto(log_pi: Tensor, log_ref: Tensor, desirable: Tensor, beta: float, baseline: Tensor) -> Tensor:
    """KTO (arXiv 2402.01306, section 4), (R,): 1 - sigmoid(R - z) if a response is desirable, else 1 - sigmoid(z - R).

    R is the implicit return, z the `baseline` beta KL(pi || pi_ref) as estimated, reward units: never below 0, and
    without a gradient. Labels are of single responses; both kinds have the weight 1 (lambda_D and lambda_U). It has
    no minimum: whatever is desirable less than half of the time goes to probability 0, for the sigmoid saturates.
    """
    returns, z = implicit_reward(log_pi, log_ref, beta), baseline.detach().clamp(min=0)
    return 1 - torch.sigmoid(torch.where(desirable, returns - z, z - returns))


def tdpo(log_pi: Tensor, log_ref: Tensor, kl: Tensor, beta: float, alpha: float) -> Tensor:
    """TDPO2 (arXiv 2404.11999, section 4), (P,) nats: DPO's margin less alpha beta (KL_l - KL_w), KL_w has no gradient.

    `kl` (R,) is the sum over the response's states of KL(pi_ref || pi), nats. TDPO1 has alpha = 1 and both gradients.
    TDPO1 leads to pi_ref exp(Q / beta) in each state, normalised, Q the plain value of going on by pi_ref: one step of
    improvement, where pi* takes all. Without KL_w's gradient a pull to pi_ref remains at that point.
    """
    chosen, rejected = pairs(implicit_reward(log_pi, log_ref, beta))
    of_chosen, of_rejected = pairs(beta * kl)
    return -F.logsigmoid(chosen - rejected - alpha * (of_rejected - of_chosen.detach()))


def whole_path_residual(log_pi: Tensor, log_ref: Tensor, value: Tensor, returns: Tensor, beta: float) -> Tensor:
    """TBRM (arXiv 2505.15311), (R,) reward units squared: (V(s_0) + sum beta log(pi/pi_ref) - R)^2.

    The telescoping sum of Eq. 10 as a regression on returns R (R,); V(s_0) is the network's, beta logsumexp(logits).
    The paper's loss is this over beta^2, in nats. It leads to pi*: noise of mean 0 in R does not move a regression.
    """
    return (value + implicit_reward(log_pi, log_ref, beta) - returns) ** 2


def step_residual(
    log_pi: Tensor, log_ref: Tensor, value: Tensor, next_value: Tensor, reward: Tensor, beta: float
) -> Tensor:
    """Eq. 10 as a regression step by step, (S,): (beta log(pi/pi_ref) + V(s) - V(s') - r)^2, with a reward a token.

    V(s') is 0 after EOS. It leads to pi*.
    """
    return (implicit_reward(log_pi, log_ref, beta) + value - next_value - reward) ** 2


def gae(reward: Tensor, value: Tensor, lam: float) -> Tensor:
    """Generalised advantages (L,) of one response (arXiv 1506.02438, Eq. 16): sum_k lambda^k delta_{t+k}, no discount.

    delta_t = r_t + V_{t+1} - V_t; value (L+1,) ends in V(end) = 0.
    """
    delta, found, total = reward + value[1:] - value[:-1], [], value.new_zeros(())
    for t in reversed(range(len(delta))):
        total = delta[t] + lam * total
        found.append(total)
    return torch.stack(found[::-1])


def reinforce(log_pi: Tensor, returns: Tensor) -> Tensor:
    """-R log pi, (R,), R without a gradient: its mean over draws has minus the gradient of E R (Williams 1992).

    With R less beta log(pi/pi_ref) it has that of the KL-penalised return: the penalty's own gradient has mean 0.
    """
    return -returns.detach() * log_pi


def leave_one_out(returns: Tensor) -> Tensor:
    """Returns (G, K), K > 1, less the mean of the others of their prompt: no bias (RLOO, arXiv 2402.14740)."""
    K = returns.shape[-1]
    return (returns - returns.mean(-1, keepdim=True)) * K / (K - 1)


def group_normalised(returns: Tensor) -> Tensor:
    """GRPO's advantages (arXiv 2402.03300, section 4.1): returns (G, K) less their mean, over their deviation.

    At pi* all KL-penalised returns are equal: 0/0, NaN. Near pi* whatever differs, rounding too, is blown up to size 1,
    so that no step gets smaller.
    """
    return (returns - returns.mean(-1, keepdim=True)) / returns.std(-1, keepdim=True)


def ppo_clip(log_pi: Tensor, log_old: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """PPO (arXiv 1707.06347, Eq. 7), (S,): -min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = pi/pi_old."""
    rho = (log_pi - log_old).exp()
    return -torch.minimum(rho * advantage, rho.clamp(1 - epsilon, 1 + epsilon) * advantage)
