# %% [markdown]
# # 2. One post, token by token
#
# The TL;DR world writes Reddit posts, and knows everything about summaries of them: what the reference pi_ref would
# write (three facts in four are right), what each token earns, and so Q\*, V\* and pi\* exactly. A right fact earns
# +0.5, a wrong one -1, an extra clause such as "but I want" +0.3, and a filler such as "Any advice?" -0.4.
#
# Here is a post, and a summary with one mistake and one filler.

# %%
import torch

import minqstar
from minqstar.world.posts import read_post

POST = (
    "SUBREDDIT: r/jobs TITLE: Is this a fair deal? POST: I had a call from Acme. They need a senior nurse. They would "
    "pay me $60k. My goal was $70k. The office is in Boston. I never did this before. My wife says go for it. TL;DR:"
)
SUMMARY = " Offer from Acme as a senior nurse. They pay $60k but I want $96k. Any advice?"

world = minqstar.World()
verdict = world.judge(read_post(POST), SUMMARY)
print(f"return {verdict.total:+.2f}, right: {', '.join(verdict.right)}, wrong: {', '.join(verdict.wrong)}")

# %% [markdown]
# The *return* of a summary is the sum of its rewards. DPO sees no reward and no return. It sees two whole summaries of
# a post, and which of them somebody preferred: the one with the larger return, most of the time.
#
# **Question.** The wrong number is written as the tokens "9", "6" and "k". Which of them earns the -1?

# %%
tokens = world.tokenizer.texts_of(world.tokenizer.encode_response(SUMMARY))
exact = world.exact(POST, SUMMARY)  # at beta = 0.5
for token, r in zip(tokens, exact.reward.tolist(), strict=True):
    if r:
        print(f"{token!r:12} {r:+.2f}")

# %% [markdown]
# The 6: only there is the number complete. Rewards of clauses and fillers stand on their last token, too.
#
# **Question.** V\*(s) is what can still be earned. Where on the way to "96k" does it fall, and where does it rise?

# %%
print(f"{'token':12} {'r':>6} {'V(s)':>6} {'V(s-next)':>9}")
for i in range(tokens.index("9") - 2, tokens.index("9") + 4):
    print(f"{tokens[i]!r:12} {exact.reward[i]:6.2f} {exact.value[i]:6.2f} {exact.value[i + 1]:9.2f}")

# %% [markdown]
# It falls at the 9: from then on the -1 is certain. It rises at the 6: the -1 has been paid, and lies behind. At "$"
# it falls by exactly what "$" has just earned: that clause's reward is not to come any more.
#
# A\* is all of that in one number (Eq. 10), and it is the log-ratio of two policies: beta log(pi\*/pi_ref).
#
# **Question.** A filler earns -0.40. What is " Any", its first token, charged: 0.40, less, or more?

# %%
print(f"{'token':12} {'r':>6} {'V(s)':>6} {'A*':>6}  what it decides")
for token, r, V, A, kind in zip(
    tokens, exact.reward.tolist(), exact.value[:-1].tolist(), exact.advantage.tolist(), exact.kind, strict=True
):
    print(f"{token!r:12} {r:6.2f} {V:6.2f} {A:6.2f}  {kind if kind != 'forced' else ''}")

# %% [markdown]
# More: 0.81. With " Any" the summary ends without "The office is in Boston.", which would have earned more. A\* counts
# what a token rules out. Most tokens decide nothing, and their A\* is 0.
#
# **Question.** Rewards and advantages differ at almost every token. How do their sums over the summary differ?

# %%
R, V0, A = exact.reward.sum(), exact.value[0], exact.advantage.sum()
print(f"sum of r {R:+.2f} = V*(s_0) {V0:+.2f} + sum of A* {A:+.2f}")
assert torch.isclose(R, V0 + A)

# %% [markdown]
# By V\*(s_0), the value of the post before the first word. It is the same for every summary of the post, so it cancels
# when two summaries are compared: a difference of sums of A\* *is* a difference of returns. That is why preferences
# between whole summaries can teach A\*.
#
# **Exercise.** Compute A\* of every token from r and V\* alone. `reward` holds L numbers, `value` L + 1: V\* before
# each token, and after the last.


# %% exercise
def advantages(reward: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The right side of Eq. 10, (L,)."""
    return reward  # not yet right: what about the future?


# %% check
for summary in (
    SUMMARY,
    " Offer from Globex. They pay $60k.",
    " I just got an offer from Acme. They pay $61k. Thoughts?",
):
    exact = world.exact(POST, summary)
    off = (advantages(exact.reward, exact.value) - exact.advantage).abs()
    i = int(off.argmax())
    assert off[i] < 1e-9, f"token {i} of {summary!r} is off by {off[i]:.2f}"
print("right: Eq. 10, to nine digits")
