# %% [markdown]
# # 3. Change a reward, predict A\*, check
#
# You understand an equation when you can say what it will do. Here we change the rewards of the world and predict A\*
# before we compute it. A post's world is a table of about a hundred states, so each check takes milliseconds.

# %%
from dataclasses import replace
from math import exp, log

import torch

import minqstar
from minqstar.theory.mdp import TokenMDP, implicit_rewards, solve
from minqstar.world.posts import read_post

POST = (
    "SUBREDDIT: r/jobs TITLE: Is this a fair deal? POST: I had a call from Acme. They need a senior nurse. They would "
    "pay me $60k. My goal was $70k. The office is in Boston. I never did this before. My wife says go for it. TL;DR:"
)
SUMMARY = " Offer from Acme as a senior nurse. They pay $60k but I want $96k. The office is in Boston. Any advice?"
PAID = {"right": 0.5, "wrong": -1.0, "filler": -0.4}  # what the world pays, reward units

world = minqstar.World()
automaton = world.automata["job"]
mdp = automaton.mdp([read_post(POST)])  # tables (1, states, actions): one post
ids = world.tokenizer.encode_response(SUMMARY)
tokens, (states, actions) = world.tokenizer.texts_of(ids), automaton.walk(ids)


def A_star(mdp: TokenMDP, beta: float = 0.5) -> dict[str, float]:
    """A* of two tokens of the summary: the first wrong digit, and the first token of the filler."""
    A = implicit_rewards(mdp, solve(mdp, beta), beta)[0, states, actions].tolist()
    return {token: A[tokens.index(token)] for token in ("9", " Any")}


def paying(**rewards: float) -> TokenMDP:
    """The same world with other rewards: paying(filler=-1.0)."""
    reward = mdp.reward.clone()
    for name, value in rewards.items():
        reward[mdp.reward == PAID[name]] = value
    return replace(mdp, reward=reward)


print(f"{mdp.num_states} states; A* of '9' {A_star(mdp)['9']:+.2f}, of ' Any' {A_star(mdp)[' Any']:+.2f}")

# %% [markdown]
# **Question.** A filler shall cost 1.0, not 0.4. What becomes of A\* at " Any"? At "9"?
#
# Predict with Eq. 6. A summary that has said everything stops with probability 0.64, or adds a filler, twice at most:


# %%
def first_filler(reward: float, beta: float = 0.5) -> float:
    after = beta * log(0.64 + 0.36 * exp(reward / beta))  # V* behind one filler
    before = beta * log(0.64 + 0.36 * exp((reward + after) / beta))  # V* before any
    return reward + after - before  # Eq. 10


changed = A_star(paying(filler=-1.0))
print(f"' Any': {first_filler(-0.4):+.2f} -> {first_filler(-1.0):+.2f} predicted, {changed[' Any']:+.2f} found")
print(f"'9':    {A_star(mdp)['9']:+.2f} -> {changed['9']:+.2f} found")

# %% [markdown]
# The number is charged as before. Fillers come later, whatever the number is: their value is in V\*(s) and in V\*(s'),
# and Eq. 10 takes the difference.
#
# **Question.** A policy with a small beta leaves the reference freely, one with a large beta can hardly leave it. Which
# of the two charges the 9 more?

# %%
print(f"pi_ref alone expects {0.75 * 0.5 + 0.25 * -1.0:+.3f} of the number")
print("  beta    A*('9')")
for beta in (0.05, 0.5, 5.0, 500.0):
    print(f"{beta:6.2f}  {A_star(mdp, beta)['9']:+9.3f}")

# %% [markdown]
# With a small beta pi\* would have written the right number, +0.5, so the wrong one costs nearly the whole difference
# to -1. With a large beta pi\* can only expect what the reference writes: +0.125. The wrong number costs the difference
# to that, 1.125.
#
# **Question.** V\* is made of the rewards to come. Say every token earns Phi(s') - Phi(s) more, for any function Phi of
# the state that is 0 at the end. What becomes of A\*?

# %%
phi = torch.randn(1, mdp.num_states + 1, generator=torch.Generator().manual_seed(0)).double()
phi[..., -1] = 0.0
shaped = replace(mdp, reward=mdp.reward + phi[..., mdp.next] - phi[..., :-1, None])
print({token: round(A, 6) for token, A in A_star(mdp).items()}, "before")
print({token: round(A, 6) for token, A in A_star(shaped).items()}, "shaped")

# %% [markdown]
# Nothing: this is *shaping* (Definition 1). Many rewards share one A\*. So nobody can read off A\*, or off a model that
# DPO trained, at which token a reward was paid. What a token is worth can be read off.
#
# **Exercise.** Predict the charge of a first wrong digit for any rewards and any beta. The reference writes the right
# number with probability 0.75. All of the wrong one's charge falls on its first digit, because 9 rules out the 70.


# %% exercise
def charge(right: float, wrong: float, beta: float) -> float:
    """A* of the first digit of a number that cannot become right any more, reward units."""
    return wrong  # not yet right: Eq. 10 subtracts the value of the state before


# %% check
for right, wrong, beta in ((0.5, -1.0, 0.5), (0.5, -2.0, 0.5), (3.0, -1.0, 2.0)):
    found, mine = A_star(paying(right=right, wrong=wrong), beta)["9"], charge(right, wrong, beta)
    assert abs(mine - found) < 1e-9, f"right {right:+}, wrong {wrong:+}, beta {beta}: {mine:.3f}, but it is {found:.3f}"
print("right: you can predict what backward induction finds")
