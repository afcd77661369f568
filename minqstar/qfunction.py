"""What a policy and a reference say about value, as pure functions of log-probabilities (arXiv 2404.12358)."""

from torch import Tensor


def implicit_reward(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """beta log(pi/pi_ref), reward units, of log-probabilities in nats of any one shape (Eq. 10, 11).

    For pi = pi* it is the advantage A*(s,a) = Q*(s,a) - V*(s) taken against the reference: r(s,a) + V*(s') - V*(s).
    In the gauge V = 0 it is the reward itself (Lemma 1).
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if logps.shape != ref_logps.shape:
        raise ValueError(f"log-probs of policy {tuple(logps.shape)} and reference {tuple(ref_logps.shape)} must match")
    return beta * (logps - ref_logps)
