# %% [markdown]
# # 7. Search is likelihood search
#
# A search for good text would like to know two things: what each step earns, and what can still be earned from where
# it stands. With r and V\* it ranks prefixes by the left side of
#
#     sum over t <= K of (r + beta log pi_ref) + V*(s_{K+1}) = V*(s_0) + sum over t <= K of beta log pi*   (Eq. 12 = 13)
#
# The right side is the log-probability of the prefix under pi\*, which a language model knows without any reward.

# %%
from pathlib import Path

import torch

import minqstar
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import decode, greedy
from minqstar.search.evaluator import Table
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.theory.mdp import solve
from minqstar.world.posts import read_post

POST = (
    "SUBREDDIT: r/jobs TITLE: Is this a fair deal? POST: I had a call from Acme. They need a senior nurse. They would "
    "pay me $60k. My goal was $70k. The office is in Boston. I never did this before. My wife says go for it. TL;DR:"
)
beta, world = 0.5, minqstar.World()
tokenizer, post = world.tokenizer, read_post(POST)
mdp = world.automata["job"].mdp([post])
solution = solve(mdp, beta)
likelihood = Table(mdp, solution, beta, tokenizer.n_vocab)  # a step earns beta log pi*, a leaf is worth 0
guided = Table(mdp, solution, beta, tokenizer.n_vocab, guided=True)  # a step earns r + beta log pi_ref, a leaf V*
what = ([tokenizer.encode(POST)], tokenizer.ends, 48)  # prompts, end tokens, length limit

# %% [markdown]
# **Question.** Two tree searches (MCTS) run on this post. One is given r, pi_ref and V\*. The other is given pi\*
# alone. Will they visit the same nodes?

# %%
trees = {}
for name, evaluator in (("guided", guided), ("likelihood", likelihood)):
    (found,), trees[name] = mcts(evaluator, *what, MCTSConfig(budget=300))
    print(f"{name:10} value {found.value:+.3f}, {found.nodes} nodes, {found.simulations} simulations")
    print(f"  {tokenizer.decode(found.response.tokens)}")
same = (trees["guided"].visits == trees["likelihood"].visits).all()
print(f"the same visits at every edge: {same}; the values differ by V*(s_0) = {solution.V[0, 0]:.3f}")

# %% [markdown]
# The same, node by node: along any path the two sums differ by V\*(s_0), and that is one number for the whole tree. So
# a good reward model and a good value function add nothing to a search over pi\*. They are in it.
#
# **Question.** The likeliest summary is wanted. Does it suffice to take the likeliest token each time (*greedy*)?

# %%
((taken,),) = decode(likelihood, *what, greedy)
print(f"greedy    log pi* {taken.score:.3f}  return {world.judge_tokens(post, taken.tokens).total:+.2f}")
for width in (1, 2, 3, 5):
    best = beam_search(likelihood, *what, BeamConfig(width=width))[0][0]
    print(f"{width} beams   log pi* {best.score:.3f}  return {world.judge_tokens(post, best.tokens).total:+.2f}")

# %% [markdown]
# No. " I" is the likelier first word, but behind it pi\* has to choose once more ("just", "finally", ...), and each of
# these is improbable. " Offer" is less likely at first and costs nothing later. Two beams keep it in sight.
#
# Both summaries earn the same return. pi\* finds the second one likelier because pi_ref does: pi\* is pi_ref
# exp(R / beta) / Z, R the return.
#
# **Question.** A beam finds the likeliest summary here, but cannot say so. When could a search be *sure*? (A budget is
# the number of prefixes, *nodes*, that the search may add to its tree.)

# %%
print(f"{'budget':>6} {'nodes':>6} {'log pi*':>8}  proved")
for budget in (8, 16, 32, 64, 128, 256):
    (found,), _ = mcts(likelihood, *what, MCTSConfig(budget=budget))
    print(f"{budget:6} {found.nodes:6} {found.response.score:8.3f}  {'yes' if found.proved else 'no'}")

# %% [markdown]
# When no open prefix is likelier than the best finished summary. A prefix only gets less likely as it grows, so such
# prefixes are *closed*; when the root is closed, the proof is complete. A budget below 34 is overdrawn: the first
# simulation is greedy, and goes on until its summary is complete.
#
# **Question.** A trained run is no table, but its search is the same code. Does it find more than greedy there?
# (`python train.py --stage dpo` makes the run.)

# %%
RUN = Path(minqstar.__file__).parent.parent / "runs/dpo"  # in the folder of the clone; another run will do, too
q = minqstar.load(RUN)
rows = list(minqstar.read_pairs(RUN / "held_out.jsonl"))[:12]
better = proved = 0
for row in rows:
    plain, search = (q.search(row["prompt"], how, max_new_tokens=48) for how in ("greedy", "mcts"))
    assert search.best.score > plain.best.score - 1e-4  # nats
    better += search.best.score > plain.best.score + 1e-4
    proved += search.found.proved
print(f"of {len(rows)} posts: a likelier summary on {better}, and a proof that none is likelier on {proved}")

# %% [markdown]
# Where greedy was right, search says so; where it was not, search finds better. It is never worse, because its first
# simulation is greedy. It pays for that in forwarded tokens: `search.tokens_forwarded`.
#
# **Exercise.** Write the left side of Eq. 12 for every prefix of a summary: what a guided search knows after 1, 2, ...,
# L tokens. `value` holds L + 1 numbers: V\* before each token, and after the last.


# %% exercise
def guided_value(reward: torch.Tensor, log_ref: torch.Tensor, value: torch.Tensor, beta: float) -> torch.Tensor:
    """(L,) reward units."""
    return (reward + beta * log_ref).cumsum(0)  # not yet right: what is a leaf worth?


# %% check
for summary in (
    " Offer from Acme as a senior nurse. They pay $60k.",
    " I just got an offer from Globex. They pay $61k.",
):
    states, actions = world.automata["job"].walk(tokenizer.encode_response(summary))
    log_ref, log_pi = (table[0, states, actions] for table in (mdp.log_ref, solution.log_pi))
    V = solution.V[0, [*states, mdp.num_states]]
    off = guided_value(mdp.reward[0, states, actions], log_ref, V, beta) - (V[0] + beta * log_pi.cumsum(0))
    K = int(off.abs().argmax())
    assert off[K].abs() < 1e-9, f"after {K + 1} tokens of {summary!r} the two sides differ by {off[K]:+.3f}"
print("right: Eq. 12 = 13 at every prefix. A leaf that is worth 0 would hold only at the end")
