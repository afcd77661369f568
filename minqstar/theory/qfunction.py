"""What logits and log-probabilities say about value, as pure functions of tensors (arXiv 2404.12358).

Units: Q, V, A and r in reward units, log-probabilities and logits in nats, beta > 0 in reward units a nat. The last
dimension (A) runs over actions, any others are batch. beta is one number, or a tensor over that batch: a temperature
for each state.

Gauge: a softmax does not change when a function of the state is added to its logits, so a policy fixes Q only up to
one. `q_from_logits` takes the network's own: Q = beta * logits, V = beta logsumexp(logits). In the gauge V = 0,
Q = beta log pi, and the reward of Lemma 1 is the implicit reward itself.

Everywhere ValueError for a beta that is not positive and finite or for shapes that do not match, and
FloatingPointError for NaN: none goes through in silence.
"""

import torch
from torch import Tensor


def check_beta(beta: float | Tensor):
    """ValueError unless beta is positive and finite; where each state has its own, it names the first that is not."""
    values = torch.as_tensor(beta, dtype=torch.float64)
    bad = ~((values > 0) & values.isfinite())
    if bad.any():
        place = f" at state {torch.nonzero(bad)[0, -1]}" if values.dim() else ""
        raise ValueError(f"beta must be positive and finite, got {values[bad][0]:g}{place}")


def per_action(beta: float | Tensor) -> float | Tensor:
    """A beta for each state (...,) made to broadcast over actions (..., 1); one number stays as it is."""
    return beta[..., None] if isinstance(beta, Tensor) else beta


def _check(beta: float, **tensors: Tensor):
    check_beta(beta)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes must match, got {shapes}")
    for name, tensor in tensors.items():
        if tensor.isnan().any():
            raise FloatingPointError(f"{name} is NaN at index {torch.nonzero(tensor.isnan())[0].tolist()}")


def soft_value(Q: Tensor, beta: float | Tensor) -> Tensor:
    """Eq. 6: V(s) = beta logsumexp_a Q(s,a)/beta, (..., A) -> (...)."""
    _check(beta, Q=Q)
    return beta * torch.logsumexp(Q / per_action(beta), dim=-1)


def log_policy(Q: Tensor, beta: float | Tensor) -> Tensor:
    """Eq. 5: log pi(a|s) = (Q(s,a) - V(s)) / beta, (..., A), nats."""
    return advantage(Q, beta) / per_action(beta)


def advantage(Q: Tensor, beta: float | Tensor) -> Tensor:
    """Q(s,a) - V(s) = beta log pi(a|s), (..., A): never positive, since V is the *soft* maximum."""
    return Q - soft_value(Q, beta)[..., None]


def q_from_logits(logits: Tensor, beta: float) -> Tensor:
    """Q(s,a) = beta * logits, (..., A), in the network's own gauge: its soft_value is beta logsumexp(logits)."""
    _check(beta, logits=logits)
    return beta * logits


def implicit_reward(logps: Tensor, ref_logps: Tensor, beta: float | Tensor) -> Tensor:
    """beta log(pi/pi_ref), of log-probabilities of any one shape (Eq. 10, 11); a tensor beta broadcasts to it.

    For pi = pi* it is the advantage over the reference, r(s,a) + V*(s') - V*(s). In the gauge V = 0 it is the reward
    itself (Lemma 1).
    """
    _check(beta, logps=logps, ref_logps=ref_logps)
    rewards = beta * (logps - ref_logps)
    _check(beta, rewards=rewards)  # log 0 - log 0 is NaN
    return rewards


def reward_from_policy(logps: Tensor, ref_logps: Tensor, value: Tensor, next_value: Tensor, beta: float) -> Tensor:
    """The reward for which pi is optimal against pi_ref and V is `value`: Eq. 10 solved for r(s,a).

    r(s,a) = beta log(pi/pi_ref)(a|s) + V(s) - V(s'), all of one shape. Any V is a gauge; next_value is V(s'), and 0
    where s' is terminal. By Lemma 1 there is no other such reward with that V.
    """
    _check(beta, logps=logps, ref_logps=ref_logps, value=value, next_value=next_value)
    return implicit_reward(logps, ref_logps, beta) + value - next_value


def expected_implicit_reward(log_pi: Tensor, log_ref: Tensor, beta: float | Tensor) -> Tensor:
    """Eq. 16: E_{a ~ pi_ref}[beta log(pi/pi_ref)(a|s)] = -beta KL(pi_ref || pi), (..., A) -> (...).

    Never positive, which is why the likelihoods of drawn responses fall during DPO. Where pi_ref is 0 the term is 0;
    where only pi is 0 the expectation is -inf. Without a reference E_p[beta log pi] is this with p for pi_ref, less
    beta times the entropy of p: after SFT on p it can only fall, from a random start it must rise first.
    """
    _check(beta, log_pi=log_pi, log_ref=log_ref)
    support = log_ref > -torch.inf
    ratio = torch.where(support, log_pi, 0.0) - torch.where(support, log_ref, 0.0)
    return beta * (log_ref.exp() * ratio).sum(-1)
