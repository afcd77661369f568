"""What a search searches over: evaluators, from prefixes to log-probs, step rewards and values.

Every evaluator grows one tree of prefixes for each prompt. `start` makes node 0, the prompt itself; each `extend`
adds M nodes to every tree, numbered on from the last, each of them one token after a node that exists. Greedy
decoding is a tree without branches, a beam of width K adds K nodes a step, tree search adds its leaves.

A network (`Network`), its implicit reward (`ImplicitReward`), a proxy-tuned mix (`Proxy`) and an exact table
(`Table`) all are evaluators, and a search cannot tell which it has. B prompts, M new nodes, V vocabulary.
"""

import copy
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minqstar.errors import require
from minqstar.lm.fast import can_compile, packed
from minqstar.lm.memory import mask_bytes, require_memory
from minqstar.lm.model import GPT, CacheView, KVCache
from minqstar.theory.mdp import Solution, TokenMDP, hard_max, shape
from minqstar.theory.qfunction import check_beta, implicit_reward

SLOTS = 64  # a compiled graph is made for a multiple of so many
COMPILE = {"cpp_wrapper": True}  # of graphs this small the calls cost more in Python than the kernels


class Evaluation(NamedTuple):
    """What an evaluator says of M nodes of each tree."""

    logps: Tensor  # (B, M, V) log pi(a|s) of the next token, nats
    rewards: Tensor  # (B, M, V) what each token earns as a step of the search, reward units
    values: Tensor  # (B, M) value to go, reward units


class Evaluator(Protocol):
    beta: float  # reward units a nat
    by_likelihood: bool  # whether paths rank by their log-probability, which bounds whatever continues them
    nodes: int  # prefixes evaluated since `start`, in all trees, the prompts included
    calls: int  # model calls since `start`, its own included; of a table its lookups
    tokens: Tensor  # (B,) tokens forwarded for each prompt, its own included; of a table as if it were a model

    def start(self, prompts: list[list[int]], nodes: int, depth: int) -> Evaluation:
        """Begin a tree with room for `nodes` nodes below each of B prompts, at most `depth` tokens deep; M is 1."""

    def extend(self, parents: Tensor, tokens: Tensor) -> Evaluation:
        """Add M nodes to each tree: `tokens` (B, M) after the nodes `parents` (B, M).

        A parent of -1 says that nobody asks: the node counts, but not its token, and its evaluation means nothing.
        """


class Counting:
    """What an evaluator that answers by itself has been asked."""

    def _count_prompts(self, lengths: Tensor):
        self.lengths, self.tokens, self.calls = lengths, lengths.clone(), 1

    def _count(self, parents: Tensor):
        self.calls += 1
        self.tokens += (parents >= 0).sum(-1)

    @property
    def nodes(self) -> int:
        return len(self.tokens) + int((self.tokens - self.lengths).sum())


