"""What the findings share: the main run, runs that differ from it in one thing, and what the oracle says of responses.

What takes long is a *piece*: computed once, kept in a folder, and read from there afterwards.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from minqstar.errors import require
from minqstar.evaluate import MAX_NEW_TOKENS, fact_error_rate, oracle
from minqstar.files import replace_file
from minqstar.lab.findings.intervals import interval
from minqstar.lm.model import GPT, GPTConfig
from minqstar.pipeline import Data, Options, begin, dpo, fingerprint, sft
from minqstar.pipeline import main as train
from minqstar.search.decode import Choose, Decoded, decode, sampler
from minqstar.search.evaluator import Evaluator, log_probs
from minqstar.theory.mdp import solve
from minqstar.theory.qfunction import implicit_reward
from minqstar.training.checkpoint import Run, differences, held_out, load_run, save_tensors
from minqstar.training.data import Group, PackedData, tokenize
from minqstar.training.scoring import ReferenceCache, score_groups, weights_hash
from minqstar.training.session import Session
from minqstar.training.trainer import DPO, SFT, DPOConfig, Objective, SFTConfig, Trainer
from minqstar.world.posts import post_of
from minqstar.world.tldr import DataConfig, draw_rows, world_hash

ROWS = 64  # scored or searched together
CPU = torch.device("cpu")
PAIRS = DataConfig(ranked=2)  # what the findings learn from, as the paper does


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured."""

    pairs: tuple[int, ...]  # of the runs that differ in their number
    study_pairs: int  # of all others but the main run
    betas: tuple[float, ...]  # 0.5, the main run's, among them
    biased_betas: tuple[float, ...]
    posts: int  # searched and sampled
    marks: tuple[float, ...]  # shares of a training run after which it is measured
    draws: int  # of the reference, for the expectation of its rewards
    steps: int  # of the other references' training
    larger: tuple[int, int, int]  # layers, heads and channels of the larger model
    widths: tuple[int, ...] = (1, 2, 3, 5, 7, 10, 20)  # of beams
    alphas: tuple[float, ...] = (0.0, 1.0)  # of beams: summed, and divided by length as transformers does by default
    mixes: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # alpha of proxy tuning


FULL = Scale(
    pairs=(1000, 2000, 4000, 8000, 16000, 32000, 64000), study_pairs=16000, betas=(0.25, 0.5, 1.0),
    biased_betas=(0.25, 0.5, 1.0), posts=256, marks=(0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0), draws=1024,
    steps=750, larger=(6, 3, 192),
)  # fmt: skip
QUICK = Scale(
    pairs=(1000, 4000), study_pairs=4000, betas=(0.5, 1.0), biased_betas=(0.5,), posts=64,
    marks=(0.1, 0.3, 1.0), draws=512, steps=250, larger=(4, 3, 192), widths=(1, 2, 5, 20), mixes=(0.0, 0.5, 1.0, 2.0),
)  # fmt: skip


