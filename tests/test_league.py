"""The league: its objectives against naive twins, its figures where the truth is known, and its whole command."""

import json
import random
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, random_model
from test_figures import readable

from minqstar.errors import UserError
from minqstar.lab.findings.lab import Scale
from minqstar.lab.league import __main__ as command
from minqstar.lab.league import study
from minqstar.lab.league.measure import Truth
from minqstar.lab.league.methods import METHODS
from minqstar.lab.league.objectives import (
    KTO,
    TDPO,
    Headed,
    Residual,
    RewardHead,
    divergence,
    noisy_returns,
    prefix_numbers,
    token_credit,
)
from minqstar.lab.league.ppo import PPOConfig, look, paid_at_the_end, paid_truly, policy_and_value
from minqstar.lab.league.studies import STUDIES
from minqstar.runchecks import plain_logits
from minqstar.search.decode import Decoded
from minqstar.training.data import Group, PackedData, tokenize
from minqstar.training.optim import OptimConfig, Optimizer
from minqstar.training.scoring import token_logps
from minqstar.training.trainer import DPOConfig, update
from minqstar.world.posts import post_of, read_post
from minqstar.world.tldr import BETA, DataConfig, draw_rows

PAD = 0


def some_pairs(seed: int = 0, count: int = 5) -> PackedData:
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(1, 23) for _ in range(rng.randint(low, high))]  # noqa: E731
    groups = [Group(draw(1, 5), tuple(draw(2, 6) for _ in range(4)), sizes=(2, 2)) for _ in range(count)]
    return PackedData(groups, PAD, 60)


def headed(seed: int = 0) -> Headed:
    model = Headed.like(random_model(seed))
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    return model.double()


def sums_of(objective, model, data) -> dict:
    rows = np.arange(len(data))
    batch = data.batch(rows)
    return objective.sums(objective.read(model, batch), batch, rows)


def naive(model, data) -> list[tuple[list[int], list[int], torch.Tensor]]:
    """Of each response, in the data's order, its prompt, its tokens, and the logits (L, V) that predict them."""
    groups = [data.groups[int(g)] for g in data.order]
    return [(g.prompt, r, plain_logits(model, g.prompt, r)) for g in groups for r in g.responses]


def test_a_policy_that_is_the_reference_has_the_losses_known_beforehand():
    data, model = some_pairs(), random_model(0)
    rows = len(data.groups) * 2
    assert sums_of(TDPO(model, 0.5, 0.5), model, data)["loss"].item() == pytest.approx(rows * np.log(2), rel=1e-5)
    assert sums_of(KTO(model, 0.5), model, data)["loss"].item() == pytest.approx(2 * rows * 0.5, rel=1e-5)
    rewards = torch.randn(data.num_scored)
    returns = torch.randn(2 * rows)
    whole = sums_of(Residual(model, 0.5, data, rewards, returns), model, data)["loss"]
    assert whole.item() == pytest.approx((returns**2).sum().item(), rel=1e-5)
    steps = sums_of(Residual(model, 0.5, data, rewards, None), model, data)["loss"]
    assert steps.item() == pytest.approx((rewards**2).sum().item(), rel=1e-5)


def test_residuals_and_divergences_equal_those_of_responses_alone():
    data, model, reference, beta = some_pairs(1), random_model(1).double(), random_model(2).double(), 0.7
    rewards, returns = torch.randn(data.num_scored).double(), torch.randn(4 * len(data.groups)).double()
    whole, steps, kl, at = 0.0, 0.0, [], 0
    pairs = zip(naive(model, data), naive(reference, data), returns, strict=True)
    for (_, response, ours), (_, _, theirs), R in pairs:
        chosen = torch.arange(len(response)), torch.tensor(response)
        log_pi, log_ref = ours.log_softmax(-1), theirs.log_softmax(-1)
        A = beta * (log_pi - log_ref)[chosen]
        V = torch.cat((beta * (ours.logsumexp(-1) - theirs.logsumexp(-1)), torch.zeros(1, dtype=torch.float64)))
        whole += (V[0] + A.sum() - R) ** 2
        steps += ((A + V[:-1] - V[1:] - rewards[at : at + len(response)]) ** 2).sum()
        at += len(response)
        kl.append((log_ref.exp() * (log_ref - log_pi)).sum())
    assert sums_of(Residual(reference, beta, data, rewards, returns), model, data)["loss"].item() == pytest.approx(
        whole.item(), rel=1e-4
    )
    assert sums_of(Residual(reference, beta, data, rewards, None), model, data)["loss"].item() == pytest.approx(
        steps.item(), rel=1e-4
    )
    objective, batch = TDPO(reference, beta, 0.5), data.batch(np.arange(len(data)))
    read = objective.read(model, batch)
    found = torch.zeros(len(kl)).index_add(0, batch.response, divergence(read.reference, read.policy))
    assert torch.allclose(found.double(), torch.stack(kl), rtol=1e-4)


