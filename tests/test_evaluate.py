"""The figures by hand: what counts as an error, as off the grammar, as a win."""

import math
import random

import numpy as np
import pytest
import torch

from minqstar.evaluate import fact_error_rate, mean_return, off_grammar_rate, pair_figures
from minqstar.world.tldr import Judgement, draw_post

NAN = math.nan
VERDICTS = [
    Judgement(1.0, ("a", "b"), ()),
    Judgement(-0.5, ("a",), ("b",)),
    Judgement(NAN, (), ("a", "b")),  # it left the grammar after two slots: they count
]


def test_rates_and_means():
    assert fact_error_rate(VERDICTS) == 3 / 6
    assert fact_error_rate([Judgement(NAN, (), ())]) == 0.0
    assert mean_return(VERDICTS) == 0.25 and mean_return(VERDICTS[2:]) is None
    assert off_grammar_rate(VERDICTS) == pytest.approx(1 / 3)


def test_what_is_off_the_grammar(world):
    post = draw_post(random.Random(3), "test")
    (tokens,), (total,) = world.sample([post], np.random.default_rng(0))
    assert world.judge_tokens(post, tokens).total == pytest.approx(total)
    assert math.isnan(world.judge_tokens(post, tokens[:-1]).total)  # it never ended
    padded = [*tokens[:3], world.tokenizer.pad, *tokens[3:]]  # the same text, another response
    assert math.isnan(world.judge_tokens(post, padded).total)
    odd = [*tokens[:-1], *world.tokenizer.encode(" indeed"), tokens[-1]]
    assert math.isnan(world.judge_tokens(post, odd).total)


def test_pairs():
    """beta times the sums of log-ratios; a tie is half a win."""
    policy = [[torch.tensor([-1.0, -1.0]), torch.tensor([-3.0])], [torch.tensor([-2.0]), torch.tensor([-1.0, -1.0])]]
    reference = [[torch.tensor([-2.0, -2.0]), torch.tensor([-2.0])], [torch.tensor([-2.0]), torch.tensor([-1.0, -1.0])]]
    found = pair_figures(policy, reference, 0.5)
    assert found == {
        "reward_margin": pytest.approx((1.5 + 0.0) / 2),
        "chosen_reward": pytest.approx(0.5),
        "rejected_reward": pytest.approx(-0.25),
        "pair_accuracy": 0.75,
    }
