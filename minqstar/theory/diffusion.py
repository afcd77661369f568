"""Diffusion of Gaussian data under a quadratic reward: a denoising chain solved exactly (arXiv 2404.12358, Appendix B).

x_0 ~ N(m, S_0) in D dimensions becomes noise by x_t = sqrt(1 - b_t) x_{t-1} + sqrt(b_t) e. pi_ref is the exact reverse,
which is Gaussian: first x_T from nothing, then x_{t-1} from x_t. The reward r(x_0) = -x'Px/2 + q'x + c is paid at the
end. Every value is then such a quadratic too, every optimal step Gaussian, and Eq. 5, 6, 7 and 10 hold as they do for
tokens: V*(x_t) = beta log E exp(V*(x_{t-1}) / beta) over pi_ref's step, beta log(pi*/pi_ref) = V*(x_{t-1}) - V*(x_t).

Units: rewards and values in reward units, beta in reward units a nat, log-densities in nats. All float64.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from minqstar.theory.qfunction import check_beta


class Quadratic(NamedTuple):
    """-x'Px/2 + q'x + c, reward units."""

    P: Tensor  # (D, D), symmetric
    q: Tensor  # (D,)
    c: Tensor  # ()

    def at(self, x: Tensor) -> Tensor:
        """Its value (...,) at points (..., D)."""
        return -(x @ self.P * x).sum(-1) / 2 + x @ self.q + self.c

    def mean(self, m: Tensor, C: Tensor) -> Tensor:
        """Its expectation () under N(m, C)."""
        return self.at(m) - (self.P * C).sum() / 2

    def variance(self, m: Tensor, C: Tensor) -> Tensor:
        """Its variance () under N(m, C)."""
        slope, PC = self.q - self.P @ m, self.P @ C
        return (PC * PC.T).sum() / 2 + slope @ C @ slope


class Chain(NamedTuple):
    """Gaussian steps x_k ~ N(A_k x_{k-1} + d_k, S_k), k = 0 .. T: step 0 draws x_T from nothing, step k x_{T-k}.

    A distribution N(m, S) is a chain of step 0 alone.
    """

    A: Tensor  # (T+1, D, D); A_0 = 0
    d: Tensor  # (T+1, D)
    S: Tensor  # (T+1, D, D), positive definite


def gaussian(m: Tensor, S: Tensor) -> Chain:
    """N(m, S) as a chain of one step."""
    return Chain(torch.zeros_like(S)[None], m[None], S[None])


def factors(S: Tensor, what: str) -> Tensor:
    """The lower L (..., D, D) with S = LL'. ValueError names the first S that is not positive definite."""
    L, info = torch.linalg.cholesky_ex(S)
    bad = (info > 0) | ~S.isfinite().all(-1).all(-1)
    if bad.any():
        place = f" at step {torch.nonzero(bad)[0, 0]}" if bad.dim() else ""
        raise ValueError(f"{what} is not positive definite{place}")
    return L


def denoiser(data: Chain, noise: Tensor) -> Chain:
    """pi_ref: the exact reverse of noising `data` (a chain of one step), noise b_t (T,) in (0, 1].

    With the mean m_t and the covariance C_t of x_t, K = sqrt(1 - b_t) C_{t-1} C_t^-1: x_{t-1} given x_t is Gaussian
    with the mean m_{t-1} + K (x_t - m_t) and the covariance b_t C_{t-1} C_t^-1.
    """
    if not ((noise > 0) & (noise <= 1)).all():
        raise ValueError(f"noise must be above 0 and at most 1, got {noise.tolist()}")
    m, C = data.d[0], data.S[0]
    factors(C, "the covariance of the data")
    A, d, S = [], [], []
    for b in noise:
        keep = (1 - b).sqrt()
        m_next, C_next = keep * m, keep**2 * C + b * torch.eye(len(m), dtype=torch.float64)
        forgetting = torch.linalg.solve(C_next, C)  # C_t^-1 C_{t-1}; the two commute
        A.append(keep * forgetting)
        d.append(m - keep * forgetting @ m_next)
        S.append(b * forgetting)
        m, C = m_next, C_next
    return Chain(*map(torch.stack, ([torch.zeros_like(C), *A[::-1]], [m, *d[::-1]], [C, *S[::-1]])))


def solve_step(chain: Chain, k: int, value: Quadratic, beta: float) -> tuple[Quadratic, tuple[Tensor, Tensor, Tensor]]:
    """V* before step k, from `value`, that after it; and pi*'s A, d, S of the step.

    w = (I + S P/beta)^-1: pi*(x' | x) = N(w (A x + d + S q/beta), w S), and V*(x) is beta times the log of a Gaussian
    integral, a quadratic of A x + d. ValueError where I + S P/beta is not positive definite: the integral is infinite.
    """
    (A, d, S), (P, q, c) = (t[k] for t in chain), value
    L, one = factors(S, f"the covariance of step {k}"), torch.eye(len(d), dtype=torch.float64)
    M = factors(one + L.T @ P @ L / beta, f"I + S P / beta, at step {k},")
    w = torch.linalg.inv(one + S @ P / beta)
    Pw = P @ w  # symmetric: (P^-1 + S/beta)^-1
    constant = c - beta * M.diagonal().log().sum() + q @ w @ S @ q / (2 * beta)
    before = Quadratic(A.T @ Pw @ A, A.T @ (w.T @ q - Pw @ d), constant - d @ Pw @ d / 2 + q @ w @ d)
    return before, (w @ A, w @ (d + S @ q / beta), w @ S)


