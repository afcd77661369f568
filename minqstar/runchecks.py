"""What must hold of a trained run: its paths agree, and the paper's identities with them; and faults planted in it.

Any two softmaxes fulfil the identities of implied rewards, for any beta. So each check mixes the run's *paths*: what
is on one side comes from the packed, prefix-shared pass that training uses, and on the other from a plain forward pass
of each response alone, in float64 from the logits on.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minqstar.lm.model import GPT, GPTConfig
from minqstar.search.evaluator import Network
from minqstar.theory.claims import Result, gap
from minqstar.theory.qfunction import (
    expected_implicit_reward,
    implicit_reward,
    q_from_logits,
    reward_from_policy,
    soft_value,
)
from minqstar.training.data import Batch, Group, PackedData
from minqstar.training.scoring import LOGITS_AT_ONCE, by_group, score_packed, weights_hash

FP32 = 1e-4  # tolerance where two fp32 paths are compared, nats or reward units


@dataclass(frozen=True)
class RunClaim:
    """A policy and its reference, and what is said of them on some prompts with complete responses."""

    policy: GPT
    reference: GPT
    reference_hash: str  # as the run recorded it
    beta: float
    eos: int
    groups: list[Group]
    data: PackedData  # the groups, packed
    cache_shift: int = 0  # how many positions too late cached decoding writes; a fault

    @property
    def responses(self) -> list[tuple[list[int], list[int]]]:
        """Every response with its prompt."""
        return [(group.prompt, response) for group in self.groups for response in group.responses]


@torch.no_grad()
def plain_logits(model: GPT, prompt: list[int], response: list[int]) -> Tensor:
    """Logits (L, V) float64 of a response's tokens: one causal pass over it alone, no packing, no cache."""
    tokens = torch.tensor([prompt + response], device=next(model.parameters()).device)
    hidden = model(tokens)[0, len(prompt) - 1 : -1]
    return model.logits(hidden).double().cpu()


Pairs = list[tuple[list[int], list[int]]]  # prompts with their responses


def that_fit(pairs: Pairs, config: GPTConfig) -> Iterator[Pairs]:
    """The pairs in batches: the longest prompt and the longest response of one fit the context together.

    They may be those of different pairs. Nor have the log-probs of a batch more than LOGITS_AT_ONCE elements.
    """
    batch: Pairs = []
    for pair in pairs:
        prompt, response = (max(map(len, texts)) for texts in zip(*batch, pair, strict=True))
        size = (len(batch) + 1) * response * config.vocab_size
        if batch and (prompt + response > config.block_size or size > LOGITS_AT_ONCE):
            yield batch
            batch = []
        batch.append(pair)
    yield batch


def cached_logps(model: GPT, pairs: Pairs, shift: int) -> Iterator[Tensor]:
    """Of each pair all log-probs (L, V), nats, as decoding one token at a time with a KV cache sees them."""
    for batch in that_fit(pairs, model.config):
        yield from _cached_logps(model, batch, shift)


def _cached_logps(model: GPT, pairs: Pairs, shift: int) -> list[Tensor]:
    longest = max(len(response) for _, response in pairs)
    network = Network(model)
    first = network.start([prompt for prompt, _ in pairs], nodes=longest - 1, depth=max(1, longest - 1 + shift))
    places = network.places
    network.places = places._replace(lengths=places.lengths + shift, position=places.position + shift)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(response) for _, response in pairs], batch_first=True)
    steps = [first.logps[:, 0].cpu()]
    for node, token in enumerate(padded[:, :-1].T.to(network.device)):
        parents = torch.full((len(pairs), 1), node, device=network.device)
        steps.append(network.extend(parents, token[:, None]).logps[:, 0].cpu())
    whole = torch.stack(steps, dim=1)  # (R, longest, V)
    return [row[: len(response)] for row, (_, response) in zip(whole, pairs, strict=True)]