class Kept:
    """What was computed before, each piece as JSON in a folder named after the `key` of all that decides it."""

    def __init__(self, folder: Path, key: str):
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()[:8]
        self.folder.mkdir(parents=True, exist_ok=True)

    def piece(self, name: str, make: Callable[[], dict]) -> dict:
        """What `make` gives, computed once."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        found = make()
        replace_file(path, lambda new: new.write_text(json.dumps(found, allow_nan=False)))
        return found


class Lab(Kept):
    """The main run, the runs beside it, and what was computed before.

    The folder is named after all that decides what is kept there but the code: the main run, its held-out rows, the
    defaults of training, the world, the scale. Whoever changes the code removes it.
    """

    def __init__(self, runs: Path, folder: Path, scale: Scale):
        self.runs, self.scale = runs, scale
        if not (runs / "dpo").exists():
            train(Options(runs=runs, world=PAIRS, resume=any(runs.glob("*.part"))))
        self.main = load_run(runs / "dpo", CPU)
        require(self.main.reference is not None, f"{runs / 'dpo'} is not a DPO run")
        sft_run = load_run(runs / "sft", CPU)
        same = weights_hash(sft_run.model) == weights_hash(self.main.reference)
        require(same, f"{runs / 'sft'} is not the reference of {runs / 'dpo'}: train both anew, or give another --runs")
        self.rows = held_out(self.main)
        self.posts = [post_of(row) for row in self.rows]
        self.world = oracle(self.main, self.posts)
        ours = self.world is not None and self.world.wrote(self.rows)
        require(ours, f"{runs / 'dpo'} was not trained on today's TL;DR world; give another --runs")
        self.groups, skipped = tokenize(self.rows, self.main.tokenizer, self.main.model.config.block_size, share=False)
        require(not skipped, f"{runs / 'dpo'}: of its held-out rows {skipped.total()} do not fit its model")
        weights = [weights_hash(model) for model in (self.main.model, self.main.reference)]
        trained = [self.main.beta, DPOConfig(), SFTConfig(), PAIRS, world_hash()]
        super().__init__(folder, repr([*weights, *trained, scale, self.rows]))
        self.session = self.beside()[1]

    def beside(self, **changes) -> tuple[Options, Session]:
        """Options and a session like the main run's, to train beside it."""
        vocabulary = self.runs / "dpo" / "vocab.tiktoken"
        like = Options(runs=self.folder, model=self.main.model.config, vocabulary=vocabulary, resume=True)
        return begin(replace(like, **changes))

    def pairs(self, count: int, bias: float = 0.0) -> list[dict]:
        return list(draw_rows(self.world, replace(PAIRS, pairs=count, length_bias=bias), "train"))

    @cached_property
    def main_is_default(self) -> bool:
        """Whether the main run is what training with all defaults but its beta gives."""
        options, session = self.beside(dpo=DPOConfig(beta=self.main.beta))
        groups, _ = tokenize(self.pairs(PAIRS.pairs), session.tokenizer, options.model.block_size)
        packed = PackedData(groups, session.tokenizer.pad, options.dpo.row_length)
        return not differences(self.main.config, fingerprint(options, session, "dpo", packed))

    def run(self, beta: float | None = None, pairs: int = 0, bias: float = 0.0, reference: Path | None = None) -> Run:
        """A DPO run with all defaults but these, trained unless it exists: the main one's beta, the studies' pairs."""
        beta, pairs = beta or self.main.beta, pairs or self.scale.study_pairs
        like_main = (beta, pairs, bias, reference) == (self.main.beta, PAIRS.pairs, 0.0, None)
        if like_main and self.main_is_default:
            return self.main
        of = f"_{reference.name}" if reference else ""
        out = self.folder / f"dpo_{pairs}_beta{beta:g}_bias{bias:g}{of}"
        if not out.exists():
            model = load_run(reference, CPU).model.config if reference else self.main.model.config
            options, session = self.beside(dpo=DPOConfig(beta=beta), model=model)
            self.session.console.print(f"training {out}")
            rows = tokenize(self.pairs(pairs, bias), session.tokenizer, model.block_size)
            data = Data(None, rows, self.rows)
            dpo(options, session, data, reference or self.runs / "sft", out)
        return load_run(out, CPU)

    def reference(self, name: str, rows: Callable[[], list[dict]], model: GPTConfig, **config) -> Path:
        """A reference trained otherwise than the main one."""
        out = self.folder / name
        if not out.exists():
            options, session = self.beside(stage="sft", sft=SFTConfig(**config), model=model)
            self.session.console.print(f"training {out}")
            sft(options, session, Data(tokenize(rows(), session.tokenizer, model.block_size), None, self.rows), out)
        return out

    @cached_property
    def chosen_reference(self) -> GPT:
        """SFT on the chosen answers only."""
        rows = lambda: self.pairs(self.scale.study_pairs)  # noqa: E731
        how = {"on": "chosen", "epochs": 1e-6, "min_steps": self.scale.steps}
        return load_run(self.reference("sft_chosen", rows, self.main.model.config, **how), CPU).model

    @cached_property
    def larger_reference(self) -> Path:
        """SFT of a larger model."""
        layers, heads, channels = self.scale.larger
        model = replace(self.main.model.config, n_layer=layers, n_head=heads, n_embd=channels)
        rows = lambda: list(draw_rows(self.world, PAIRS, "sft"))  # noqa: E731
        return self.reference("sft_larger", rows, model, epochs=1e-6, min_steps=self.scale.steps)

    @cached_property
    def base(self) -> GPT:
        """A model without SFT: it has read posts, but no summary."""
        tokenizer = self.main.tokenizer
        prompts = {row["prompt"] for row in self.pairs(self.scale.study_pairs)}
        texts = [tokenizer.encode(prompt) for prompt in sorted(prompts)]
        data = PackedData([Group(ids[:1], (ids[1:],)) for ids in texts], tokenizer.pad, 360)
        torch.manual_seed(0)
        model = GPT(self.main.model.config)
        trainer = Trainer(model, data, SFTConfig(epochs=1e-6, min_steps=200), SFT(), self.session.dtype, 0)
        with self.session.progress("base", trainer.steps) as advance:
            for _ in trainer.run():
                advance()
        return model.eval()

    def course(self, start: str, other: Objective | None = None) -> tuple[dict[str, list[float]], dict[int, GPT]]:
        """DPO, or an `other` objective, from a reference trained on "all" answers, the "chosen" ones, or on "none".

        What it went through, by name, for each step: the mean implicit return of its batch's chosen and rejected
        answers, reward units. And the policy after some steps (the scale's marks), the reference itself after none.
        """
        path = self.folder / f"course_{start}{f'_{type(other).__name__}' if other else ''}.safetensors"
        if not path.exists():
            save_tensors(self._course(start, other), path)
        kept = load_file(path)
        history = {name: kept.pop(name).tolist() for name in ("chosen_reward", "rejected_reward")}
        policies = {}
        for step in sorted({int(name.split("/")[0]) for name in kept}):
            policies[step] = GPT(self.main.model.config).eval()
            weights = {name.split("/")[1]: weight for name, weight in kept.items() if name.startswith(f"{step}/")}
            policies[step].load_state_dict(weights)
        return history, policies

    def _course(self, start: str, objective: Objective | None) -> dict[str, Tensor]:
        """A course as tensors: its history by name, its policies' weights as step/name."""
        of = {"all": lambda: self.main.reference, "chosen": lambda: self.chosen_reference, "none": lambda: self.base}
        reference, config = of[start](), DPOConfig(beta=self.main.beta)
        groups, _ = tokenize(self.pairs(self.scale.study_pairs), self.main.tokenizer, reference.config.block_size)
        packed = PackedData(groups, self.main.tokenizer.pad, config.row_length)
        model = copy.deepcopy(reference)
        trainer = Trainer(model, packed, config, objective, self.session.dtype, 0)
        if objective is None:
            with self.session.progress("reference", len(packed)) as advance:
                cache = ReferenceCache(reference, packed, self.session.dtype, trainer.passes, advance)
            trainer.objective = DPO(cache, config.beta)
        marks = {max(1, round(share * trainer.steps)) for share in self.scale.marks}
        kept = {f"0/{name}": weight for name, weight in reference.state_dict().items()}
        history = []
        with self.session.progress(f"training from {start}", trainer.steps) as advance:
            for metrics in trainer.run():
                history.append(metrics)
                if trainer.step in marks:
                    kept |= {f"{trainer.step}/{name}": w.clone() for name, w in model.state_dict().items()}
                advance()
        return kept | {name: torch.tensor([m[name] for m in history]) for name in ("chosen_reward", "rejected_reward")}

    def returns(self, run_: Run, groups: list[Group]) -> list[list[float]]:
        """Of each group its responses' implicit returns, sum beta log(pi/pi_ref), reward units."""
        both = (score_groups(model, groups, run_.tokenizer.pad) for model in (run_.model, run_.reference))
        return [
            [implicit_reward(p, r, run_.beta).sum().item() for p, r in zip(*of_group, strict=True)]
            for of_group in zip(*both, strict=True)
        ]

    def values(self, beta: float, bias: float = 0.0) -> np.ndarray:
        """Exact V*(s_0) of every post, reward units, of the labeller's reward: the true one and `bias` a token."""
        found = np.zeros(len(self.posts))
        for _, places, mdp in self.world.tables(self.posts):
            reward = torch.where(mdp.token >= 0, mdp.reward + bias, 0.0)
            found[places] = solve(replace(mdp, reward=reward), beta).V[:, 0]
        return found


def chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
def log_policies(model: GPT, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """log pi (N, V) of every token that could stand in the place of each response token, nats."""
    out = []
    for some in chunks(list(zip(prompts, responses, strict=True)), ROWS):
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + r) for p, r in some], batch_first=True)
        T = tokens.shape[1]
        places = [torch.arange(len(r)) + i * T + len(p) - 1 for i, (p, r) in enumerate(some)]
        out.append(log_probs(model, model(tokens, keep=torch.cat(places))))
    return torch.cat(out)


def outcome(lab: Lab, responses: list[Decoded], bias: float = 0.0, learned: np.ndarray | None = None) -> dict:
    """What the oracle says of one response to each of the first posts.

    A response off the grammar has no return, and loses against the preferred summary. Returns are means over those
    that stay in the grammar, None if none does: the true one, the labeller's (with its `bias` for each token), and the
    `learned` ones (N,), if they are given.
    """
    posts, rows = lab.posts[: len(responses)], lab.rows[: len(responses)]
    preferred = np.array([lab.world.judge(post, row["chosen"]).total for post, row in zip(posts, rows, strict=True)])
    verdicts = [lab.world.judge_tokens(post, r.tokens) for post, r in zip(posts, responses, strict=True)]
    total = np.array([verdict.total for verdict in verdicts])
    length = np.array([len(response.tokens) for response in responses])
    wins = (total > preferred) + 0.5 * (total == preferred)
    kept = ~np.isnan(total)
    returns = {"true_return": total, "labelled_return": total + bias * length}
    returns |= {"learned_return": learned} if learned is not None else {}
    return {
        "win_rate": float(wins.mean()),
        "win_interval": interval(wins),
        "length": float(length.mean()),
        "off_grammar": float(1 - kept.mean()),
        "fact_errors": fact_error_rate(verdicts),
        **{name: float(of[kept].mean()) if kept.any() else None for name, of in returns.items()},
    }


def sampled(lab: Lab, evaluator: Evaluator, choose: Choose | None = None) -> dict:
    """The outcome of a draw at temperature 1 for each post, or of what else `choose` makes."""
    choose = choose or sampler(torch.Generator().manual_seed(0))
    prompts = [group.prompt for group in lab.groups]
    draws: list[Decoded] = []
    with lab.session.progress("sampling", len(prompts)) as advance:
        for some in chunks(prompts, ROWS):
            draws += [line[0] for line in decode(evaluator, some, lab.main.tokenizer.ends, MAX_NEW_TOKENS, choose)]
            advance(len(some))
    return outcome(lab, draws)
