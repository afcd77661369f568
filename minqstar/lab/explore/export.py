"""What the page knows: a post's token MDP whole, what the networks say at many of its prefixes, texts and searches.

All of it is plain JSON. The page solves the MDP itself; what comes from the networks is computed here.
"""

import heapq
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minqstar.ask import QFunction
from minqstar.errors import require, visible
from minqstar.lab.findings.lab import log_policies
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import decode, greedy
from minqstar.search.evaluator import Evaluation, Network
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.search.tree import NONE, Tree
from minqstar.show import prompt_text, several_lines
from minqstar.theory.mdp import TokenMDP
from minqstar.theory.qfunction import expected_implicit_reward
from minqstar.training.formats import answers_of
from minqstar.world.grammar import EPS, payments
from minqstar.world.posts import Post, read_post
from minqstar.world.slots import edited
from minqstar.world.tldr import World

RIVALS = 6  # of a token, the likeliest that could stand in its place
PREFIXES = 1200  # at which the page knows what the networks say, the likeliest under the world's pi_ref
MADE, LONGEST = 96, 64  # nodes of the tree search, and tokens of a searched response
KINDS = ("right", "wrong", "clause", "filler")


def rounded(values: Tensor | Sequence[float]) -> list:
    """Four decimals, more than the page shows; null for what is not finite."""
    values = values.tolist() if isinstance(values, Tensor) else values
    return [rounded(v) if isinstance(v, list) else round(v, 4) if abs(v) < 1e30 else None for v in values]


def one_line(q: QFunction, token: int) -> str:
    """A token's text by itself."""
    return several_lines(q.tokenizer.texts_of([token])[0]).replace("\n", "")


