"""A training run watched on its way, and what can be seen of a policy token by token."""

import torch
from torch import Tensor

from minqstar.evaluate import (
    MAX_NEW_TOKENS,
    decode_all,
    off_grammar_rate,
    pair_figures,
    rewards_and_truth,
)
from minqstar.lab.studies import ROWS, Lab, chunks
from minqstar.lm.model import GPT
from minqstar.search.decode import decode, sampler
from minqstar.search.evaluator import Network, log_probs
from minqstar.theory.qfunction import expected_implicit_reward, gap_figures, implicit_reward
from minqstar.training.data import PackedData, tokenize
from minqstar.training.scoring import ReferenceCache, score_groups
from minqstar.training.trainer import DPO, DPOConfig, Trainer


@torch.no_grad()
def log_policies(model: GPT, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """log pi (N, V) of every token that could stand in the place of each response token, nats."""
    out = []
    for start in range(0, len(prompts), ROWS):
        some = list(zip(prompts[start : start + ROWS], responses[start : start + ROWS], strict=True))
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + r) for p, r in some], batch_first=True)
        T = tokens.shape[1]
        places = [torch.arange(len(r)) + i * T + len(p) - 1 for i, (p, r) in enumerate(some)]
        out.append(log_probs(model, model(tokens, keep=torch.cat(places))))
    return torch.cat(out)


def leakage(lab: Lab, model: GPT) -> dict[str, float]:
    """Where draws of a policy leave the grammar: the share that does, and the probability of it at each token.

    The latter is a mean over the tokens of the first posts' two held-out responses, draws of pi_ref.
    """
    draws = decode_all(model, [group.prompt for group in lab.groups], lab.main.tokenizer.eos, 0)
    some = list(zip(lab.posts, lab.groups, strict=True))[: lab.scale.posts]
    both = [(post, group.prompt, response) for post, group in some for response in group.responses]
    log_pi = log_policies(model, [prompt for _, prompt, _ in both], [response for *_, response in both])
    allowed = torch.zeros_like(log_pi, dtype=torch.bool)
    at = 0
    for post, _, response in both:
        automaton = lab.world.automata[post.scenario]
        for state in automaton.walk(response)[0]:
            allowed[at, list(automaton.arc_of[state])] = True
            at += 1
    outside = log_pi.masked_fill(allowed, -torch.inf).double().logsumexp(-1).exp()
    verdicts = [lab.world.judge_tokens(post, draw.tokens) for post, draw in zip(lab.posts, draws, strict=True)]
    return {"off_grammar": off_grammar_rate(verdicts), "per_token": outside.mean().item()}


def course(lab: Lab, start: str) -> dict:
    """DPO from one of three references, measured at the marks."""
    return lab.piece(f"course_{start}", lambda: _course(lab, start))


def _course(lab: Lab, start: str) -> dict:
    reference = {
        "all": lambda: lab.main.reference, "chosen": lambda: lab.chosen_reference, "none": lambda: lab.base
    }[start]()  # fmt: skip
    config, dtype = DPOConfig(beta=lab.main.beta), lab.session.dtype
    groups, _ = tokenize(lab.pairs(lab.scale.study_pairs), lab.main.tokenizer, reference.config.block_size)
    packed = PackedData(groups, lab.main.tokenizer.pad, config.row_length)
    model = GPT(reference.config)
    model.load_state_dict(reference.state_dict())
    trainer = Trainer(model, packed, config, None, dtype, 0)
    with lab.session.progress("reference", len(packed)) as advance:
        trainer.objective = DPO(ReferenceCache(reference, packed, dtype, trainer.passes, advance), config.beta)
    marks = {max(1, round(share * trainer.steps)) for share in lab.scale.marks}
    watch = Watch(lab, reference, config.beta)
    history, measured = [], []
    with lab.session.progress(f"DPO {start}", trainer.steps) as advance:
        for metrics in trainer.run():
            history.append({name: metrics[name] for name in ("chosen_reward", "rejected_reward")})
            if trainer.step in marks:
                model.eval()
                measured.append({"step": trainer.step, **watch.measure(model, full=start == "all")})
                model.train()
            advance()
    return {"history": {name: [h[name] for h in history] for name in history[0]}, "measured": measured}


class Watch:
    """Draws of a reference, and what a policy that began there makes of them."""

    def __init__(self, lab: Lab, reference: GPT, beta: float):
        self.lab, self.beta = lab, beta
        n = 4
        prompts = [group.prompt for group in lab.groups][: lab.scale.draws // n]
        choose = sampler(torch.Generator().manual_seed(0))
        self.prompts, self.draws = [], []
        for some in chunks(prompts, ROWS):
            for prompt, line in zip(
                some, decode(Network(reference), some, lab.main.tokenizer.eos, MAX_NEW_TOKENS, choose, n), strict=True
            ):
                self.prompts += [prompt] * n
                self.draws += [draw.tokens for draw in line]
        self.log_ref = log_policies(reference, self.prompts, self.draws)
        self.ref_of_pairs = score_groups(reference, lab.groups, lab.main.tokenizer.pad)

    def measure(self, model: GPT, full: bool) -> dict:
        """Implicit returns of the reference's draws: their mean, its expectation by Eq. 16, and the difference.

        The two have one expectation, draw by draw: `difference` is the mean of the paired one, `standard_error` its
        own. With `full` also how near the rewards of held-out pairs are to A*, and what leaks from the grammar.
        """
        lab, lengths = self.lab, [len(draw) for draw in self.draws]
        log_pi = log_policies(model, self.prompts, self.draws)
        at, chosen = torch.arange(len(log_pi)), torch.tensor([token for draw in self.draws for token in draw])
        rewards = implicit_reward(log_pi[at, chosen].double(), self.log_ref[at, chosen].double(), self.beta)
        expected = torch.cat(
            [
                expected_implicit_reward(p.double(), r.double(), self.beta)
                for p, r in zip(log_pi.split(4096), self.log_ref.split(4096), strict=True)
            ]
        )
        returns, expectations = (
            torch.stack([part.sum() for part in values.split(lengths)]) for values in (rewards, expected)
        )
        paired = returns - expectations
        of_pairs = score_groups(model, lab.groups, lab.main.tokenizer.pad)
        found = {
            "drawn": returns.mean().item(),
            "expected": expectations.mean().item(),
            "difference": paired.mean().item(),
            "standard_error": (paired.std() / len(paired) ** 0.5).item(),
            **pair_figures(of_pairs, self.ref_of_pairs, self.beta),
        }
        if full:
            both = (of_pairs, self.ref_of_pairs, self.beta)
            learned, exact, _ = rewards_and_truth(lab.world, lab.posts, lab.groups, *both)
            found |= {"q_gap": gap_figures(learned, exact), "leak": leakage(lab, model)}
        return found
