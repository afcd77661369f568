"""Token credit on real language: somebody's chat model, on the world's facts, on posts by hand, on real preferences.

    python -m minqstar.lab.figures --only real --model MODEL --data prefs.jsonl more.jsonl

MODEL is a Hugging Face folder of a small chat model. It learns by DPO that one wrong fact makes a summary of the TL;DR
world worse, and is asked about other posts; then it learns from the files' pairs, and is asked about other prompts.
"""

import copy
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from minqstar.errors import require
from minqstar.evaluate import pair_figures, why_it_falls
from minqstar.lab.findings.by_hand import POSTS
from minqstar.lab.findings.credit import auroc
from minqstar.lab.findings.drawing import BLUE, GREY, ORANGE, RED, label, panels, ranges, styled
from minqstar.lab.findings.intervals import again, wilson
from minqstar.lab.findings.lab import Kept
from minqstar.lab.findings.likelihoods import smooth
from minqstar.lm.model import GPT
from minqstar.lm.pretrained import export
from minqstar.options import SMALL_STEPS
from minqstar.pair import load_pair
from minqstar.score import token_rewards
from minqstar.training.checkpoint import Run
from minqstar.training.data import Group, PackedData, tokenize
from minqstar.training.formats import Rows
from minqstar.training.scoring import ReferenceCache, score_groups, weights_hash
from minqstar.training.session import Session
from minqstar.training.trainer import DPO, DPOConfig, Trainer
from minqstar.world.posts import draw_post
from minqstar.world.slots import slots, with_facts, wrong_value
from minqstar.world.tldr import World