def in_html(data: dict) -> str:
    """JSON that can stand inside of a page's <script>: it holds no < and ends no line."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


Text = str | list[dict]  # or a conversation


def response_of(q: QFunction, prompt: Text, name: str, response: Text) -> dict:
    """A response token by token: log-probs of both models, and of the tokens that could stand in its place.

    `entropy` is the policy's, `kl` is KL(pi_ref || pi), both of the next token, nats. A text is taken as complete. At
    `given` places somebody else wrote the tokens. UserError if it cannot be scored.
    """
    begin, (ids,), given, _ = q.group(prompt, [response])
    both = [log_policies(model, [begin], [ids]).float().cpu() for model in (q.run.model, q.run.reference)]
    width = min(t.shape[-1] for t in both)  # of models whose tables differ in what stands for no text
    pi, ref = (t[:, :width] for t in both)
    here = torch.tensor(ids)[:, None]
    top = pi.topk(min(RIVALS, width)).indices
    texts = {i: one_line(q, i) for i in set(top.flatten().tolist())}
    return {
        "name": name,
        "ids": ids,
        "given": list(*given),
        "tokens": list(map(several_lines, q.tokenizer.texts_of(ids))),
        "logp": rounded(pi.gather(1, here)[:, 0]),
        "ref": rounded(ref.gather(1, here)[:, 0]),
        "entropy": rounded(-(pi.exp() * pi.masked_fill(pi == -torch.inf, 0.0)).sum(-1)),
        "kl": rounded(-expected_implicit_reward(pi, ref, 1.0)),
        "rivals": [
            [[i, texts[i], *rounded([p[i].item(), r[i].item()])] for i in best]
            for best, p, r in zip(top.tolist(), pi, ref, strict=True)
        ],
    }


def world_of(q: QFunction, world: World, post: Post, responses: list[list[int]]) -> dict:
    """The post's token MDP with the knobs' places in it, and what the networks say at many prefixes."""
    automaton = world.automata[post.scenario]
    mdp = automaton.mdp([post])
    real = arcs_of(mdp)
    at0, at1 = (automaton.masses([post], eps)[0] for eps in (0.0, 1.0))
    pays = [["" for _ in arcs] for arcs in real]
    for kind in KINDS:
        one = automaton.mdp([post], paid={name: float(name == kind) for name in ("", *KINDS)}).reward[0]
        for s, arcs in enumerate(real):
            pays[s] = [kind if one[s, a] else pay for a, pay in zip(arcs, pays[s], strict=True)]

    def ragged(table: Tensor) -> list[list]:
        return [table[s, arcs].tolist() for s, arcs in enumerate(real)]

    ids = sorted({i for line in ragged(mdp.token) for i in line})
    return {
        "token": ragged(mdp.token),
        "next": ragged(mdp.next),
        "mass": [[[at0[s, a].item(), at1[s, a].item()] for a in arcs] for s, arcs in enumerate(real)],
        "pays": pays,
        "kind": automaton.kind,
        "text": {i: one_line(q, i) for i in ids},
        "knobs": {"beta": q.beta, "eps": EPS, "paid": payments()},
        "learned": learned_of(q, world, post, mdp, responses),
    }


def arcs_of(mdp: TokenMDP) -> list[list[int]]:
    """The real actions of each state: the page knows them by their places here."""
    return [torch.nonzero(line >= 0).flatten().tolist() for line in mdp.token]


def prefixes(mdp: TokenMDP, paths: list[list[int]], most: int) -> list[tuple[int, int, int]]:
    """Nodes (parent, place of the arc, state) of a tree of prefixes, the root first.

    It holds some paths of arcs and each step aside of them, the likeliest way to each state, and then the likeliest
    prefixes of all.
    """
    real, nodes, known = arcs_of(mdp), [(-1, 0, 0)], {(): 0}

    def add(path: tuple[int, ...]):
        for end in range(1, len(path) + 1):
            if path[:end] not in known:
                parent = known[path[: end - 1]]
                state = int(mdp.next[nodes[parent][2], real[nodes[parent][2]][path[end - 1]]])
                if state == mdp.num_states:
                    return
                known[path[:end]] = len(nodes)
                nodes.append((parent, path[end - 1], state))

    best, way = {0: 0.0}, {0: ()}
    for s, arcs in enumerate(real):
        for place, a in enumerate(arcs if s in best else ()):
            to, p = int(mdp.next[s, a]), best[s] + mdp.log_ref[0, s, a].item()
            if to < mdp.num_states and p > best.get(to, -np.inf):
                best[to], way[to] = p, (*way[s], place)
    aside = []
    for path in paths:
        s = 0
        for t, arc in enumerate(path):
            aside += [(*path[:t], other) for other in range(len(real[s]))]
            s = int(mdp.next[s, real[s][arc]])
    for path in [*map(tuple, paths), *aside, *way.values()]:
        add(path)
    queue = [(0.0, (), 0)]
    while queue and len(nodes) < most:
        cost, path, s = heapq.heappop(queue)
        add(path)
        for place, a in enumerate(real[s]):
            to, p = int(mdp.next[s, a]), mdp.log_ref[0, s, a].item()
            if to < mdp.num_states and p > -np.inf:
                heapq.heappush(queue, (cost - p, (*path, place), to))
    return nodes


def learned_of(q: QFunction, world: World, post: Post, mdp: TokenMDP, responses: list[list[int]]) -> dict:
    """log pi and log pi_ref of the grammar's arcs at many prefixes, nats; each prefix as its parent, arc and state."""
    real = arcs_of(mdp)
    walks = [world.automata[post.scenario].walk(ids) for ids in responses]
    paths = [[real[s].index(a) for s, a in zip(*walk, strict=True)] for walk in walks]
    nodes = prefixes(mdp, paths, PREFIXES)
    ways: list[list[int]] = [[]]  # token ids that lead to each node
    for parent, place, _ in nodes[1:]:
        state = nodes[parent][2]
        ways.append([*ways[parent], int(mdp.token[state, real[state][place]])])
    inner = {parent for parent, _, _ in nodes}
    ends = [n for n in range(len(nodes)) if n not in inner]
    given, some = q.tokenizer.encode_prompt(post.prompt), [[*ways[n], q.tokenizer.eos] for n in ends]
    most, room = max(map(len, some)), q.run.model.config.block_size
    words = f"the page looks at summaries of {most} tokens behind {len(given)} tokens; the run's context {room}"
    require(len(given) + most <= room, words)
    at, of = [], {}  # the rows of log-probs that belong to nodes, by the node
    for n in ends:
        line = []
        while n >= 0:
            line.append(n)
            n = nodes[n][0]
        at += reversed(line)
    for row, n in enumerate(at):
        of.setdefault(n, row)
    both = [log_policies(model, [given] * len(some), some) for model in (q.run.model, q.run.reference)]
    arcs = [mdp.token[s, real[s]] for _, _, s in nodes]
    pi, ref = ([rounded(t[of[n], ids]) for n, ids in enumerate(arcs)] for t in both)
    return {"parent": [p for p, _, _ in nodes], "arc": [a for _, a, _ in nodes], "state": [s for _, _, s in nodes],
            "pi": pi, "ref": ref}  # fmt: skip


