"""Slow, obviously right twins of the fast paths."""

import math

import torch
import torch.nn.functional as F

from minqstar.lm.model import GPT
from minqstar.training.data import Group


def hidden_states(model: GPT, tokens: list[int]) -> torch.Tensor:
    """(T, C): one sequence, one position and one head at a time."""
    config = model.config
    hs = config.n_embd // config.n_head
    unit = lambda v: v / (v.pow(2).mean() + torch.finfo(v.dtype).eps).sqrt()  # noqa: E731

    def rotated(v: torch.Tensor, position: int) -> torch.Tensor:
        out = v.clone()
        for i in range(hs // 2):
            angle = position * 1e4 ** (-i / (hs // 2))
            c, s = math.cos(angle), math.sin(angle)
            out[i], out[i + hs // 2] = v[i] * c - v[i + hs // 2] * s, v[i] * s + v[i + hs // 2] * c
        return out

    units = [unit(model.wte.weight[t]) for t in tokens]
    share = model.smear if config.smear else torch.zeros(config.n_embd, dtype=units[0].dtype)
    stream = [x + share * (units[t - 1] if t else 0) for t, x in enumerate(units)]
    for block in model.blocks:
        qkv = [block.attn.c_attn.weight @ unit(x) for x in stream]
        after = []
        for t, x in enumerate(stream):
            heads = []
            for h in range(config.n_head):
                cut = lambda j, part, h=h, qkv=qkv: qkv[j][part * config.n_embd + h * hs :][:hs]  # noqa: E731
                q = rotated(unit(cut(t, 0)), t)
                scores = torch.stack([q @ rotated(unit(cut(j, 1)), j) / math.sqrt(hs) for j in range(t + 1)])
                weights = scores.softmax(0)
                heads.append(sum(w * cut(j, 2) for j, w in enumerate(weights)))
            x = x + block.attn.c_proj.weight @ torch.cat(heads)
            after.append(x + block.mlp.c_proj.weight @ F.relu(block.mlp.c_fc.weight @ unit(x)).square())
        stream = after
    return torch.stack([unit(x) for x in stream])


def response_logps(model: GPT, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log pi of each response token: a plain causal pass over prompt + response, alone, no packing, no cache."""
    tokens = torch.tensor([[*prompt, *response]])
    logps = model.logits(model(tokens))[0].log_softmax(-1)
    return torch.stack([logps[len(prompt) + i - 1, token] for i, token in enumerate(response)])


def group_logps(model: GPT, groups: list[Group]) -> list[list[torch.Tensor]]:
    return [[response_logps(model, group.prompt, response) for response in group.responses] for group in groups]


class NaiveTree:
    """Monte Carlo tree search from its definition: one prompt, one leaf at a time, prefixes in dictionaries.

    `ask(prefix)` gives {token: (log-prob, step reward)} and the value to go.
    """

    def __init__(self, ask, ends: tuple[int, ...], limit: int, config, beta: float):
        self.ask, self.ends, self.limit, self.config, self.beta = ask, ends, limit, config, beta
        self.edges, self.togo, self.order = {}, {}, []
        self.results = {}  # prefix -> the results of the simulations that came through, in order
        self.ended = {}  # finished response -> log-prob
        self.add(())
        cursor = ()
        while len(self.order) <= config.budget and not self.closed(()):
            prefix = cursor
            while True:
                prefix = (*prefix, self.choose(prefix))
                if prefix[-1] in ends or prefix not in self.edges:
                    break
            if prefix[-1] in ends:
                self.ended[prefix] = self.logp(prefix)
                self.bring_home(prefix, self.reward(prefix))
                cursor = ()
                continue
            self.add(prefix)
            first = not self.results
            rolls = (config.leaf == "rollout" or first) and not self.closed(prefix)
            cursor = prefix if rolls else ()
            if not rolls:
                self.bring_home(prefix, self.reward(prefix) + self.togo[prefix])

    def add(self, prefix):
        self.edges[prefix], self.togo[prefix] = self.ask(prefix)
        fitting = {token: edge for token, edge in self.edges[prefix].items() if token in self.ends}
        if len(prefix) == self.limit - 1 and fitting:
            self.edges[prefix] = fitting
        self.order.append(prefix)

    def logp(self, prefix):
        return sum(self.edges[prefix[:i]][token][0] for i, token in enumerate(prefix))

    def reward(self, prefix):
        return sum(self.edges[prefix[:i]][token][1] for i, token in enumerate(prefix))

    def closed(self, prefix):
        if prefix and prefix[-1] in self.ends:
            return prefix in self.ended or self.beaten(prefix)
        if len(prefix) == self.limit or (prefix and self.beaten(prefix)):
            return True
        return prefix in self.edges and all(self.closed((*prefix, token)) for token in self.edges[prefix])

    def beaten(self, prefix):
        return self.logp(prefix) <= max(self.ended.values(), default=-math.inf) + 1e-9

    def visits(self, prefix):
        return len(self.results.get(prefix, []))

    def value(self, prefix):
        if not self.visits(prefix):
            return self.reward(prefix) + self.togo[prefix]
        children = [(*prefix, token) for token in self.edges.get(prefix, {})]
        values = [self.value(child) for child in children if self.visits(child)]
        results = self.results[prefix]
        if self.config.backup == "mean" or not values:
            return sum(results) / len(results)
        if self.config.backup == "max":
            return max(values)
        return self.beta * math.log(sum(math.exp((v - max(values)) / self.beta) for v in values)) + max(values)

    def choose(self, prefix):
        seen = self.results.get((), [])
        low, high = min(seen, default=0.0), max(seen, default=0.0)
        scores = {}
        for token, (logp, _) in sorted(self.edges[prefix].items()):
            child = (*prefix, token)
            if not self.closed(child):
                value = self.value(child if self.visits(child) else prefix)
                value = min(max((value - low) / (high - low), 0), 1) if high - low > 1e-8 * self.beta else 0
                explore = math.exp(logp) * math.sqrt(max(1, self.visits(prefix))) / (1 + self.visits(child))
                scores[token] = value + self.config.c_puct * explore
        return next(token for token, score in scores.items() if score >= max(scores.values()) - 1e-9)

    def bring_home(self, prefix, result):
        for i in range(len(prefix) + 1):
            self.results.setdefault(prefix[:i], []).append(result)