SEEDS, EDITED, ASKED = 3, 60, 20  # trainings on the world; pairs of each; held-out posts of each
TRAINED, HELD_OUT, WATCHED = 360, 200, 32  # real pairs; of those held out so many are looked at while training goes on
MARKS = (0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the training at which they are
LONGEST, BETA = 512, 0.1  # tokens of a prompt with an answer; reward units a nat
FEW = {"batch_tokens": 512, "row_length": 512, "schedule": "constant"}  # two or three pairs a step
FACTS = DPOConfig(**SMALL_STEPS | FEW, lr=1e-5, adam_lr=1e-5, beta=BETA)
PREFERENCES = DPOConfig(**SMALL_STEPS | {"batch_tokens": 2048}, lr=5e-6, adam_lr=5e-6, beta=BETA)


class Real(Kept):
    """Somebody's chat model and preference files, and a folder of what was computed of them before."""

    def __init__(self, model: Path, files: Sequence[Path], folder: Path):
        self.base = replace(load_pair(model, device="cpu", chat=True), beta=BETA)
        self.rows = [row for file in files for row in Rows(file)]
        require(all("chosen" in row for row in self.rows), "--data needs rows with chosen and rejected")
        key = repr([weights_hash(self.base.model), self.rows, FACTS, PREFERENCES, POSTS])
        super().__init__(folder, key)
        self.session = Session(self.base.tokenizer, "cpu")

    def groups(self, rows: list[dict]) -> tuple[list[Group], Counter[str]]:
        """Each pair as a group of its own, in the chat template; and how many are left out for which reason."""
        return tokenize(rows, self.base.tokenizer, LONGEST, share=False)

    def pair(self, policy: GPT) -> Run:
        """A policy with the model that it began as."""
        return replace(self.base, model=policy, reference=self.base.model)

    def tune(self, rows: list[dict], config: DPOConfig, seed: int, look: Callable[[int, int, GPT], None] | None = None):
        """DPO of a copy of the model on some pairs: the policy, and each step's metrics; `look` sees every step."""
        groups, _ = tokenize(rows, self.base.tokenizer, LONGEST)
        packed = PackedData(groups, self.base.tokenizer.pad, config.row_length)
        model, history = copy.deepcopy(self.base.model), []
        trainer = Trainer(model, packed, config, None, self.session.dtype, seed)
        with self.session.progress("reference", len(packed)) as advance:
            trainer.objective = DPO(ReferenceCache(model, packed, trainer.dtype, trainer.passes, advance), config.beta)
        with self.session.progress("DPO", trainer.steps) as advance:
            for metrics in trainer.run():
                history.append(metrics)
                if look:
                    look(trainer.step, trainer.steps, model)
                advance()
        return model.eval(), history

    @cached_property
    def split(self) -> tuple[list[dict], list[dict], Counter[str]]:
        """Pairs to train on and to be asked about, and why some are left out: no instruction is in both.

        An instruction is a prompt's first paragraph: some prompts differ only in what it is to be done with.
        """
        groups, left_out = self.groups(self.rows)
        rows = [row for row, group in zip(self.rows, groups.of_row, strict=True) if group >= 0]
        by_task: dict[str, list[dict]] = {}
        for row in rows:
            by_task.setdefault(row["prompt"].split("\n\n")[0], []).append(row)
        tasks, held_out = list(by_task.values()), []
        random.Random(0).shuffle(tasks)
        while tasks and len(held_out) < min(HELD_OUT, len(rows) // 3):
            held_out += tasks.pop()
        return list(chain.from_iterable(tasks))[:TRAINED], held_out, left_out


def compute(real: Real) -> dict:
    """What tokens earn on wrong facts, over all seeds, and what real preferences do."""
    seeds = [real.piece(f"facts_{seed}", lambda seed=seed: facts(real, seed)) for seed in range(SEEDS)]
    found = {where: summary([seed[where] for seed in seeds], where == "by_hand") for where in ("world", "by_hand")}
    course, pairs = real.piece("course", lambda: course_of(real)), real.piece("held_out", lambda: asked(real))
    return {**found, "loss": [seed["loss"] for seed in seeds], "preferences": {**course, **figures_of(pairs)}}


def edited_rows(world: World, split: str, count: int, seed: int) -> list[dict]:
    """Posts of the world, each with a right summary and the same one with one wrong fact."""
    rng, numbers, rows = random.Random(f"{seed} {split}"), np.random.default_rng([seed, len(split)]), []
    while len(rows) < count:
        post = draw_post(rng, split)
        right = with_facts(world, post, world.sample([post], numbers)[0][0], post.facts)
        stated = sorted({slot.fact for slot in slots(world, post, right)})
        if stated:
            fact = rng.choice(stated)
            wrong = with_facts(world, post, right, {fact: wrong_value(post, world, fact)})
            texts = (world.tokenizer.decode(ids).strip() for ids in (right, wrong))
            rows.append(dict(zip(("prompt", "chosen", "rejected"), (post.prompt, *texts), strict=True)))
    return rows


def by_hand_rows() -> list[dict]:
    """The posts in other words: `[right|wrong]` stands in each summary."""
    rows = []
    for subreddit, title, post, summed_up in POSTS:
        before, right, wrong, after = re.split(r"[\[|\]]", summed_up)
        prompt = f"SUBREDDIT: r/{subreddit} TITLE: {title} POST: {post} TL;DR:"
        rows.append({"prompt": prompt, "chosen": before + right + after, "rejected": before + wrong + after})
    return rows


def facts(real: Real, seed: int) -> dict:
    """One training on the world's wrong facts, and what it makes of its own and of other posts."""
    world = World()
    policy, history = real.tune(edited_rows(world, "train", EDITED, seed), FACTS, seed)
    asked_ = {"world": edited_rows(world, "test", ASKED, seed), "by_hand": by_hand_rows()}
    found = {where: credits(real.pair(policy), real.groups(rows)[0]) for where, rows in asked_.items()}
    return found | {"loss": [history[0]["loss"], history[-1]["loss"]]}


def credits(run_: Run, groups: Sequence[Group]) -> list[dict]:
    """For each pair what the first token earns in which right and wrong answer differ, and all tokens of the wrong."""
    found = []
    for right, wrong in token_rewards(run_, groups, [None] * len(groups)):
        at = next(i for i, (a, b) in enumerate(zip(right.ids, wrong.ids, strict=False)) if a != b)
        rewards, ref_logps = wrong.rewards.tolist(), wrong.ref_logps.tolist()
        here = {"at": at, "right": right.rewards[at].item(), "wrong": rewards[at], "margin": right.total - wrong.total}
        found.append({**here, "rewards": rewards, "ref_logps": ref_logps})
    return found


def summary(seeds: list[list[dict]], same: bool) -> dict:
    """All seeds' pairs: how often the right token earns more, its share of the margin, and who finds the wrong token.

    Intervals draw posts again; where all seeds were asked about the `same` ones, each with what every seed said of it.
    """
    posts = list(zip(*seeds, strict=True)) if same else [(pair,) for seed in seeds for pair in seed]
    pairs = [pair for post in posts for pair in post]
    found = {"points": [[p["wrong"], p["right"]] for p in pairs], "pairs": [len(seed) for seed in seeds]}
    found["above"] = [sum(p["right"] > p["wrong"] for p in seed) for seed in seeds]
    found["above_interval"] = wilson(sum(found["above"]) * len(posts) / len(pairs), len(posts))
    found["ranked"] = [sum(p["margin"] > 0 for p in seed) for seed in seeds]
    by_reward, by_surprise = partial_auroc("rewards"), partial_auroc("ref_logps")
    measures = {
        "difference": lambda of: float(np.mean([p["right"] - p["wrong"] for p in of])),
        "margin": lambda of: float(np.mean([p["margin"] for p in of])),
        "share": lambda of: sum(p["right"] - p["wrong"] for p in of) / sum(p["margin"] for p in of),
        "auroc_reward": by_reward, "auroc_surprise": by_surprise,
        "auroc_gain": lambda of: by_reward(of) - by_surprise(of),
    }  # fmt: skip
    for name, of in measures.items():
        interval = again(lambda some, of=of: of(list(chain(*some))), posts)
        found[name] = {"seeds": [of(seed) for seed in seeds], "all": of(pairs), "interval": interval}
    return found


def partial_auroc(name: str) -> Callable[[list[dict]], float]:
    """How well a low value finds the wrong token among all tokens of the wrong answers."""

    def of(pairs: list[dict]) -> float:
        low = np.array([p[name][p["at"]] for p in pairs])
        return auroc(low, np.concatenate([np.delete(p[name], p["at"]) for p in pairs]))

    return of


def course_of(real: Real) -> dict:
    """DPO on real pairs: returns of its batches, and at some steps what `why_it_falls` says of held-out pairs."""
    train, held_out, left_out = real.split
    some = list({row["prompt"]: row for row in held_out}.values())[:WATCHED]
    groups = real.groups(some)[0]
    reference, measured = score_groups(real.base.model, groups, real.base.tokenizer.pad), []

    def look(step: int, steps: int, policy: GPT):
        if step in {max(1, round(share * steps)) for share in MARKS}:
            now = score_groups(policy, groups, real.base.tokenizer.pad)
            found = why_it_falls(real.pair(policy), groups, now, reference) | pair_figures(now, reference, BETA)
            measured.append({"step": step, **found})

    policy, history = real.tune(train, PREFERENCES, 0, look)
    if not (real.folder / "policy").exists():
        export(policy, real.folder / "policy", real.base.tokenizer)
    returns = {name: smooth([m[name] for m in history], 30) for name in ("chosen_reward", "rejected_reward")}
    counts = {"rows": len(real.rows), "trained": len(train), "left_out": dict(left_out), "watched": len(some)}
    return {**counts, "steps": len(history), "history": returns, "measured": measured}


def asked(real: Real) -> dict:
    """Of each held-out pair its instruction's number; of both answers returns, EOS's rewards, log pi_ref, lengths."""
    held_out, policy = real.split[1], load_pair(real.folder / "policy", device="cpu").model
    groups = real.groups(held_out)[0]
    tasks = [row["prompt"].split("\n\n")[0] for row in held_out]
    known = {task: i for i, task in enumerate(dict.fromkeys(tasks))}
    lines = token_rewards(real.pair(policy), groups, [None] * len(groups))
    of = {
        "return": lambda one: one.total, "eos": lambda one: one.rewards[-1].item(),
        "ref_logp": lambda one: one.ref_logps.sum().item(), "length": lambda one: len(one.ids),
    }  # fmt: skip
    found = {name: [[get(one) for one in line] for line in lines] for name, get in of.items()}
    return {"task": [known[task] for task in tasks], **found}


def figures_of(pairs: dict) -> dict:
    """How often the chosen answer is ranked first, by whom; an interval draws whole instructions again."""
    returns, eos, logp, length = (np.array(pairs[name]) for name in ("return", "eos", "ref_logp", "length"))
    scores = {"policy": returns, "likelihood": logp, "likelihood a token": logp / length, "longer": length}
    task, accuracy = np.array(pairs["task"]), {}
    members = [np.flatnonzero(task == i) for i in range(task.max() + 1)]
    for name, score in scores.items():
        right = 0.5 + 0.5 * np.sign(score[:, 0] - score[:, 1])
        mean = lambda some, right=right: float(right[np.concatenate(some)].mean())  # noqa: E731
        accuracy[name] = {"all": mean(members), "interval": again(mean, members)}
    means = {"held_out": len(task), "instructions": len(members), "accuracy": accuracy}
    for name, of in {"reward": returns, "eos_reward": eos, "length": length}.items():
        means[f"chosen_{name}"], means[f"rejected_{name}"] = of.mean(0).tolist()
    return means


PLACES = {"world": ("the world's words", BLUE), "by_hand": ("other words, by hand", ORANGE)}
MEASURES = {"auroc_reward": "by a low reward", "auroc_surprise": "by a low log π_ref"}
RANKED_BY = {"policy": "return\nafter DPO", "longer": "length:\nthe longer", "likelihood": "log π_ref"}
RANKED_BY |= {"likelihood a token": "log π_ref\na token"}


@styled
def draw(found: dict):
    """Right against wrong tokens; who finds the wrong ones; returns during DPO; and who ranks held-out pairs."""
    message = "Wrong tokens cost in other words, too; but there the reference's surprise finds them better"
    figure, ((tokens, finds), (course, ranks)) = panels(message, 2, 2, height=3.2)
    for i, (where, (words, colour)) in enumerate(PLACES.items()):
        of = found[where]
        told = f"{words}: {sum(of['above'])} of {sum(of['pairs'])}"
        tokens.plot(*np.array(of["points"]).T, "o", color=colour, alpha=0.6, label=told)
        for x, name in enumerate(MEASURES):
            finds.plot([x + 0.3 * i - 0.05] * len(of[name]["seeds"]), of[name]["seeds"], ".", color=GREY, markersize=3)
        ranges(finds, np.arange(len(MEASURES)) + 0.3 * i - 0.15, [of[name] for name in MEASURES], colour, words)
    corner = [min(*tokens.get_xlim(), *tokens.get_ylim()), max(*tokens.get_xlim(), *tokens.get_ylim())]
    tokens.plot(corner, corner, color=GREY, linewidth=0.8)
    label(
        tokens,
        "Right tokens earn more than wrong ones in their place",
        "reward of the wrong token",
        "reward of the right token",
    )
    finds.set_xticks(range(len(MEASURES)), MEASURES.values())
    finds.margins(x=0.2)
    label(finds, "Who finds the wrong token in a wrong answer?", "", "AUROC")

    of = found["preferences"]
    for name, style, colour in (("chosen", "-", BLUE), ("rejected", "--", ORANGE)):
        course.plot(
            *np.array(of["history"][f"{name}_reward"]).T, style, color=colour, linewidth=1, label=f"{name}, batches"
        )
    kinds = {
        "chosen_reward": ("o", RED, "chosen, held out"),
        "chosen_expected_reward": ("s-", GREY, "−β KL(π_ref‖π) along them"),
    }
    for name, (style, colour, words) in kinds.items():
        course.plot(*np.array([[m["step"], m[name]] for m in of["measured"]]).T, style, color=colour, label=words)
    course.axhline(0, color="black", linewidth=0.8)
    label(
        course, f"DPO on {of['trained']} real pairs: chosen answers gain", "DPO steps", "implicit return, reward units"
    )
    ranges(ranks, range(len(RANKED_BY)), [of["accuracy"][name] for name in RANKED_BY], BLUE)
    ranks.axhline(0.5, color="black", linewidth=0.8)
    ranks.set_xticks(range(len(RANKED_BY)), RANKED_BY.values())
    ranks.margins(x=0.2)
    label(ranks, f"{of['held_out']} held-out pairs, ranked by", "", "share ranked rightly")
    tokens.legend()
    finds.legend()
    course.margins(y=0.3)
    course.legend(loc="lower left")
    return figure
