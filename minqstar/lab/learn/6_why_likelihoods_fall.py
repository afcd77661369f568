# %% [markdown]
# # 6. Why likelihoods fall
#
# Whoever trains with DPO for the first time is startled by one curve. The reward of *chosen* answers falls below 0, and
# that means: the model finds the preferred answers less likely than before. Nothing is broken. Eq. 16 says why.
#
# We begin in the table of chapter 1, where pi\* is exact.

# %%
from pathlib import Path

import torch

import minqstar
from minqstar.search.evaluator import log_probs
from minqstar.theory.mdp import TokenMDP, implicit_rewards, solve
from minqstar.theory.paths import responses
from minqstar.theory.qfunction import expected_implicit_reward

token = torch.tensor([[9, 7], [3, 6], [3, 6]])
next = torch.tensor([[1, 2], [3, 3], [3, 3]])
reward = torch.tensor([[0.0, 0.0], [-1.0, -1.0], [+1.0, -1.0]]).double()
log_ref = torch.full((3, 2), 0.5).double().log()
mdp, beta = TokenMDP(token, next, log_ref, reward), 0.5
solution = solve(mdp, beta)
A = implicit_rewards(mdp, solution, beta)  # beta log(pi*/pi_ref)

# %% [markdown]
# **Question.** Draw a digit at the start from pi_ref: 9 or 7, one half each. pi\* likes the 7 more and the 9 less. Is
# beta log(pi\*/pi_ref) of such a draw positive or negative on average, or does it balance?

# %%
print(f"A* of 9: {A[0, 0]:+.2f}, of 7: {A[0, 1]:+.2f}, on average: {A[0].mean():+.2f}")

# %% [markdown]
# Negative. What one digit gains in probability the other loses, but logarithms weigh the loss more. In general (Eq. 16)
#
#     E over a ~ pi_ref of beta log(pi/pi_ref)(a|s) = -beta KL(pi_ref || pi)
#
# A KL divergence is never negative. So whatever moves a policy away from pi_ref makes draws *of pi_ref* less likely on
# average: good training, bad training, any training.
#
# **Question.** DPO's pairs are such draws. The chosen answer is the better of two. Does its return fall, too?

# %%
paths = responses(mdp)  # all four numbers
chance = paths.along(mdp.log_ref).sum(-1).exp()
S = paths.along(A).sum(-1)  # implicit returns
R = paths.along(reward).sum(-1)
wins = torch.sigmoid(R[:, None] - R)  # Eq. 1: the first of a pair is chosen
pairs = chance[:, None] * chance
chosen = (pairs * (wins * S[:, None] + (1 - wins) * S)).sum()
rejected = (pairs * (wins * S + (1 - wins) * S[:, None])).sum()
print(f"chosen {chosen:+.2f}, rejected {rejected:+.2f}, the mean of both {(chosen + rejected) / 2:+.2f}")
kl = (chance * (chance.log() - paths.along(solution.log_pi).sum(-1))).sum()  # KL(pi_ref || pi*) of whole answers
print(f"-beta KL(pi_ref || pi*) {-beta * kl:+.2f}")

# %% [markdown]
# Here it does. Chosen and rejected together are all draws, so their *mean* is -beta KL exactly. The chosen ones lie
# above that mean, by half of the margin. They fall when half of the margin is less than beta KL.
#
# So "the chosen reward falls" says: the policy has moved. Look at the *margin* to see whether it moved well.
#
# **Question.** Now the trained run (`python train.py --stage dpo`). At each state along a held-out answer we take the
# expectation of Eq. 16 over the whole vocabulary. At how many states will it be positive?

# %%
RUN = Path(minqstar.__file__).parent.parent / "runs/dpo"  # in the folder of the clone; another run will do, too
q = minqstar.load(RUN)
rows = list(minqstar.read_pairs(RUN / "held_out.jsonl"))
row = rows[0]
prompt, answer = q.tokenizer.encode(row["prompt"]), q.tokenizer.encode_response(row["chosen"])
with torch.no_grad():
    places = torch.arange(len(answer)) + len(prompt) - 1  # the position before each answer token predicts it
    pi, ref = (
        log_probs(model, model(torch.tensor([prompt + answer]), keep=places)).double()
        for model in (q.run.model, q.run.reference)
    )
E = expected_implicit_reward(pi, ref, q.beta)  # (L,) reward units
print(f"positive at {(E > 1e-6).sum()} of {len(E)} states; the sum is {E.sum():+.3f}")
for i in E.argsort()[:3].tolist():
    print(f"  {E[i]:+.3f} before {q.tokenizer.texts_of(answer)[i]!r}")

# %% [markdown]
# At none. The largest falls are where DPO changed most: in this world where the value of a fact is chosen.
#
# **Question.** And over many held-out pairs: do chosen answers earn more than 0?

# %%
returns = [[one.total for one in q.score(row["prompt"], [row["chosen"], row["rejected"]])] for row in rows[:64]]
of_chosen, of_rejected = torch.tensor(returns).mean(0)
print(f"chosen {of_chosen:+.3f}, rejected {of_rejected:+.3f}, their mean {(of_chosen + of_rejected) / 2:+.3f}")

# %% [markdown]
# `train.py` prints the same of all held-out pairs at its end ("returns of chosen answers fell by ..."), and writes it
# into `summary.json` as `chosen_reward`, `rejected_reward` and `chosen_expected_reward`.
#
# **Exercise.** Write Eq. 16 for tables of log-probabilities (S, A). Where pi_ref is 0 (its log is -inf) an action is
# never drawn, and adds 0. Take care that 0 times infinity does not become NaN.


# %% exercise
def minus_beta_kl(log_pi: torch.Tensor, log_ref: torch.Tensor, beta: float) -> torch.Tensor:
    """E_{a ~ pi_ref}[beta log(pi/pi_ref)] at each state, (S,)."""
    return beta * (log_pi.exp() * (log_pi - log_ref)).sum(-1)  # not yet right: over whose draws?


# %% check
numbers = torch.Generator().manual_seed(0)
log_pi, log_ref = torch.randn(2, 50, 6, generator=numbers).double()
nowhere = torch.rand(50, 6, generator=numbers) < 0.3
nowhere[:, 0] = False
log_pi, log_ref = (t.masked_fill(nowhere, -torch.inf).log_softmax(-1) for t in (log_pi, log_ref))
mine = minus_beta_kl(log_pi, log_ref, beta)
assert not mine.isnan().any(), "NaN: -inf minus -inf, or 0 times -inf; torch.where keeps the support of pi_ref"
assert (mine <= 1e-12).all(), "positive somewhere: a KL divergence is never negative"
assert torch.allclose(mine, expected_implicit_reward(log_pi, log_ref, beta)), "not Eq. 16"
print("right: no state is positive")