class Places(NamedTuple):
    """Where the nodes of B trees stand. A node is known by its slot in the cache, one of S; D tokens at most deep."""

    lengths: Tensor  # (B,) of the prompts
    in_prompt: Tensor  # (B, S) whether a slot holds a token of its row's prompt
    position: Tensor  # (B, S) of a token that follows the node
    token: Tensor  # (B, S) the node's own, a prompt's last
    path: Tensor  # (B, S, D) slots from the prompt on to the node, its own last, then 0

    def add(self, parents: Tensor, tokens: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Note M nodes, `tokens` after `parents` (B, M), in the slots `own` (M,).

        Their positions and the tokens before them (B, M), and their paths (B, M, D).
        """
        position, before = self.position.gather(1, parents), self.token.gather(1, parents)
        path = self.path.gather(1, parents[..., None].expand(*parents.shape, self.path.shape[-1]))
        path.scatter_(-1, (position - self.lengths[:, None])[..., None], own.expand_as(position)[..., None])
        self.position.index_copy_(1, own, position + 1)
        self.token.index_copy_(1, own, tokens)
        self.path.index_copy_(1, own, path)
        return position, before, path

    def more(self, count: int) -> "Places":
        """The same with room for `count` more nodes."""
        later = (torch.cat((t, torch.zeros_like(t[:, :1]).expand(-1, count, *t.shape[2:])), 1) for t in self[1:])
        return Places(self.lengths, *later)


def log_probs(model: GPT, hidden: Tensor) -> Tensor:
    """log pi (..., V) of the next token, nats, of hidden states (..., C)."""
    logits = model.logits(hidden)
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


Layers = list[tuple[Tensor, Tensor]]


def read_in_place(
    model: GPT, layers: Layers, places: Places, parents: Tensor, tokens: Tensor, own: Tensor, window: int
) -> Tensor:
    """log pi (B, M, V) after M new nodes. They look at the first `window` slots, through a mask."""
    position, before, path = places.add(parents, tokens, own)
    seen = places.in_prompt[:, None, :window].repeat(1, parents.shape[1], 1).scatter_(-1, path, True)
    return log_probs(model, model(tokens, position, seen[:, None], CacheView(layers, own, window), before=before))


def read_along_paths(
    model: GPT, layers: Layers, places: Places, parents: Tensor, tokens: Tensor, own: Tensor, prompt: int, deep: int
) -> Tensor:
    """log pi (B, M, V) after M new nodes. The `prompt` slots and those of their paths, `deep` at most, are gathered."""
    position, before, path = places.add(parents, tokens, own)
    B, M, _ = path.shape
    path = path[..., :deep]
    window = torch.cat((torch.arange(prompt, device=own.device).expand(B, prompt), path.flatten(1)), dim=-1)
    mine = torch.eye(M, dtype=torch.bool, device=own.device)[:, :, None]
    along = ((path > 0)[:, None] & mine).flatten(2)  # (B, M, M * deep)
    seen = torch.cat((places.in_prompt[:, None, :prompt].expand(B, M, prompt), along), dim=-1)
    return log_probs(model, model(tokens, position, seen[:, None], CacheView(layers, own, window), before=before))


class Network(Counting):
    """A model and its cache. The step reward is beta log pi, the value to go 0 (Eq. 13): rewards up to a node are
    beta times its log-probability, and no finished response below it can have more.

    A prompt's keys and values are stored once and seen by all nodes of its tree; a node's own are stored once, in its
    slot. A node attends to the prompt and to the slots on its path. While those are a good part of all slots so far
    (greedy decoding, beams) they are read in place, through a mask; else (large trees) they are gathered first.

    The weights are those of the moment when it is made. With `compiled` everything is read in place, by one compiled
    graph for each number of prompts, of nodes at once and of slots (rounded up): for much decoding of one shape.
    """

    by_likelihood = True

    def __init__(self, model: GPT, beta: float = 1.0, compiled: bool = False):
        check_beta(beta)
        self.model, self.beta = packed(model), beta
        self.device = model.wte.weight.device
        self.compiled = compiled and can_compile(self.device) and self.model is model  # what is packed, is so already
        self.read_in_place = torch.compile(read_in_place, dynamic=False, options=COMPILE) if self.compiled else None

    @torch.inference_mode()
    def start(self, prompts: list[list[int]], nodes: int, depth: int) -> Evaluation:
        lengths, config = [len(prompt) for prompt in prompts], self.model.config
        B, longest = len(prompts), max(lengths)
        require(min(lengths) > 0, "a prompt is empty: there is nothing to continue")
        fits = longest + depth <= config.block_size
        require(fits, f"a prompt of {longest} tokens leaves no room for {depth} new ones in {config.block_size}")
        outside = next((t for prompt in prompts for t in prompt if not 0 <= t < config.vocab_size), None)
        require(outside is None, f"a prompt holds the token {outside}; the vocabulary has {config.vocab_size}")
        tokens = torch.zeros(B, longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # what stands after a shorter prompt is never seen
            tokens[row, : lengths[row]] = torch.tensor(prompt)
        slots = longest + nodes
        if self.compiled:
            slots = SLOTS * math.ceil(slots / SLOTS)
        self.depth = depth
        self._require_memory(B, slots, nodes // depth)
        self.cache = KVCache(config, B, slots, self.device, self.model.wte.weight.dtype)
        everywhere = torch.arange(slots, device=self.device)
        self._count_prompts(torch.tensor(lengths, device=self.device))
        tokens, column = tokens.to(self.device), self.lengths[:, None]
        ends = torch.arange(B, device=self.device)[:, None] * longest + column - 1
        view = self.cache.view(everywhere[:longest], longest)
        last = self.model(tokens, cache=view, keep=ends[:, 0])[:, None]  # (B, 1, C)
        own = tokens.flatten()[ends].repeat(1, slots)
        path = torch.zeros(B, slots, depth, dtype=torch.long, device=self.device)
        self.places = Places(self.lengths, everywhere < column, column.repeat(1, slots), own, path)
        # node 0 is the prompt; node n takes the n-th slot after the longest prompt's last
        self.longest = self.used = longest
        return self._evaluation(log_probs(self.model, last))

    def _require_memory(self, B: int, slots: int, M: int):
        """UserError unless there is memory for the cache, the paths in it, and a step of M nodes in each tree."""
        config = self.model.config
        slot = 2 * config.n_layer * config.nkv * config.hs * self.model.wte.weight.element_size() + 8 * self.depth
        step = mask_bytes(B, M, slots) + 16 * B * M * config.vocab_size
        what = f"{B} trees of {slots:,} tokens, {M:,} at once,"
        require_memory(B * slots * slot + step, what, "the width, the draws, the leaves or max-new-tokens", self.device)

    @torch.inference_mode()
    def extend(self, parents: Tensor, tokens: Tensor) -> Evaluation:
        M = parents.shape[1]
        while self.used + M > self.cache.slots:
            more = self.cache.slots - self.longest + 1  # nodes, the prompt among them, double
            self.cache.add_slots(more)
            self.places = self.places.more(more)
        self._require_memory(len(parents), self.cache.slots, M)
        self._count(parents)
        own = torch.arange(self.used, self.used + M, device=self.device)
        parents = parents.clamp(min=0) + (self.longest - 1)
        what = (self.model, self.cache.layers, self.places, parents, tokens, own)
        self.used += M
        if self.compiled:
            return self._evaluation(self.read_in_place(*what, self.cache.slots))
        deep = int((self.places.position.gather(1, parents) - self.lengths[:, None]).max()) + 1
        if self.used <= 3 * (self.longest + M * deep):  # to gather costs a read, a write and another read
            return self._evaluation(read_in_place(*what, self.used))
        return self._evaluation(read_along_paths(*what, self.longest, deep))

    def _evaluation(self, logps: Tensor) -> Evaluation:
        # one NaN in a row makes all of its log-probs NaN
        require(not logps[..., 0].isnan().any(), "the model's logits are NaN: its weights are damaged, train anew")
        rewards = logps if self.beta == 1 else self.beta * logps
        return Evaluation(logps, rewards, torch.zeros_like(logps[..., 0]))


class Pooled:
    """Evaluators that grow the same trees side by side; `combine` makes one evaluation of theirs."""

    def __init__(self, *parts: Evaluator):
        sizes = [part.model.config.vocab_size for part in parts if isinstance(part, Network)]
        require(len(set(sizes)) <= 1, f"the vocabularies differ: {' and '.join(map(str, sizes))} tokens")
        self.parts = parts

    def start(self, prompts: list[list[int]], nodes: int, depth: int) -> Evaluation:
        return self.combine(*(part.start(prompts, nodes, depth) for part in self.parts))

    def extend(self, parents: Tensor, tokens: Tensor) -> Evaluation:
        return self.combine(*(part.extend(parents, tokens) for part in self.parts))

    @property
    def nodes(self) -> int:
        return self.parts[0].nodes

    @property
    def calls(self) -> int:
        return sum(part.calls for part in self.parts)

    @property
    def tokens(self) -> Tensor:
        return sum(part.tokens for part in self.parts)


class ImplicitReward(Pooled):
    """The policy's log-probs with the implicit reward beta log(pi/pi_ref) as the step reward, and value to go 0.

    What it ranks highest pays most by Eq. 10, which need not be likely: rewards of either sign bound nothing.
    """

    by_likelihood = False

    def __init__(self, policy: Evaluator, reference: Evaluator, beta: float):
        super().__init__(policy, reference)
        check_beta(beta)
        self.beta = beta

    def combine(self, policy: Evaluation, reference: Evaluation) -> Evaluation:
        return policy._replace(rewards=implicit_reward(policy.logps, reference.logps, self.beta))


class Proxy(Pooled):
    """Proxy tuning (Eq. 14): pi ∝ pi_base (pi_policy / pi_ref)^alpha, a small DPO pair steering a base model.

    By Eq. 15 that is pi_base exp(alpha A / beta), normalised, A the pair's implicit reward (the paper prints the
    exponent as beta (Q* - V*)). Alpha 0 is the base alone. A step reward is log pi of the mix, nats.
    """

    by_likelihood, beta = True, 1.0

    def __init__(self, base: Evaluator, policy: Evaluator, reference: Evaluator, alpha: float):
        super().__init__(base, policy, reference)
        require(-1000 <= alpha <= 1000, f"alpha must be between -1000 and 1000, got {alpha}")
        self.alpha = alpha

    def combine(self, base: Evaluation, policy: Evaluation, reference: Evaluation) -> Evaluation:
        ratio = torch.where(reference.logps > -torch.inf, policy.logps - reference.logps, 0.0)
        logps = torch.log_softmax(base.logps + self.alpha * ratio, dim=-1)
        return Evaluation(logps, logps, torch.zeros_like(base.values))


class Table(Counting):
    """An exact policy: an MDP (or B of one shape) solved by backward induction, in float64. Prompts are not read.

    With `guided` the step reward is r + beta log pi_ref and the value to go V* (Eq. 12); without it beta log pi* and 0
    (Eq. 13). Along any path the two sums differ by V*(s_0), so they are the same search.
    """

    by_likelihood = True

    def __init__(self, mdp: TokenMDP, solution: Solution, beta: float, vocab_size: int, guided: bool = False):
        one = bool(mdp.own.all()) and not isinstance(beta, Tensor)
        require(one, "a search needs one beta, and no state in which the environment draws")
        self.mdp, self.beta, self.vocab_size = mdp, beta, vocab_size
        self.log_pi = solution.log_pi if solution.log_pi.dim() == 3 else solution.log_pi[None]
        steps = mdp.reward + beta * mdp.log_ref if guided else beta * solution.log_pi
        values = solution.V if guided else torch.zeros_like(solution.V)
        self.steps, self.values = (t.view(len(self.log_pi), *t.shape[-n:]) for t, n in ((steps, 2), (values, 1)))

    def best_to_go(self) -> Tensor:
        """(B, S+1) the most that steps can still add from each state on, reward units; 0 in the terminal state.

        Without `guided` it is W(s) = beta max_y log pi*(y|s), that of the likeliest response, where V* is the soft
        maximum. With it, it is the heuristic for guided steps.
        """
        steps = torch.where(self.log_pi > -torch.inf, self.steps, 0.0)
        return hard_max(TokenMDP(self.mdp.token, self.mdp.next, self.log_pi, steps))[0]

    def shaped(self, phi: Tensor) -> "Table":
        """The same table, its steps shaped by phi (..., S+1) as in Definition 1; reward units, phi(terminal) = 0.

        Whole-path values all change by -phi(s_0). But the rewards up to a prefix now hold phi of where it leads: to
        follow the largest is A* with the heuristic phi, for responses that end in the terminal state. No step pays
        more than 0 just if phi is consistent.
        """
        table = copy.copy(self)
        table.steps = shape(TokenMDP(self.mdp.token, self.mdp.next, self.log_pi, self.steps), phi).reward
        table.values = self.values - phi
        return table

    def start(self, prompts: list[list[int]], nodes: int, depth: int) -> Evaluation:
        require(len(self.log_pi) in (1, len(prompts)), f"{len(prompts)} prompts for {len(self.log_pi)} tables")
        self.rows = torch.arange(len(prompts))[:, None] * (len(self.log_pi) > 1)
        self.state = torch.zeros(len(prompts), 1, dtype=torch.long)
        self._count_prompts(torch.tensor([len(prompt) for prompt in prompts]))
        return self._evaluation(self.state)

    def extend(self, parents: Tensor, tokens: Tensor) -> Evaluation:
        self._count(parents)
        state = self.state.gather(1, parents.clamp(min=0))
        known = state.clamp(max=self.mdp.num_states - 1)  # nothing follows the terminal state
        action = (self.mdp.token[known] == tokens[..., None]).long().argmax(-1)
        state = self.mdp.next[known, action]
        self.state = torch.cat((self.state, state), dim=1)
        return self._evaluation(state)

    def _evaluation(self, state: Tensor) -> Evaluation:
        last = self.mdp.num_states - 1
        known = state.clamp(max=last)
        token = self.mdp.token[known]
        place = torch.where((token >= 0) & (state <= last)[..., None], token, self.vocab_size)

        def over_vocabulary(values: Tensor) -> Tensor:
            spread = torch.full((*state.shape, self.vocab_size + 1), -torch.inf, dtype=torch.float64)
            return spread.scatter_(-1, place, values[self.rows, known])[..., :-1]

        logps, rewards = over_vocabulary(self.log_pi), over_vocabulary(self.steps)
        return Evaluation(logps, rewards, self.values[self.rows, state])
