"""The Python API: lazy, by name, and the same numbers as the commands and the mathematics."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT

import minqstar
from minqstar.score import Scored
from minqstar.search.beam import BeamConfig
from minqstar.theory.qfunction import implicit_reward
from minqstar.training.scoring import score_groups
from minqstar.world.tldr import DataConfig, draw_rows, post_of


@pytest.fixture(scope="module")
def q(run_folder):
    return minqstar.load(run_folder)


def test_the_import_brings_no_torch():
    code = "import minqstar, sys; print('torch' in sys.modules, *dir(minqstar))\n"
    code += "minqstar.UserError; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    torch_there, *names = first.split()
    assert torch_there == second == "False" and set(minqstar.__all__) <= set(names)
    assert all(getattr(minqstar, name) for name in minqstar.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = minqstar.nonsense


def test_scores_are_beta_log_ratios_of_each_response(q):
    responses = [" A short answer.", " no", ""]
    scored = q.score("Some prompt", responses)
    for one, text in zip(scored, responses, strict=True):
        assert one.ids == q.tokenizer.encode_response(text) and "".join(one.tokens[:-1]) == text
        assert len(one.tokens) == len(one.rewards) == len(one.logps) == len(one.ref_logps)
        for model, logps in ((q.run.model, one.logps), (q.run.reference, one.ref_logps)):
            ((alone,),) = score_groups(model, [q.group("Some prompt", [text])], q.tokenizer.pad)
            assert torch.allclose(logps, alone, atol=1e-5)
    assert torch.equal(scored[0].rewards, implicit_reward(scored[0].logps, scored[0].ref_logps, q.beta))
    assert torch.equal(q.score("Some prompt", responses[1])[0].rewards, q.score("Some prompt", [" no"])[0].rewards)


def test_a_score_in_a_notebook_is_escaped_text_on_colours(q):
    page = q.score("Some prompt", " <script>alert('1 & 2')</script>")[0]._repr_html_()
    assert "<script" not in page and "&lt;" in page and page.count("<span") == len(re.findall("rgb", page))


@pytest.mark.parametrize("how", ["greedy", "sample", "best-of-n", "beam", "mcts"])
def test_searches_answer_with_their_own_rewards(q, how):
    options = {"beam": {"width": 3}, "mcts": {"budget": 20}, "best-of-n": {"n": 3}}.get(how, {})
    answer = q.search("Some prompt", how, max_new_tokens=6, **options)
    assert answer.text == q.tokenizer.decode(answer.best.tokens) and answer.scored.ids == answer.best.tokens
    assert torch.allclose(answer.scored.logps.double(), torch.tensor(answer.best.logps).double(), atol=1e-4)
    assert (answer.found is not None) == (how == "mcts") and answer.judgement is None


def test_a_search_takes_the_options_of_its_kind(q):
    wide = q.search("Some prompt", "beam", width=4, n=2, max_new_tokens=4)
    same = q.search("Some prompt", minqstar.SearchConfig(search="beam", beam=BeamConfig(4, n=2), max_new_tokens=4))
    assert wide.best == same.best and wide.others == same.others
    for how, options, says in (
        ("beam", {"widht": 3}, "has no option widht"),
        ("greedy", {"width": 3}, "has no option width"),
        ("magic", {}, "search must be one of greedy"),
        ("beam", {"width": 0}, "width must be between 1"),
    ):
        with pytest.raises(minqstar.UserError, match=says):
            q.search("Some prompt", how, **options)
    with pytest.raises(minqstar.UserError, match="the prompt is empty"):
        q.search("", "greedy")
    with pytest.raises(minqstar.UserError, match="the run's context"):
        q.score("Some prompt", " word" * 200)


def test_a_run_of_sft_searches_and_has_no_scores(run_folder):
    sft = minqstar.load(run_folder.parent / "sft")
    assert sft.search("Some prompt", max_new_tokens=3).scored is None
    with pytest.raises(minqstar.UserError, match="it has no implicit rewards"):
        sft.score("Some prompt", " no")


def test_the_default_world_solves_a_post(world):
    row = next(draw_rows(world, DataConfig(held_out=1), "test"))
    exact = minqstar.World().exact(row["prompt"], row["chosen"], beta=0.5)
    ((_, _, mdp),) = world.tables([post_of(row)])
    assert exact.value[0] == minqstar.solve(mdp, 0.5).V[0, 0]
    assert exact.reward.sum() == pytest.approx(exact.value[0] + exact.advantage.sum())


def test_the_token_table_is_eq_10_line_by_line(world):
    """Printed numbers, two decimals: r + V(s') - V(s) = A*, V(s') is the next line's V(s), the sums telescope."""
    row = next(draw_rows(world, DataConfig(held_out=1), "test"))
    exact, ids = world.exact(row["prompt"], row["chosen"]), world.tokenizer.encode_response(row["chosen"])
    texts, spans = world.tokenizer.texts_of(ids), world.tokenizer.spans(ids)
    text = str(Scored(ids, texts, spans, exact.advantage, exact.advantage, exact.advantage, exact))
    lines = [re.findall(r"-?\+?\d+\.\d\d", line) for line in text.splitlines()[1 : len(ids) + 1]]
    r, V, after, eq_10, A, learned = np.array(lines, dtype=float).T
    assert np.allclose(r + after - V, eq_10, atol=0.016) and np.allclose(after[:-1], V[1:])
    assert np.allclose(eq_10, A) and np.allclose(A, learned) and after[-1] == 0
    R, V_0, sum_A = map(float, re.findall(r"[+-]\d+\.\d\d", text.splitlines()[-1]))
    assert pytest.approx(V_0 + sum_A, abs=0.011) == R and pytest.approx(r.sum(), abs=0.011) == R and V[0] == V_0


def test_pairs_are_read_with_their_three_fields(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert minqstar.read_pairs(str(file)) == [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(minqstar.UserError, match="want rows with chosen and rejected"):
        minqstar.read_pairs(file)


def test_it_is_found_from_the_folder_that_holds_the_clone():
    """There `minqstar` also names the clone's own folder, which is no package."""
    code = "import minqstar; print(minqstar.__file__, minqstar.solve.__name__)"
    without = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, env=without, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("solve\n"), done.stderr