class Watched(Network):
    """The policy, and which prefixes a search of one prompt asked it about, call by call."""

    def start(self, prompts: list[list[int]], nodes: int, depth: int) -> Evaluation:
        evaluation = super().start(prompts, nodes, depth)
        self.paths, self.scores, self.calls_made = [()], [0.0], []
        self.logps = [evaluation.logps[0, 0]]
        return evaluation

    def extend(self, parents: Tensor, tokens: Tensor) -> Evaluation:
        evaluation = super().extend(parents, tokens)
        asked = []
        for m, (parent, token) in enumerate(zip(parents[0].tolist(), tokens[0].tolist(), strict=True)):
            before = max(parent, 0)
            self.paths.append((*self.paths[before], token))
            self.scores.append(self.scores[before] + self.logps[before][token].item())
            self.logps.append(evaluation.logps[0, m])
            asked += [len(self.paths) - 1] if parent >= 0 else []
        self.calls_made.append(asked)
        return evaluation


class Drawn:
    """One tree of the prefixes that several searches met."""

    def __init__(self, q: QFunction):
        self.q, self.parent, self.text, self.logp = q, [-1], ["the prompt"], [0.0]
        self.known: dict[tuple[int, ...], int] = {(): 0}

    def node(self, path: tuple[int, ...], score: float) -> int:
        """The number of a prefix, with its log-probability, nats; those before it are there already."""
        if path not in self.known:
            self.known[path] = len(self.parent)
            self.parent.append(self.known[path[:-1]])
            self.text.append(one_line(self.q, path[-1]))
            self.logp.append(round(score, 4))
        return self.known[path]


def searches_of(q: QFunction, prompt: Text) -> dict:
    """Greedy, beam and tree search of one prompt, call by call, on one tree of prefixes.

    A frame says which nodes were `on`, which ones have been `shut` since the frame before (of the tree search: nothing
    behind them can be better), and where the `best` finished response ends, -1 while there is none.
    """
    given, ends, drawn, runs = [q.tokenizer.encode_prompt(prompt)], q.tokenizer.ends, Drawn(q), {}
    longest = min(LONGEST, q.run.model.config.block_size - len(given[0]))
    for name in ("greedy", "beam, five wide"):
        network = Watched(q.run.model)
        if name == "greedy":
            best = decode(network, given, ends, longest, greedy)[0][0]
        else:
            best = beam_search(network, given, ends, longest, BeamConfig(width=5))[0][0]
        on = [[drawn.node(network.paths[n], network.scores[n]) for n in asked] for asked in network.calls_made]
        runs[name] = [{"on": nodes, "shut": [], "best": -1} for nodes in on]
        runs[name].append({"on": [], "shut": [], "best": drawn.node(tuple(best.tokens), best.score)})
    network, frames, shut = Watched(q.run.model), [], set()

    def watch(tree: Tree):
        on = [drawn.node(network.paths[n], network.scores[n]) for n in network.calls_made[-1]]
        frames.append({"on": on, **state(tree)})

    def state(tree: Tree) -> dict:
        nonlocal shut
        closed = {n for n in range(tree.made) if tree.closed[0, n].all()}
        new, shut = closed - shut, closed
        best = -1
        if (node := int(tree.best_node[0])) != NONE:
            tokens, logps = tree.path(0, node, int(tree.best_edge[0]))
            best = drawn.node(tuple(tokens), sum(logps))
        return {"shut": [drawn.known[network.paths[n]] for n in sorted(new)], "best": best}

    (found,), tree = mcts(network, given, ends, longest, MCTSConfig(budget=MADE), watch)
    runs["tree search (MCTS)"] = [*frames, {"on": [], **state(tree), "proved": found.proved}]
    return {"parent": drawn.parent, "text": drawn.text, "logp": drawn.logp, "runs": runs}


def page_data(q: QFunction, prompt: Text, answers: dict[str, Text], world: World | None) -> dict:
    """All that the page of a prompt and some responses to it knows; `world`, if the prompt is a post of it."""
    responses = [response_of(q, prompt, *answer) for answer in answers.items()]
    post = read_post(prompt) if world else None
    ids = [response["ids"] for response in responses]
    return {
        "beta": q.beta,
        "prompt": visible(prompt_text(q.tokenizer, {"prompt": prompt}), keep="\n"),
        "typed": prompt if isinstance(prompt, str) else "",
        "world": world_of(q, world, post, ids) if post else None,
        "responses": responses,
        "search": searches_of(q, prompt),
    }


def answers_in(q: QFunction, row: dict, world: World | None) -> dict[str, Text]:
    """A row's responses by name; of a post of the world also its first one with a fact wrong, and right if it errs."""
    answers = dict(answers_of(row))
    if world:
        first = q.tokenizer.encode_response(next(iter(answers.values())))
        edit = edited(world, read_post(row["prompt"]), first)
        if edit:
            right, wrong = (q.tokenizer.decode(ids[:-1]) for ids in edit.versions[:2])
            answers |= {"facts right": right} if edit.versions[0] != first else {}
            answers["a fact wrong"] = wrong
    return answers