def check_run(c: RunClaim, advance: Callable[[], None] = lambda: None) -> list[Result]:
    """A run's group of checks: residuals relative to the largest term, over all responses; `advance` after each."""
    count = len(c.responses)
    packed, ref_packed, again = (
        [logps for group in by_group(score_packed(m, c.data), c.data, c.groups) for logps in group]
        for m in (c.policy, c.reference, c.reference)
    )
    of_cache = cached_logps(c.policy, c.responses, c.cache_shift)
    worst: dict[str, float] = {}

    def see(id: str, residual: float):
        worst[id] = residual if residual != residual else max(residual, worst.get(id, 0.0))

    for i, ((prompt, response), cached) in enumerate(zip(c.responses, of_cache, strict=True)):
        at, chosen = torch.arange(len(response)), torch.tensor(response)
        logits, ref_logits = (plain_logits(m, prompt, response) for m in (c.policy, c.reference))
        log_pi, log_ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
        V = F.pad(soft_value(q_from_logits(logits, c.beta), c.beta), (0, 1))  # the network's gauge; V(terminal) = 0
        plain, ref_plain = log_pi[at, chosen], log_ref[at, chosen]
        r = reward_from_policy(plain, ref_plain, V[:-1], V[1:], c.beta)
        implicit = implicit_reward(packed[i].double(), ref_packed[i].double(), c.beta)
        see("sums to one", gap(cached.double().logsumexp(-1), torch.zeros(len(response))))
        see("packed = plain", gap(packed[i].double(), plain))
        see("cached = plain", gap(cached[at, chosen].double(), plain))
        see("equal models, zero reward", implicit_reward(again[i], ref_packed[i], c.beta).abs().max().item())
        see("telescoping", gap(r.sum(), V[0] + implicit.sum(), V))
        left = (r + c.beta * ref_plain).cumsum(0) + V[1:]
        see("search values", gap(left, V[0] + c.beta * packed[i].double().cumsum(0), V))
        kl = F.kl_div(log_pi, log_ref, log_target=True, reduction="none").sum(-1)
        see("falling likelihood", gap(expected_implicit_reward(log_pi, log_ref, c.beta), -c.beta * kl))
        see("one scored EOS", float(response.count(c.eos) != 1 or response[-1] != c.eos))
        advance()
    scored = c.data.num_scored == sum(len(response) for _, response in c.responses)
    see("one scored EOS", float(not scored))
    see("recorded reference", float(weights_hash(c.reference) != c.reference_hash))
    equations = {"telescoping": "sum of 10", "search values": "12 = 13", "falling likelihood": "16"}
    exact = {"equal models, zero reward": 0.0, "one scored EOS": 0.0, "recorded reference": 0.0}
    tolerances = exact | {"falling likelihood": 1e-9}
    return [Result(id, equations.get(id, ""), count, value, tolerances.get(id, FP32)) for id, value in worst.items()]


def _changed(model: GPT, change: Callable[[str, Tensor], Tensor]) -> GPT:
    other = copy.deepcopy(model)
    other.load_state_dict({name: change(name, weight) for name, weight in model.state_dict().items()})
    return other


def _regrouped(c: RunClaim, change: Callable[[list[int]], list[int]]) -> RunClaim:
    groups = [Group(group.prompt, tuple(map(change, group.responses))) for group in c.groups]
    return replace(c, groups=groups, data=PackedData(groups, 0, c.data.row_length))


class Late(PackedData):
    """The hidden states behind those that should predict."""

    def batch(self, rows: np.ndarray) -> Batch:
        batch = super().batch(rows)
        last = (batch.source // self.row_length + 1) * self.row_length - 1
        return replace(batch, source=torch.minimum(batch.source + 1, last))


def _rounded(name: str, weight: Tensor) -> Tensor:
    """In eight bits, for others' weights are often of sixteen; seven powers of two, so that small ones are not lost."""
    return (128 * weight.float()).to(torch.float8_e4m3fn).to(weight.dtype) / 128


def _followed(c: RunClaim) -> GPT:
    policy = c.policy.state_dict()
    return _changed(c.reference, lambda name, weight: 0.95 * weight + 0.05 * policy[name])


RUN_FAULTS: dict[str, Callable[[RunClaim], RunClaim]] = {
    "run: mask off by one": lambda c: replace(c, data=Late(c.groups, 0, c.data.row_length)),
    "run: dropped EOS": lambda c: _regrouped(c, lambda response: response[:-1] if len(response) > 1 else [0]),
    "run: truncated taken for terminal": lambda c: _regrouped(c, lambda response: response[: (len(response) + 1) // 2]),
    "run: rounded reference": lambda c: replace(c, reference=_changed(c.reference, _rounded)),
    "run: reference moves with the policy": lambda c: replace(c, reference=_followed(c)),
    "run: cache one position late": lambda c: replace(c, cache_shift=1),
}
