"""What the league's methods minimise: the losses of `theory/methods`, on the batches of the one training loop."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minqstar.lm.model import GPT, GPTConfig
from minqstar.theory.losses import plackett_luce, response_sums
from minqstar.theory.methods import kto, pairs, step_residual, tdpo, whole_path_residual
from minqstar.training.data import Batch, PackedData
from minqstar.training.groups import ranges
from minqstar.training.scoring import ReferenceCache
from minqstar.training.trainer import Objective


class OfSums(Objective):
    """A loss of log pi and log pi_ref, summed over each response, and of the responses' lengths, all (R,).

    Without a cache log pi_ref is 0.
    """

    def __init__(self, cache: ReferenceCache | None, loss: Callable[[Tensor, Tensor, Tensor], Tensor]):
        self.cache, self.loss = cache, loss

    def units(self, batch: Batch) -> int:
        return len(batch.sizes)

    def sums(self, token_logps: Tensor, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        ref = self.cache[rows].to(token_logps.device) if self.cache else torch.zeros_like(token_logps)
        columns = (token_logps, ref, torch.ones_like(token_logps))
        return {"loss": self.loss(*(by_response(of, batch) for of in columns)).sum()}


class Logits(NamedTuple):
    """Of the policy and of its reference at the scored tokens, fp32."""

    policy: Tensor  # (S, V)
    reference: Tensor  # (S, V)


class OfStates(Objective):
    """Objectives that read whole distributions, or values, at each state; the reference is run beside the policy."""

    def __init__(self, reference: GPT, beta: float):
        self.reference, self.beta = reference, beta

    def read(self, model: GPT, batch: Batch) -> Logits:
        seen = (batch.tokens, batch.positions, batch.mask())
        how = {"keep": batch.source, "before": batch.before}
        with torch.no_grad():
            reference = self.reference.logits(self.reference(*seen, **how))
        return Logits(model.logits(model(*seen, **how)).float(), reference.float())

    def logps(self, read: Logits, batch: Batch) -> tuple[Tensor, Tensor]:
        """log pi and log pi_ref (S,) of the scored tokens."""
        taken = batch.target[:, None]
        return tuple(logits.gather(1, taken)[:, 0] - logits.logsumexp(-1) for logits in read)

    def units(self, batch: Batch) -> int:
        return len(batch.sizes)


class TDPO(OfStates):
    """TDPO2: a KL of every state beside the sums."""

    def __init__(self, reference: GPT, beta: float, alpha: float):
        super().__init__(reference, beta)
        self.alpha = alpha

    def sums(self, read: Logits, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        log_pi, log_ref = (by_response(of, batch) for of in self.logps(read, batch))
        kl = by_response(divergence(read.reference, read.policy), batch)
        return {"loss": tdpo(log_pi, log_ref, kl, self.beta, self.alpha).sum()}


class KTO(OfStates):
    """KTO on the responses of pairs, as if nobody knew which belong together.

    Its baseline, beta KL(pi || pi_ref), is summed over the states of the batch's responses, a mean over these.
    """

    def units(self, batch: Batch) -> int:
        return sum(batch.sizes)

    def sums(self, read: Logits, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        log_pi, log_ref = (by_response(of, batch) for of in self.logps(read, batch))
        desirable = (torch.arange(len(log_pi)) % 2 == 0).to(log_pi.device)
        with torch.no_grad():
            baseline = self.beta * by_response(divergence(*read), batch).mean()
        return {"loss": kto(log_pi, log_ref, desirable, self.beta, baseline).sum()}


class Residual(OfStates):
    """Eq. 10 as a regression on rewards that somebody measured, of whole responses (TBRM) or of every step.

    The network's own value is V(s) = beta logsumexp(logits), in the gauge in which the reference's is 0. `rewards`
    (N,) are of the scored tokens of `data`, by its rows; `returns` (M,) of its responses, with their noise.
    """

    def __init__(self, reference: GPT, beta: float, data: PackedData, rewards: Tensor, returns: Tensor | None):
        super().__init__(reference, beta)
        self.data, self.rewards, self.returns = data, rewards, returns
        self.before = np.cumsum(data.responses_in_row) - data.responses_in_row  # responses before each row

    def units(self, batch: Batch) -> int:
        return len(batch.target) if self.returns is None else sum(batch.sizes)

    def sums(self, read: Logits, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        log_pi, log_ref = self.logps(read, batch)
        value = self.beta * (read.policy.logsumexp(-1) - read.reference.logsumexp(-1))
        first, last = ends(batch)
        if self.returns is not None:
            mine = ranges(self.before[rows], self.data.responses_in_row[rows])
            of_responses = (by_response(log_pi, batch), by_response(log_ref, batch), value[first])
            returns = self.returns[torch.from_numpy(mine)].to(value.device)
            return {"loss": whole_path_residual(*of_responses, returns, self.beta).sum()}
        following = torch.cat((value[1:], value[:1])).masked_fill(last, 0.0)
        rewards = self.rewards[torch.from_numpy(self.data.scored(rows))].to(value.device)
        return {"loss": step_residual(log_pi, log_ref, value, following, rewards, self.beta).sum()}


class Headed(GPT):
    """A transformer that gives one number more of each hidden state: a return, or a value, in reward units."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.head = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    @classmethod
    def like(cls, model: GPT) -> "Headed":
        """With the weights of a model, and a head that says 0."""
        headed = cls(model.config)
        headed.load_state_dict(model.state_dict(), strict=False)
        return headed

    def numbers(self, batch: Batch, keep: Tensor) -> Tensor:
        """Of the hidden states (N,) at flat indices `keep` (N,), fp32."""
        hidden = self(batch.tokens, batch.positions, batch.mask(), keep=keep, before=batch.before)
        return self.head(hidden).float()[:, 0]


