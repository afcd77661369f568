# %% [markdown]
# # What goes wrong in DPO, each made to happen
#
# A tiny transformer is trained on a handful of sentences, once for each symptom. All cells together take about half a
# minute, and each of them runs alone after the first one. The names of figures are those of the glossary
# (`minqstar/training/README.md`), so they can be looked up in `metrics.jsonl` and `summary.json` of any run.

# %% to train something small
import copy
import itertools
import random
from pathlib import Path

import torch

import minqstar
from minqstar.evaluate import evaluate
from minqstar.lm.model import GPT, GPTConfig
from minqstar.lm.tokenizer import load_tokenizer
from minqstar.training.checkpoint import Run
from minqstar.training.data import PackedData, tokenize
from minqstar.training.scoring import ReferenceCache
from minqstar.training.trainer import DPO, SFT, DPOConfig, SFTConfig, Trainer
from minqstar.world.posts import read_post

TOKENIZER = load_tokenizer()


def train(rows: list[dict], beta: float = 0.5, **config) -> tuple[minqstar.QFunction, list[dict]]:
    """SFT on all answers of some pairs, then DPO: the two models, and the metrics of each DPO step."""
    data = PackedData(tokenize(rows, TOKENIZER, 64)[0], TOKENIZER.pad, 64)
    few = {"epochs": 1e-6, "row_length": 64, "batch_tokens": 1024}
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_embd=32, vocab_size=TOKENIZER.n_vocab, block_size=64))
    list(Trainer(model, data, SFTConfig(min_steps=120, **few), SFT(), torch.float32, 0).run())
    reference, config = copy.deepcopy(model), DPOConfig(beta=beta, min_steps=60, **few, **config)
    trainer = Trainer(model, data, config, None, torch.float32, 0)
    trainer.objective = DPO(ReferenceCache(reference, data, torch.float32, trainer.passes), beta)
    steps = list(trainer.run())
    return minqstar.QFunction(Run(Path("symptom"), {}, TOKENIZER, model, reference, beta)), steps


def pairs(prompt: str, best_first: list[str]) -> list[dict]:
    """All pairs of some answers, the better one chosen, each four times."""
    return [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in itertools.combinations(best_first, 2)] * 4


def say(what: str, figures: dict, *names: str):
    print(f"{what}:", ", ".join(f"{name} {figures[name]:.3f}" for name in names))


PETS = [" cat", " dog", " fish", " snake"]

# %% chosen rewards fall
print("\nchosen rewards fall")
rows = pairs("My pet is a", PETS)
q, steps = train(rows, beta=0.1, lr=0.01, adam_lr=0.01)
say("last step", steps[-1], "accuracy", "margin", "chosen_reward")
figures = evaluate(q.run, rows)
say("evaluation", figures, "chosen_reward", "chosen_expected_reward")  # the second is -beta KL(pi_ref || pi), Eq. 16

# %% it repeats or never stops
print("\nit repeats or never stops")
laughs = [" ha" * n for n in range(1, 7)]
found = {}
for which, best_first in (("longer", laughs[::-1]), ("shorter", laughs)):
    rows = pairs("Laugh:", best_first)
    q, steps = train(rows, lr=0.003, adam_lr=0.003)
    found[which] = evaluate(q.run, rows)
    names = ("chosen_eos_reward", "rejected_eos_reward", "mean_length", "ref_mean_length")
    say(f"the {which} answer preferred", found[which], *names)
    print(f"  and it writes {q.search('Laugh:', 'sample', max_new_tokens=20).text!r}")

# %% loss stuck at ln 2
print("\nloss stuck at ln 2")
coin = random.Random(0)
flipped = [{"prompt": "My pet is a", "chosen": a, "rejected": b} for a, b in (coin.sample(PETS, 2) for _ in range(150))]
by_coin = train(flipped)[1]
say("labels by a coin", by_coin[-1], "loss", "accuracy", "margin")
slow = train(pairs("My pet is a", PETS), lr=1e-7, adam_lr=1e-7)[1]
say("learning rate 1e-7", slow[-1], "loss", "accuracy", "margin")
ranked = train([{"prompt": "My pet is a", "ranked": PETS}] * 8)[1]
say("rankings of four, first step", ranked[0], "loss")  # ln 24: where they begin, and no symptom
say("rankings of four, last step", ranked[-1], "loss")

# %% accuracy 1 and bad text
print("\naccuracy 1 and bad text")
rows = pairs("My pet is a", [" cat, and it sleeps.", " dog, and it barks."])
last, written = {}, {}
for lr in (0.05, 0.002):
    q, steps = train(rows, lr=lr, adam_lr=lr)
    last[lr], written[lr] = steps[-1], q.search("My pet is a", max_new_tokens=20).text
    say(f"learning rate {lr}", last[lr], "loss", "accuracy", "margin", "chosen_reward")
    print(f"  and it writes {written[lr]!r}")

# %% truncated responses
print("\ntruncated responses")
POST = (
    "SUBREDDIT: r/jobs TITLE: Is this a fair deal? POST: I had a call from Acme. They need a senior nurse. They would "
    "pay me $60k. My goal was $70k. The office is in Boston. I never did this before. My wife says go for it. TL;DR:"
)
SUMMARY = " Offer from Acme as a senior nurse. They pay $60k."
world = minqstar.World()
exact = world.exact(POST, SUMMARY)
cut = 7  # stopped after seven tokens, in the middle of a sentence
R, A, V = exact.reward[:cut].sum(), exact.advantage[:cut].sum(), exact.value
print(f"sum of r {R:+.2f}, V*(s_0) + sum of A* {V[0] + A:+.2f}; V* where it stopped is {V[cut]:+.2f}, not 0")
tokens = TOKENIZER.encode_response(SUMMARY)[:cut]
print(f"the judge's return of it, which is not complete: {world.judge_tokens(read_post(POST), tokens).total}")
kept, skipped = tokenize(pairs("My pet is a", PETS), TOKENIZER, block_size=4)
print(f"rows that do not fit the context are never cut: {len(kept)} kept, skipped: {dict(skipped)}")

# %% NaN
print("\nNaN")
try:
    train(pairs("My pet is a", PETS), lr=1e20)
except minqstar.UserError as error:
    stopped = str(error)
    print(stopped)
forbidden = torch.tensor(-torch.inf)  # log of a probability that is 0 under both policies
ratio = forbidden - forbidden
on_support = torch.where(forbidden > -torch.inf, ratio, 0.0)
print(f"log 0 - log 0 is {ratio.item()}; on the support of pi_ref alone, by torch.where, it is {on_support.item()}")
