# %% [markdown]
# # 1. Three states, by hand
#
# A language model writes one token after the other. The paper reads that as a *token MDP*:
#
# - a **state** s is the text so far,
# - an **action** a is the next token,
# - a **reward** r(s, a) is a number that a token earns.
#
# Here is the smallest one that shows the idea. A post says "I asked for $73k", and a model has to copy the two digits.
# It may write 7 or 9 first, then 3 or 6. There are three states: nothing written yet, "9" written, "7" written.
# Only the complete number is judged: "73" earns +1, every other number earns -1.
#
# The *reference* pi_ref is the model before DPO. Here it guesses each digit with probability one half.

# %%
from math import exp, log

import torch

from minqstar.theory.mdp import TokenMDP, implicit_rewards, solve

START, NINE, SEVEN, END = 0, 1, 2, 3  # three states, and the end behind them
token = torch.tensor([[9, 7], [3, 6], [3, 6]])  # the two actions of each state
next = torch.tensor([[NINE, SEVEN], [END, END], [END, END]])  # where each action leads
reward = torch.tensor([[0.0, 0.0], [-1.0, -1.0], [+1.0, -1.0]]).double()
log_ref = torch.full((3, 2), 0.5).double().log()
beta = 1.0  # the price of leaving the reference: reward units a nat, the unit of natural logarithms

# %% [markdown]
# The best policy pi\* earns much reward and stays near pi_ref. For it the paper shows three lines:
#
#     Q*(s,a)  = r(s,a) + beta log pi_ref(a|s) + V*(s'),  V*(end) = 0   (Eq. 7)
#     V*(s)    = beta log sum_a exp(Q*(s,a) / beta)                     (Eq. 6)
#     pi*(a|s) = exp((Q*(s,a) - V*(s)) / beta)                          (Eq. 5)
#
# V\*(s) is the *value* of a state: what can still be earned from there, less the cost of leaving the reference.
# The last states come first, because V\* of the end is known: it is 0.
#
# **Question.** After "9" everything earns -1. After "7" one digit earns +1, the other -1: 0 on average. Is V\*("7")
# more than 0, less, or equal?

# %%
V_nine = log(0.5 * exp(-1) + 0.5 * exp(-1))
V_seven = log(0.5 * exp(+1) + 0.5 * exp(-1))
print(f"V*('9') = {V_nine:.3f}    V*('7') = {V_seven:.3f}")

# %% [markdown]
# It is more: V\* is a *soft maximum*. The best policy will lean towards the better digit, so it can expect more than
# the average. It leans, but does not jump, so it can expect less than 1.
#
# **Question.** One step back, at the start, no token earns anything at once. What will pi\* do with the first digit?

# %%
V_start = log(0.5 * exp(V_nine) + 0.5 * exp(V_seven))
pi_seven = exp(log(0.5) + V_seven - V_start)  # Eq. 7 into Eq. 5; both first digits earn 0
print(f"V*(start) = {V_start:.3f}    pi*('7'|start) = {pi_seven:.3f}")

# %% [markdown]
# The same is one call for an MDP of any size. It works backwards as we did: *soft Bellman backward induction*.
#
# **Question.** Do the three values that we found by hand agree with those of the function?

# %%
mdp = TokenMDP(token, next, log_ref, reward)
solution = solve(mdp, beta)
for name, s, by_hand in (("start", START, V_start), ("'9'", NINE, V_nine), ("'7'", SEVEN, V_seven)):
    print(f"{name:6} V* = {solution.V[s]:.3f}   by hand {by_hand:.3f}")
    assert abs(solution.V[s] - by_hand) < 1e-12

# %% [markdown]
# They do. Now the heart of the paper, Eq. 10. The *advantage* of a token can be written in two ways:
#
#     A*(s,a) = beta log(pi*(a|s) / pi_ref(a|s)) = r(s,a) + V*(s') - V*(s)
#
# The left side needs two language models and nothing else. The right side says what it means: the reward, and by how
# much the future got better or worse.
#
# **Question.** "96" is wrong, and its reward, -1, stands on the 6. At which of its two digits is A\* negative?

# %%
A = implicit_rewards(mdp, solution, beta).round(decimals=9) + 0.0  # so that -1e-17 is printed as 0.00
print("token  r(s,a)     A*")
for s, a in ((START, 0), (NINE, 1)):
    print(f"{token[s, a]:>5}  {reward[s, a]:6.2f} {A[s, a]:6.2f}")

# %% [markdown]
# The reward comes late, and A\* charges early: at the 9. After the 9 all is lost, so the 6 changes nothing.
#
# **Exercise.** Write V\* of one state for any number of actions and any beta. You are given, as lists over its
# actions, the rewards r(s, a), the probabilities pi_ref(a|s), and V\*(s') of the states behind them.


# %% exercise
def soft_value(rewards: list[float], pi_ref: list[float], next_values: list[float], beta: float) -> float:
    """Eq. 7 put into Eq. 6."""
    return sum(p * (r + V) for r, p, V in zip(rewards, pi_ref, next_values, strict=True))  # an average: not yet right


# %% check
for beta in (0.1, 1.0, 10.0):
    V = solve(mdp, beta).V
    for s in (START, NINE, SEVEN):
        mine = soft_value(reward[s].tolist(), log_ref[s].exp().tolist(), V[next[s]].tolist(), beta)
        assert abs(mine - V[s]) < 1e-9, f"beta {beta}, state {s}: you have {mine:.4f}, Eq. 6 says {V[s]:.4f}"
print("right. With a large beta V* comes near the average, with a small one near the maximum")