class RewardHead(Objective):
    """Bradley-Terry on what a head says of whole responses: an explicit reward model (Eq. 1)."""

    def read(self, model: Headed, batch: Batch) -> Tensor:
        return model.numbers(batch, batch.source[ends(batch)[1]] + 1)

    def units(self, batch: Batch) -> int:
        return len(batch.sizes)

    def sums(self, returns: Tensor, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        return {"loss": -plackett_luce(torch.stack(pairs(returns), dim=-1)).sum()}


def by_response(values: Tensor, batch: Batch) -> Tensor:
    """Sums (R,) of values (S,) of the scored tokens."""
    return response_sums(values, batch.response, sum(batch.sizes))


def ends(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which of the scored tokens (S,) are the first, and which are the last, of their response."""
    change = batch.response.diff() != 0
    edge = change.new_ones(1)
    return torch.cat((edge, change)), torch.cat((change, edge))


def divergence(of: Tensor, other: Tensor) -> Tensor:
    """KL (S,), nats, of two policies given as logits (S, V)."""
    log_p, log_q = of.log_softmax(-1), other.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def prefix_numbers(model: Headed, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the head says before each scored token (S,), and after each response's last (R,)."""
    _, last = ends(batch)
    numbers = model.numbers(batch, torch.cat((batch.source, batch.source[last] + 1)))
    return numbers[: len(batch.source)], numbers[len(batch.source) :]


def token_credit(before: Tensor, after: Tensor, batch: Batch) -> Tensor:
    """Differences (S,) of the head's numbers along prefixes: they sum to the last one less the prompt's."""
    following = torch.cat((before[1:], before[:1]))
    following[ends(batch)[1]] = after
    return following - before


def noisy_returns(rewards: Tensor, data: PackedData, noise: np.random.Generator) -> tuple[Tensor, Tensor]:
    """True rewards (N,) and returns (M,) by the data's rows, as a labeller measures them: with Gumbel noise a response.

    A labeller who compares such returns has Bradley-Terry preferences (Eq. 1), so a number says what a label orders.
    Each step of a response bears its share of a noise of the same variance.
    """
    lengths = torch.tensor([len(response) for g in data.order for response in data.groups[int(g)].responses])
    returns = torch.stack([part.sum() for part in rewards.split(lengths.tolist())])
    sd = np.pi / np.sqrt(6)
    returns = returns + torch.from_numpy(noise.gumbel(size=len(returns)) - np.euler_gamma).float()
    per_step = (sd / lengths.double().sqrt()).repeat_interleave(lengths).numpy()
    return rewards + torch.from_numpy(noise.normal(size=len(rewards)) * per_step).float(), returns
