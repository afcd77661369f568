"""Credit assignment against its definitions."""

import json
import random

import numpy as np
import pytest
from conftest import command
from hypothesis import given
from hypothesis import strategies as st

from minqstar.lab.findings.credit import auroc
from minqstar.world.slots import edited, slots, with_facts, wrong_value
from minqstar.world.tldr import draw_post

levels = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@given(levels, levels)
def test_auroc_is_the_share_of_ordered_pairs(low, others):
    pairs = [1.0 if a < b else 0.5 if a == b else 0.0 for a in low for b in others]
    assert auroc(np.array(low), np.array(others)) == pytest.approx(np.mean(pairs))
    assert auroc(np.array([]), np.array(others)) is None and auroc(np.array(low), np.array([])) is None


@pytest.fixture(scope="module")
def drawn(world):
    posts = [draw_post(random.Random(seed), "test") for seed in range(90)]
    return list(zip(posts, world.sample(posts, np.random.default_rng(0))[0], strict=True))


def test_slots_hold_the_facts_that_the_judge_finds(world, drawn):
    for post, tokens in drawn:
        found = slots(world, post, tokens)
        verdict = world.judge(post, world.tokenizer.decode(tokens))
        assert sorted(s.fact for s in found if s.decisive is None) == sorted(verdict.right)
        assert sorted(s.fact for s in found if s.decisive is not None) == sorted(verdict.wrong)


def test_a_decisive_token_is_the_first_that_rules_the_right_value_out(world, drawn):
    """Up to it the summary agrees with one that states the fact rightly; with it, it does not."""
    wrong = 0
    for post, tokens in drawn:
        for slot in slots(world, post, tokens):
            if slot.decisive is not None:
                right = with_facts(world, post, tokens, {slot.fact: post.facts[slot.fact]})
                assert slot.start <= slot.decisive < slot.stop
                assert (
                    right[: slot.decisive] == tokens[: slot.decisive] and right[slot.decisive] != tokens[slot.decisive]
                )
                wrong += 1
    assert wrong > 50


def test_exact_rewards_tell_every_decisive_token_from_all_other_fact_tokens(world, drawn):
    posts, responses = zip(*drawn, strict=True)
    decisive, others = [], []
    for (post, tokens), exact in zip(drawn, world.exact_all(posts, responses), strict=True):
        for slot in slots(world, post, tokens):
            for i in range(slot.start, slot.stop):
                (decisive if i == slot.decisive else others).append(exact.advantage[i].item())
    assert max(decisive) < min(others) and auroc(np.array(decisive), np.array(others)) == 1.0


def test_edits_are_wrong_in_just_the_facts_that_they_name(world, drawn):
    some = [found for post, tokens in drawn if (found := edited(world, post, tokens))]
    assert len(some) > 60
    for found in some:
        verdicts = [world.judge(found.post, world.tokenizer.decode(v)) for v in found.versions]
        assert [set(v.wrong) for v in verdicts] == [set(), {found.facts[0]}, set(found.facts)]
        assert wrong_value(found.post, world, found.facts[0]) not in found.post.facts.values()
    post, tokens = drawn[0]
    assert edited(world, post, tokens, ("nothing", "known")) is None


def test_the_command(tmp_path, run_folder):
    """A response of one's own; a page and a picture; then what cannot be shown, each in one line."""
    prompt = draw_post(random.Random(3), "test").prompt
    what = ["-m", "minqstar.lab.credit", "--run", str(run_folder), "--prompt", prompt, "--response", " A short one."]
    done = command(tmp_path, *what, "--json", "--html", "page.html", "--png", "picture.png")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["versions"]["response"]
    assert len(found["tokens"]) == len(found["rewards"]) == len(found["logps"]) and found["exact"] is None
    assert (tmp_path / "page.html").read_text().count(": reward ") == len(found["tokens"])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    for words, says in (
        (["--prompt", prompt], "--prompt and --response go together"),
        (["--prompt", "", "--response", "x"], "the prompt is empty"),
        (["--prompt", prompt, "--response", "word " * 400], "the run's context"),
        (["--png", "picture.svg"], "--png writes a .png file"),
        (["--prompt", prompt, "--response", "x", "--html", "no/where.html"], "there is no folder no"),
    ):
        done = command(tmp_path, "-m", "minqstar.lab.credit", "--run", str(run_folder), *words)
        assert done.returncode in (1, 2) and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