def test_a_heads_credit_is_what_it_says_of_each_prefix_alone():
    data, model = some_pairs(2), headed()
    batch = data.batch(np.arange(len(data)))
    before, after = prefix_numbers(model, batch)
    credit, at = token_credit(before, after, batch), 0
    returns = RewardHead().read(model, batch)
    for place, (prompt, response, _) in enumerate(naive(model, data)):
        say = lambda ids: model.head(model(torch.tensor([ids])))[0, -1, 0]  # noqa: E731
        said = torch.stack([say(prompt + response[:i]) for i in range(len(response) + 1)]).float()
        assert torch.allclose(credit[at : at + len(response)], said.diff(), atol=1e-5)
        assert returns[place].item() == pytest.approx(said[-1].item(), abs=1e-5)
        at += len(response)


def test_a_head_is_trained_where_the_tied_embedding_has_no_other_gradient():
    data, model = some_pairs(3), Headed.like(random_model(0))
    optimizer, rows = Optimizer(model, OptimConfig(lr=0.01, adam_lr=0.01)), np.arange(len(data))
    batches = [(rows, data.batch(rows))]
    losses = [update(model, optimizer, RewardHead(), batches, torch.float32, 1.0)["loss"] for _ in range(30)]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[-1] < 0.3


def test_noise_is_a_labellers_own():
    """A labeller who orders returns by it has Bradley-Terry preferences; steps bear noise of the same variance."""
    data = PackedData([Group([1], ([2, 3], [4, 5, 6]), sizes=(2,)) for _ in range(20_000)], PAD, 60)
    true = torch.tensor([0.5, 0.2, 0.1, -0.3, 0.1] * 20_000)
    steps, returns = noisy_returns(true, data, np.random.default_rng(0))
    first, second = returns.view(-1, 2).T
    assert (first > second).float().mean().item() == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.01)
    assert first.mean().item() == pytest.approx(0.7, abs=0.03)
    noise = (steps - true).view(-1, 5)
    for part in (noise[:, :2], noise[:, 2:]):
        assert part.sum(-1).var().item() == pytest.approx(np.pi**2 / 6, rel=0.05)


def test_what_a_round_of_ppo_draws_is_worth():
    """With lambda 1 the advantage is what comes less what the critic expected, token by token."""
    data, model, reference = some_pairs(4), headed(1).float(), random_model(5)
    batch = data.batch(np.arange(len(data)))
    config = PPOConfig(lam=1.0, beta=0.7)
    with torch.no_grad():
        drawn, told = look(model, reference, paid_at_the_end(headed(2).float()), batch, config)
        _, value = policy_and_value(model, batch)
        ratio = 0.7 * (token_logps(model, batch) - token_logps(reference, batch))
        reward = RewardHead().read(headed(2).float(), batch)
    assert torch.allclose(drawn.logps, token_logps(model, batch), atol=1e-5)
    assert told["price"] == pytest.approx(ratio.sum().item(), abs=1e-3)
    for i in range(len(reward)):
        mine = (batch.response == i).nonzero()[:, 0]
        for k, t in enumerate(mine.tolist()):
            comes = reward[i] - ratio[mine[k:]].sum()
            assert drawn.advantage[t].item() == pytest.approx((comes - value[t]).item(), abs=1e-3)
            assert drawn.value[t].item() == pytest.approx(comes.item(), abs=1e-3)


@pytest.fixture
def pairs(world) -> tuple[list, list]:
    rows = list(draw_rows(world, DataConfig(held_out=24), "test"))
    groups, _ = tokenize(rows, world.tokenizer, 256, share=False)
    return [post_of(row) for row in rows], groups


