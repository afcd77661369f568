# %% [markdown]
# # 4. DPO in a table finds A\* from pairs alone
#
# So far we knew the rewards. DPO does not. It is shown two responses, and which of them was preferred. By the model of
# Bradley and Terry (Eq. 1) the better one wins most of the time: P(w beats l) = sigmoid(R(w) - R(l)), R the return.
#
# DPO fits a policy pi to that. In place of a return it puts the policy's *implicit return*, the sum over the tokens of
# beta log(pi/pi_ref), and lowers the negative log-likelihood of what was seen (Eq. 8, 9):
#
#     loss = -log sigmoid( sum_w beta log(pi/pi_ref) - sum_l beta log(pi/pi_ref) )
#
# Chapter 1's world is so small that we can take *all* pairs, each as often as it occurs, and a policy that is a table
# of logits. What DPO finds then has no error of sampling and none of a network.

# %%
from math import factorial, log

import torch

from minqstar.theory.losses import dpo_loss, plackett_luce
from minqstar.theory.mdp import TokenMDP, implicit_rewards, shape, solve
from minqstar.theory.tabular import fit, rankings

token = torch.tensor([[9, 7], [3, 6], [3, 6]])
next = torch.tensor([[1, 2], [3, 3], [3, 3]])
reward = torch.tensor([[0.0, 0.0], [-1.0, -1.0], [+1.0, -1.0]]).double()
log_ref = torch.tensor([[0.3, 0.7], [0.5, 0.5], [0.5, 0.5]]).double().log()  # it errs less often at the first digit
mdp, beta = TokenMDP(token, next, log_ref, reward), 0.5

# %% [markdown]
# **Question.** Whole numbers were compared, "73" with "96" and so on, and the reward stood on the last digit. What will
# the learned reward beta log(pi/pi_ref) of each *digit* look like: like r, like A\*, or like neither?

# %%
found = fit(mdp, beta)
A = implicit_rewards(mdp, solve(mdp, beta), beta)
columns = torch.stack((reward, A, found.rewards), dim=-1).round(decimals=9) + 0.0  # so that -1e-17 is printed as 0.00
print("text  digit      r     A*  learned")
for s, prefix in enumerate(("", "9", "7")):
    for a in range(2):
        r, exact, learned = columns[s, a].tolist()
        print(f"{prefix:>4}  {token[s, a]:>5} {r:6.2f} {exact:6.2f} {learned:8.2f}")

# %% [markdown]
# Like A\*, digit by digit. That is *credit assignment*, and nobody asked for it: the charge for "96" moved from the
# last digit, where it was paid, to the first, where it was decided.
#
# **Question.** How near does it come?

# %%
print(f"the largest |learned - A*| of any digit: {found.reward_gap[-1]:.0e}")
assert found.reward_gap[-1] < 1e-5

# %% [markdown]
# As near as floating point numbers allow: A\* is the one minimum of the loss.
#
# **Question.** Say somebody pays at other times: shaping, as in chapter 3, with Phi = -1 after "9" and +5 after "7".
# Returns are as before, so responses win as often. Does DPO find something else?

# %%
phi = torch.tensor([0.0, -1.0, 5.0, 0.0]).double()
shaped = shape(mdp, phi)
again = fit(shaped, beta)
before, after = (of.reward[[0, 1], [0, 1]].tolist() for of in (mdp, shaped))
print(f"the digits of '96' earn {before}, shaped {after}")
print(f"what DPO learns differs by {(again.rewards - found.rewards).abs().max():.0e}")

# %% [markdown]
# It cannot, because its data are the same. Rewards that differ by shaping make one *class*. Every class has exactly one
# member of the form beta log(pi/pi_ref) (Theorem 1), and DPO finds that one: A\*.
#
# **Question.** A row of data can also rank K responses: the best, the next best, and so on. The model of Plackett and
# Luce then takes the place of Bradley and Terry's. Does a ranking of three teach something else than pairs do?

# %%
of_three = fit(mdp, beta, population=rankings(mdp, 3))
print(f"pairs and rankings of three: {(of_three.rewards - found.rewards).abs().max():.0e} apart")

# %% [markdown]
# No, it teaches the same A\*. But one row says more than a pair does.
#
# **Question.** At first the policy is the reference, and all implicit returns are 0. What is the loss then?

# %%
for K in (2, 3, 4):
    print(f"{K} responses: loss {-plackett_luce(torch.zeros(K)):.3f}, ln {factorial(K)} = {log(factorial(K)):.3f}")

# %% [markdown]
# Then all K! orders are equally probable, and the loss is ln K!: ln 2 for pairs. Training starts there, always.
#
# **Exercise.** Write the DPO loss of one pair from the log-probabilities of its tokens, nats. Two responses need not
# be of one length. Take care: a return is a sum.


# %% exercise
def pair_loss(chosen, ref_chosen, rejected, ref_rejected, beta: float):
    """Eq. 8, 9. Four tensors: log pi and log pi_ref of each token of both responses."""
    margin = beta * (chosen - ref_chosen).mean() - beta * (rejected - ref_rejected).mean()
    return -torch.nn.functional.logsigmoid(margin)


# %% check
numbers = torch.Generator().manual_seed(0)
for L_w, L_l in ((3, 3), (2, 7)):
    chosen, ref_chosen = -torch.rand(2, L_w, generator=numbers)
    rejected, ref_rejected = -torch.rand(2, L_l, generator=numbers)
    response = torch.tensor([0] * L_w + [1] * L_l)  # which tokens belong to which
    both = torch.cat((chosen, rejected)), torch.cat((ref_chosen, ref_rejected))
    right = dpo_loss(*both, response, [2], beta).loss[0]
    mine = pair_loss(chosen, ref_chosen, rejected, ref_rejected, beta)
    assert torch.isclose(mine, right), f"lengths {L_w} and {L_l}: you have {mine:.3f}, Eq. 9 says {right:.3f}"
print("right. A mean would forgive a long response most of what it did wrong")
