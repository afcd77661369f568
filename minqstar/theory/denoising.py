"""Diffusion over a few values as a `TokenMDP` (arXiv 2404.12358, Appendix B): an action is the whole next state.

Noise turns a value x_0 of the data into x_1, ..., x_T, one step at a time. Denoising goes back: the first token is x_T,
the last is x_0, and pi_ref is the exact reverse of the noise, so that its x_t have the noise's distribution at every
t. Solver, identities, faults and tabular fit take such a chain as they take any other table.
"""

import torch
from torch import Tensor

from minqstar.theory.mdp import TokenMDP


def noise_kernel(num_values: int, amount: Tensor, absorbing: bool) -> Tensor:
    """log q(x_t | x_{t-1}) (N, N) nats: a value stays with probability 1 - amount, else it is drawn anew.

    Uniform noise draws among all N values; absorbing noise takes the last of them, the mask.
    """
    anew = torch.full((num_values,), 1 / num_values, dtype=torch.float64)
    if absorbing:
        anew = (torch.arange(num_values) == num_values - 1).double()
    return ((1 - amount) * torch.eye(num_values, dtype=torch.float64) + amount * anew).log()


def denoising_chain(data: Tensor, noise: Tensor, reward: Tensor, absorbing: bool) -> TokenMDP:
    """The chain of T steps that denoises `data`, log p_0 (X,) nats, and is paid r(x_0), `reward` (X,) reward units.

    `noise` (T,) in [0, 1] is each step's amount. Values are 0 .. X-1 and, with absorbing noise, X for the mask, which
    is never the data. State 0 is where x_T is drawn, from the noise's own last distribution; then come the values of
    x_T, of x_{T-1} and so on, N states a step. A *fixed prior* is the same table with state 0 left to chance.
    ValueError for noise or data that are no probabilities.
    """
    if not ((noise >= 0) & (noise <= 1)).all():
        raise ValueError(f"noise must be between 0 and 1, got {noise.tolist()}")
    if not data.logsumexp(-1).abs() < 1e-9:
        raise ValueError(f"the data must be a distribution, but its probabilities sum to {data.exp().sum():g}")
    X, T, N = len(data), len(noise), len(data) + absorbing
    log_p = torch.nn.functional.pad(data, (0, N - X), value=-torch.inf)
    backward = []  # log q(x_{t-1} | x_t), (N, N) with x_t first, of t = 1, 2, ..., T
    for amount in noise:
        joint = (log_p[:, None] + noise_kernel(N, amount, absorbing)).T
        after = joint.logsumexp(-1)
        never = after == -torch.inf  # such an x_t has no reverse: any law does
        backward.append(torch.where(never[:, None], log_p, joint - after[:, None]))
        log_p = after
    S = 1 + T * N
    drawn = (torch.arange(S)[:, None] + N - 1) // N  # how many values were drawn before a state; 0 in state 0
    next = (1 + drawn * N + torch.arange(N)).clamp(max=S)
    paid = torch.zeros(S, N, dtype=torch.float64)
    paid[-N:, :X] = reward
    log_ref = torch.cat((log_p[None], *reversed(backward)))
    return TokenMDP(torch.arange(N).repeat(S, 1), next, log_ref, paid)