def solve_chain(chain: Chain, reward: Quadratic, beta: float) -> tuple[list[Quadratic], Chain]:
    """Soft Bellman backward induction: the T+2 values and pi*. values[k] is V* before step k: values[0] = V*(s_0), a
    number, values[1] = V*(x_T), and the last is the reward. pi* draws x_T too; a *fixed prior* keeps pi_ref's step 0.
    """
    check_beta(beta)
    values, steps = [reward], []
    for k in reversed(range(len(chain.d))):
        value, step = solve_step(chain, k, values[0], beta)
        values.insert(0, value)
        steps.insert(0, step)
    return values, Chain(*(torch.stack(parts) for parts in zip(*steps, strict=True)))


def draw(chain: Chain, before: Tensor, generator: Generator) -> Tensor:
    """Sampled chains (N, T+1, D), x_T first and x_0 last; `before` (N, D) is what comes before step 0, zeros."""
    L, x, drawn = factors(chain.S, "the covariance"), before, []
    for k in range(len(chain.d)):
        e = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = x @ chain.A[k].T + chain.d[k] + e @ L[k].T
        drawn.append(x)
    return torch.stack(drawn, 1)


def log_density(chain: Chain, x: Tensor) -> Tensor:
    """log p(x_k | x_{k-1}) of every step, (..., T+1) nats, of chains x (..., T+1, D)."""
    before = F.pad(x, (0, 0, 1, 0))[..., :-1, :]
    L = factors(chain.S, "the covariance")
    e = x - torch.einsum("kij,...kj->...ki", chain.A, before) - chain.d
    z = torch.linalg.solve_triangular(L, e[..., None], upper=False)[..., 0]
    return -(z**2).sum(-1) / 2 - L.diagonal(dim1=-2, dim2=-1).log().sum(-1) - x.shape[-1] / 2 * math.log(2 * math.pi)


def marginals(chain: Chain) -> list[tuple[Tensor, Tensor]]:
    """Mean (D,) and covariance (D, D) of x_T, ..., x_0, each as the chain draws it."""
    m, C, found = torch.zeros_like(chain.d[0]), torch.zeros_like(chain.S[0]), []
    for A, d, S in zip(*chain, strict=True):
        m, C = A @ m + d, A @ C @ A.T + S
        found.append((m, C))
    return found


def credit(chain: Chain, policy: Chain, beta: float) -> Tensor:
    """E[beta log(policy/chain)] (T+1,) of each step under the policy, reward units: beta times their KL.

    Of pi* that is E[V*(x_{t-1}) - V*(x_t)], the step's share of the reward: beta (KL(p*_{t-1} || p_{t-1}) -
    KL(p*_t || p_t)), of the noised data with and without exp(r/beta): what the noise of step t wipes out. A linear
    reward on data N(m, I) is owed in proportion to the signal prod(1 - b) that each step restores.
    """
    zero = (torch.zeros_like(chain.d[0]), torch.zeros_like(chain.S[0]))
    terms = []
    for (m, C), A, d, S, B, e, W in zip([zero, *marginals(policy)[:-1]], *chain, *policy, strict=True):
        shift = (B - A) @ m + e - d
        spread = (B - A) @ C @ (B - A).T + torch.outer(shift, shift) + W
        terms.append(beta * (torch.linalg.solve(S, spread).trace() - len(d) - W.logdet() + S.logdet()) / 2)
    return torch.stack(terms)


def linear_noise(T: int) -> Tensor:
    """DDPM's schedule (arXiv 2006.11239) in T steps: b_t (T,) from 0.1/T to 20/T, at most 0.999."""
    return torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64).clamp(max=0.999)


def cosine_noise(T: int) -> Tensor:
    """The cosine schedule (arXiv 2102.09672): the signal left at t is cos^2((t/T + 0.008) / 1.008 * pi/2)."""
    signal = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


def prior_luck(chain: Chain, values: list[Quadratic]) -> float:
    """What a fixed prior leaves to luck: the standard deviation of V*(x_T), reward units, as pi_ref draws x_T.

    On a chain with a fixed prior R = E V*(x_T) + luck + sum beta log(pi*/pi_ref), luck = V*(x_T) - E V*(x_T). The
    margin of two chains with their own x_T is off by sqrt(2) as much. It vanishes with the signal that x_T keeps, as
    beta |m* - m| sqrt(prod(1 - b)), m* and m the means of the data with and without exp(r/beta).
    """
    return values[1].variance(chain.d[0], chain.S[0]).sqrt().item()


def variance_cost(chain: Chain, values: list[Quadratic], beta: float) -> Tensor:
    """What the best policy with pi_ref's variances falls short of V*(s_0) by, (T+1,) reward units, by step.

    Its means are those of pi*: a quadratic V* asks for the same mean whatever the variance. What is lost at a step is
    (tr(S P) - beta log det(I + S P/beta)) / 2, second order in S: O(1/T) for all steps together.
    """
    SP = chain.S @ torch.stack([after.P for after in values[1:]])
    one = torch.eye(SP.shape[-1], dtype=torch.float64)
    return (SP.diagonal(dim1=-2, dim2=-1).sum(-1) - beta * torch.logdet(one + SP / beta)) / 2


def separate_loss(margins: Tensor) -> Tensor:
    """Diffusion-DPO's loss (arXiv 2311.12908), (...,) nats, of the steps' margins (..., K) of a pair, reward units.

    It draws one step and takes the mean outside of the sigmoid: E_k[-log sigmoid(K m_k)]. By Jensen's inequality that
    is never less than DPO's -log sigmoid(sum_k m_k), and equal where all steps have one margin.
    """
    return -F.logsigmoid(margins.shape[-1] * margins).mean(-1)