def test_the_world_pays_true_returns(world, pairs):
    posts, groups = pairs
    groups = [group._replace(responses=(*group.responses, [5, 6, 7]), sizes=(1, 1, 1)) for group in groups]
    data = PackedData(groups, world.tokenizer.pad, 360)
    batch = data.batch(np.arange(len(data)))
    paid = paid_truly(world, world.tokenizer)(batch)
    found = torch.zeros(3 * len(groups)).index_add(0, batch.response, paid).view(-1, 3)
    for place, g in enumerate(data.order):
        expected = [world.judge_tokens(posts[g], response).total for response in groups[g].responses[:2]]
        assert found[place].tolist() == pytest.approx([*expected, -2.0], abs=1e-6)


def test_exact_rewards_are_exactly_right_and_a_scale_is_taken_out(world, pairs):
    truth = Truth(world, *pairs, BETA)
    sides = [world.exact_all(pairs[0], [group.responses[side] for group in pairs[1]], BETA) for side in (0, 1)]

    def exact(times: float):
        return lambda _: [[times * one.advantage for one in both] for both in zip(*sides, strict=True)]

    found = truth.figures(exact(1.0))
    assert found["r2"] == pytest.approx(1.0) and found["auroc"] == 1.0 and found["scale"] == pytest.approx(1.0)
    assert found["return_correlation"] == pytest.approx(1.0) and found["spread"] < 1e-9
    double = truth.figures(exact(2.0))
    assert double["r2"] < 0.5 and double["r2_scaled"] == pytest.approx(1.0) and double["scale"] == pytest.approx(0.5)
    nothing = truth.figures(exact(0.0))
    assert nothing["r2_scaled"] is None and nothing["return_correlation"] is None and nothing["auroc"] == 0.5


SMALL = Scale(
    pairs=(16, 32), study_pairs=32, betas=(0.5,), biased_betas=(), posts=4, marks=(1.0,), draws=16, steps=2,
    larger=(1, 1, 16),
)  # fmt: skip


@pytest.mark.parametrize("name", command.PICTURES)
def test_the_committed_numbers_make_readable_pictures(name):
    found = json.loads((ROOT / "data/results/league.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = command.PICTURES[name](found if name == "league" else found[name])
        figure.draw_without_rendering()
    readable(figure)
    assert (command.place(ROOT / "data/results/league.json", name)).stat().st_size < 200_000


@pytest.mark.slow
def test_the_whole_league_small_and_again_without_training(main_run, world, monkeypatch):
    """Its models are of random weights, which never say an end: PPO gets draws of the grammar in place of theirs."""

    def draws(_, prompts, ends, limit, choose, n):
        posts = [read_post(world.tokenizer.decode(prompt)) for prompt in prompts]
        lines = [world.sample(posts, np.random.default_rng(i))[0] for i in range(n)]
        return [[Decoded(ids, [0.0] * len(ids), False) for ids in line] for line in zip(*lines, strict=True)]

    monkeypatch.setattr("minqstar.lab.league.ppo.decode", draws)
    monkeypatch.setattr("minqstar.lab.league.methods.DPOConfig", partial(DPOConfig, min_steps=2))
    monkeypatch.setattr(command, "QUICK", SMALL)
    monkeypatch.setitem(study.SIZES, True, replace(study.SIZES[True], rounds=1, looks=1, watched=4))
    options = command.Options(quick=True, runs=main_run, out=main_run / "results")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        command.main(options)
    found = json.loads((options.out / "league.json").read_text())
    assert list(found) == ["of", "methods", *STUDIES] and list(found["methods"]) == list(METHODS)
    for name in ("league", "league_robust", "league_squeeze"):
        assert (options.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(study, "train", None)  # whatever trains would fail
    command.main(options)
    assert json.loads((options.out / "league.json").read_text()) == found


def test_a_league_of_a_head_alone_is_drawn():
    """It has no policy, so no return."""
    found = json.loads((ROOT / "data/results/league.json").read_text())
    command.draw.league({"methods": {"reward_head": found["methods"]["reward_head"]}}).draw_without_rendering()


def test_the_command_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(UserError, match=r"only must be one of dpo, plackett_luce, .*, got 'grpo'"):
        command.Options(only="grpo")
