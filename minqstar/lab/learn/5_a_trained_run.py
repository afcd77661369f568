# %% [markdown]
# # 5. The trained run beside it, and where it is wrong
#
# A transformer is not a table, and a data set is not all pairs. What is left of A\* then? This chapter needs a run:
# `python train.py --stage dpo` in the folder of the clone, about four minutes.

# %%
import json
from pathlib import Path

import torch

import minqstar
from minqstar.score import token_rewards
from minqstar.world.posts import post_of

RUN = Path(minqstar.__file__).parent.parent / "runs/dpo"  # in the folder of the clone; another run will do, too
q = minqstar.load(RUN)  # a policy, its reference, and beta
rows = list(minqstar.read_pairs(RUN / "held_out.jsonl"))  # pairs that it was not trained on
print(f"{len(rows)} held-out pairs, beta {q.beta}")

# %% [markdown]
# **Question.** The run has never seen r, V\* or A\*. On a held-out summary, which tokens should it pay or charge?

# %%
print(q.score(rows[0]["prompt"], rows[0]["chosen"])[0])  # learned is beta log(pi/pi_ref), A* is exact

# %% [markdown]
# The same tokens as A\*, as far as it has learned. Now all tokens of all held-out summaries at once.
#
# A token that decides nothing has A\* = 0 (*forced*). The others choose the value of a *fact*, whether to say a
# *clause*, or whether to add a *filler*.
#
# **Question.** On which kind is the learned reward least exact?

# %%
groups = [q.group(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows]
scored = [one for of in token_rewards(q.run, groups, [post_of(row) for row in rows]) for one in of]
learned = torch.cat([one.rewards.double() for one in scored])
exact = torch.cat([one.exact.advantage for one in scored])
kinds = [kind for one in scored for kind in one.exact.kind]


def rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


print(f"{'kind':8} {'tokens':>6} {'rms A*':>7} {'rms error':>10}")
for kind in ("forced", "clause", "filler", "fact"):
    here = torch.tensor([k == kind for k in kinds])
    print(f"{kind:8} {here.sum():6} {rms(exact[here]):7.3f} {rms((learned - exact)[here]):10.3f}")

# %% [markdown]
# On facts: to know that a number is wrong, the network must find the right one in the post. Clauses and fillers are the
# same in every post, so they are learned sooner. rms is the root of the mean square.
#
# **Question.** Is it wrong in both directions, or does it mostly pay and charge too little?

# %%
charged = exact < -0.5
print(f"of {charged.sum()} tokens that A* charges more than 0.5")
print(f"  mean A* {exact[charged].mean():+.2f}, mean learned {learned[charged].mean():+.2f}")
print(f"  charged too little: {(learned > exact)[charged].double().mean():.0%}")

# %% [markdown]
# Mostly too little. A fit that is uncertain stays near the reference, where every reward is 0; more data and more steps
# bring it nearer. (With a run of a few steps all of it is too little.)
#
# **Question.** Look at the worst tokens of all. What do they have in common?

# %%
texts = [token for one in scored for token in one.tokens]
print(f"{'before it':>30} {'token':10} {'A*':>6} {'learned':>8}  kind")
for i in (learned - exact).abs().argsort(descending=True)[:8].tolist():
    before = "".join(texts[max(0, i - 6) : i])[-28:]
    print(f"{before!r:>30} {texts[i]!r:10} {exact[i]:6.2f} {learned[i]:8.2f}  {kinds[i]}")

# %% [markdown]
# In a run of the defaults they are facts, most of them the second digit of a number whose first digit is right. There
# the model must have read the number exactly, and not mistaken it for the other number of the post.
#
# **Exercise.** Write r²: 1 - (mean of the squared errors) / (variance of A\*), the share of A\*'s variance that the
# learned reward explains. The run's own summary holds the same figure.


# %% exercise
def r_squared(learned: torch.Tensor, exact: torch.Tensor) -> float:
    """1 for learned = exact, 0 for one that always says the mean of A*."""
    return torch.corrcoef(torch.stack((learned, exact)))[0, 1].item() ** 2  # not yet right: forgives a wrong scale


# %% check
off = r_squared(exact + exact.std(correction=0), exact)
assert abs(off) < 1e-9, f"one standard deviation too high everywhere explains nothing: r² is 0, and you have {off:.2f}"
theirs = json.loads((RUN / "summary.json").read_text())["eval"]["q_gap_r2"]
mine = r_squared(learned, exact)
assert abs(mine - theirs) < 1e-3, f"you have {mine:.4f}, the summary of the run says {theirs:.4f}"
print(f"right: r² is {mine:.3f}, as `q_gap_r2` in its summary.json")
