"""Slow, obviously right twins of the fast paths."""

import math

import torch
import torch.nn.functional as F

from minqstar.data import Group
from minqstar.model import GPT


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

    stream = [unit(model.wte.weight[t]) for t in tokens]
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
