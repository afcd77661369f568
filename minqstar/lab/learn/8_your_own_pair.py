# %% [markdown]
# # 8. Your own pair of models
#
# Any policy with any reference of the same vocabulary is a Q-function: two Hugging Face folders (GPT-2, Llama, SmolLM2,
# Mistral, Qwen2, Qwen3, Pythia; `pip install -e ".[hf]"`), or two runs of ours. Nobody knows their Q\*. What can be
# said without it?
#
# Put your own folders and texts into this cell. As it stands it takes the runs of `python train.py --stage dpo`.

# %%
from pathlib import Path

import torch

import minqstar

RUNS = Path(minqstar.__file__).parent.parent / "runs"  # in the folder of the clone
POLICY = RUNS / "dpo"
REFERENCE = RUNS / "sft"
BETA = 0.5
PROMPT = (
    "SUBREDDIT: r/jobs TITLE: Is this a fair deal? POST: I had a call from Acme. They need a senior nurse. They would "
    "pay me $60k. My goal was $70k. The office is in Boston. I never did this before. My wife says go for it. TL;DR:"
)
BETTER = " Offer from Acme. They pay $60k but I want $70k."  # of two answers the one that you prefer
WORSE = " Offer from Acme. They pay $60k but I want $96k."

q = minqstar.load(POLICY, reference=REFERENCE, beta=BETA)  # chat=True makes the prompt a user's turn
print(f"{q.run.model.num_parameters():,} parameters, {q.tokenizer.n_vocab:,} tokens")

# %% [markdown]
# First a check that needs no data: a model against itself.
#
# **Question.** What must the reward of every token be if policy and reference are the same folder?

# %%
same = minqstar.load(POLICY, reference=POLICY, beta=BETA)
print(same.score(PROMPT, BETTER)[0].rewards.abs().max().item())

# %% [markdown]
# Exactly 0. Anything else would mean that the two models do not see the same tokens.
#
# **Question.** Does the policy prefer BETTER, as you do? Which tokens does it pay, which does it charge?

# %%
better, worse = q.score(PROMPT, [BETTER, WORSE])
for one in (better, worse):
    print("  ".join(f"{token!r} {r:+.2f}" for token, r in zip(one.tokens, one.rewards.tolist(), strict=True)))
    print(f"  implicit return {one.total:+.3f}")

# %% [markdown]
# Each reward is an advantage: what a token adds to what its prefix promised. The last one is the end token's. If it is
# negative, the pair would rather have read on.
#
# Compare returns of *one* prompt only. The value of the prompt is not in them (chapter 2), so those of two prompts have
# nothing in common.
#
# **Question.** The two answers begin alike. What do their shared tokens add to the preference?

# %%
shared = next(i for i, (a, b) in enumerate(zip(better.ids, worse.ids, strict=False)) if a != b)  # tokens
gap = (better.rewards[:shared] - worse.rewards[:shared]).abs().max().item() if shared else 0.0
print(f"{shared} shared tokens: their rewards differ by {gap:.4f}; all of the margin comes later")

# %% [markdown]
# Nothing: the same prefix has the same rewards. So a mistake is best studied with two answers that differ in it alone.
#
# **Question.** What would the policy write, and what does that earn?

# %%
answer = q.search(PROMPT, "beam", width=3, max_new_tokens=24)
cut = "cut by the length limit" if answer.best.truncated else "ended by itself"
print(repr(answer.text), f"({cut}), log pi {answer.best.score:.2f}, implicit return {answer.scored.total:+.3f}")

# %% [markdown]
# Scoring always counts an end token. A response that was cut has none, so its return holds no EOS reward.
#
# **Exercise.** How sure is the pair that BETTER is preferred to WORSE? By Eq. 1 that is a function of the two implicit
# returns. Write it from the token rewards.


# %% exercise
def preference(better: torch.Tensor, worse: torch.Tensor) -> float:
    """P(better is preferred), from the rewards of the tokens of each, reward units."""
    return float(better.sum() > worse.sum())  # not yet right: how sure, not whether


# %% check
for a, b in ((better, worse), (worse, better)):
    mine, right = preference(a.rewards, b.rewards), 1 / (1 + torch.tensor(b.total - a.total).exp().item())
    assert abs(mine - right) < 1e-5, f"returns {a.total:+.3f} and {b.total:+.3f}: you say {mine:.3f}, Eq. 1 {right:.3f}"
print(f"right: this pair prefers {BETTER!r} with probability {preference(better.rewards, worse.rewards):.2f}")
