"""Rows that come in: which are held out, how long each may be, and what does not fit in memory."""

import json
import os
import shutil
import threading

import pytest
import torch
from conftest import command, random_model
from hypothesis import given
from hypothesis import strategies as st

from minqstar import text
from minqstar.errors import UserError
from minqstar.evaluate import decode_all
from minqstar.lm import memory
from minqstar.lm.memory import memory_of, require_memory
from minqstar.runchecks import cached_logps, plain_logits, that_fit
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import best_of_n, by_room, decode, greedy
from minqstar.search.evaluator import Network
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.search.tree import EDGE_BYTES, Tree
from minqstar.training import data
from minqstar.training.data import Group, tokenize
from minqstar.training.formats import Rows
from minqstar.training.scoring import score_groups

EOS, PAD = 21, 22
SMALL = "--model.n-layer 1 --model.n-embd 32 --model.block-size 64 --sft.min-steps 3 --dpo.min-steps 3".split()


def write(file, rows: list[dict]):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- held-out rows


def test_unusable_rows_are_counted_first_and_never_held_out(tmp_path, recwarn):
    """Of ten prompts the sixth is held out: here it is one whose rows cannot be used, and there are four more."""
    rows = [{"prompt": f"Q{i}:", "chosen": f" {i}", "rejected": " no"} for i in range(10)]
    rows[5]["prompt"] = ""
    rows[6]["rejected"] = rows[6]["chosen"]
    rows[2]["chosen"] = rows[3]["prompt"] = "7 " * 100
    write(tmp_path / "mine.jsonl", rows)
    done = command(tmp_path, "train.py", "--data", "mine.jsonl", *SMALL)
    assert done.returncode == 0 and "mine.jsonl: skipped 4 of 10 rows: " in done.stdout, done.stderr
    for stage in ("sft", "dpo"):
        summary = json.loads((tmp_path / f"runs/mine/{stage}/summary.json").read_text())
        assert sum(summary["rows_skipped"].values()) == 4 and summary["rows_used"] == 5
    assert [row["prompt"] for row in Rows(tmp_path / "runs/mine/dpo/held_out.jsonl")] == ["Q7:"]
    assert summary["eval"]["pairs"] == 1
    for args in (
        ["sample.py", "--run", "runs/mine/dpo", "--max-new-tokens", "5"],
        ["-m", "minqstar.bellman", "runs/mine/dpo", "--cases", "1"],
        ["-m", "minqstar.evaluate", "runs/mine/dpo"],
        ["-m", "minqstar.evaluate", "runs/mine/dpo", "--data", "mine.jsonl"],
    ):
        done = command(tmp_path, *args)
        assert done.returncode == 0 and not done.stderr and len(recwarn) == ("--data" in args), done.stderr
    assert "mine.jsonl: 4 of 10 rows cannot be used: " in str(recwarn.pop().message)
    done = command(tmp_path, "-m", "minqstar.lab.credit", "--run", "runs/mine/dpo")
    assert done.returncode == 1 and "give --prompt and --response" in done.stderr and done.stderr.count("\n") == 1


def test_a_run_that_held_nothing_out_says_so_and_every_command_after_it(tmp_path):
    write(tmp_path / "one.jsonl", [{"prompt": "Q:", "chosen": f" {i}", "rejected": " no"} for i in range(4)])
    done = command(tmp_path, "train.py", "--data", "one.jsonl", *SMALL)
    assert done.returncode == 0 and "nothing is held out" in done.stdout
    assert json.loads((tmp_path / "runs/one/dpo/summary.json").read_text())["eval"] == {}
    for args in (
        ["sample.py", "--run", "runs/one/dpo"],
        ["-m", "minqstar.bellman", "runs/one/dpo", "--cases", "1"],
        ["-m", "minqstar.evaluate", "runs/one/dpo"],
        ["-m", "minqstar.lab.credit", "--run", "runs/one/dpo"],
        ["-m", "minqstar.lab.searches", "runs/one/dpo"],
    ):
        done = command(tmp_path, *args)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert "runs/one/dpo held out no rows when it was trained; give " in done.stderr


def test_a_piped_data_set_is_read_once(tmp_path):
    """Its held-out rows too."""
    os.mkfifo(tmp_path / "pipe")
    rows = [{"prompt": f"Q{i}:", "chosen": f" {i}", "rejected": " no"} for i in range(10)]
    writer = threading.Thread(target=write, args=(tmp_path / "pipe", rows), daemon=True)
    writer.start()
    done = command(tmp_path, "train.py", "--stage", "sft", "--data", "pipe", *SMALL[:-2])
    assert done.returncode == 0, done.stderr
    assert len(list(Rows(tmp_path / "runs/pipe/sft/held_out.jsonl"))) == 1


# ---- limits by row


def test_each_row_fits_but_not_the_longest_prompt_with_the_longest_response(run_folder, tmp_path):
    """In a context of 96 tokens; digits are tokens."""
    rows = [
        {"prompt": "7" * 85, "chosen": " a", "rejected": " b"},
        {"prompt": "Q:", "chosen": "1" * 90, "rejected": " b"},
        {"prompt": "Q" + "1" * 40, "chosen": "1" * 30, "rejected": " b"},
    ]
    shutil.copytree(run_folder, tmp_path / "run")
    write(tmp_path / "run/held_out.jsonl", rows)
    write(tmp_path / "mine.jsonl", rows)
    for args in (["-m", "minqstar.bellman", "run", "--cases", "1"], ["-m", "minqstar.evaluate", "run"]):
        for more in ([], ["--data", "mine.jsonl"]):
            done = command(tmp_path, *args, *more)
            assert done.returncode in (0, 1) and not done.stderr, done.stderr  # random weights: no check must hold
    done = command(tmp_path, "-m", "minqstar.lab.searches", "run", "--most", "60", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["learned"].keys() >= {"greedy", "beam 5"}, done.stderr


pairs = st.lists(
    st.integers(1, 23).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 20), min_size=n, max_size=n),
            st.lists(st.integers(0, 20), max_size=23 - n).map(lambda ids: [*ids, EOS]),
        )
    ),
    min_size=1,
    max_size=6,
)


@given(pairs, st.integers(0, 99))
def test_cached_decoding_reads_rows_of_any_shape(some, seed):
    """Every pair fits a context of 24; all of them together as one batch often would not."""
    model = random_model(seed, block_size=24)
    batches = list(that_fit(some, model.config))
    assert [pair for batch in batches for pair in batch] == some
    for batch in batches:
        assert max(len(p) for p, _ in batch) + max(len(r) for _, r in batch) <= 24
    for (prompt, response), logps in zip(some, cached_logps(model, some, 0), strict=True):
        plain = plain_logits(model, prompt, response).log_softmax(-1)
        assert torch.allclose(logps.double(), plain, atol=1e-4)


@given(pairs, st.integers(0, 99))
def test_greedy_decoding_of_many_is_that_of_each(some, seed):
    """Each to the end of its own room."""
    model = random_model(seed, block_size=24)
    prompts = [prompt for prompt, _ in some]
    rooms = by_room(prompts, 24, 10)
    assert sorted(i for places in rooms.values() for i in places) == list(range(len(prompts)))
    for prompt, draw in zip(prompts, decode_all(model, prompts, (EOS,), None), strict=True):
        ((alone,),) = decode(Network(model), [prompt], (EOS,), 24 - len(prompt), greedy)
        assert draw.tokens == alone.tokens and draw.truncated == alone.truncated


# ---- memory


@pytest.fixture
def little_memory(monkeypatch):
    """A machine of 100 MB."""
    monkeypatch.setattr(memory, "memory_of", lambda device: 1e8)


def crowd(network: Network, count: int):
    """Ask for so many nodes at once, of which `start` was not told."""
    network.start([[1, 2, 3]], nodes=9, depth=9)
    network.extend(*torch.zeros(2, 1, count, dtype=torch.long))


def test_what_is_asked_for_is_estimated_first(little_memory):
    model = random_model()
    prompt, cpu = [[1, 2, 3]], torch.device("cpu")
    wide, many = BeamConfig(width=10_000), MCTSConfig(budget=100_000, actions=10**5)
    for ask, lower in (
        (lambda: beam_search(Network(model), prompt, (EOS,), 40, wide), "lower the width"),
        (lambda: best_of_n(Network(model), prompt, (EOS,), 40, greedy, 10_000, lambda *_: 0.0), "the draws"),
        (lambda: mcts(Network(model), prompt, (EOS,), 40, many), "lower the budget or the actions"),
        (lambda: crowd(Network(model), 5000), "the leaves"),
        (lambda: score_groups(model, [Group([1] * 9000, ([EOS],))], PAD), "lower row-length"),
        (lambda: require_memory(2e8, "these", "them", cpu), "^these need 0.2 GB .* has 0.1: lower them$"),
    ):
        with pytest.raises(UserError, match=lower) as error:
            ask()
            pytest.fail(lower)
        assert "\n" not in str(error.value)
    assert beam_search(Network(model), prompt, (EOS,), 5, BeamConfig())[0]


def test_options_that_ask_for_too_much_are_refused_before_anything_is_made(tmp_path):
    for args in (
        ["train.py", "--sft.row-length", "65536", "--dpo.row-length", "65536"],
        ["-m", "minqstar.lab.bench", "decode", "--batch", str(10**24)],
        ["-m", "minqstar.lab.bench", "mcts", "--simulations", str(10**24)],
    ):
        if memory_of(torch.device("cpu")) > 3e10 and "train.py" in args:
            continue
        done = command(tmp_path, *args)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1, done.stderr
        assert not list(tmp_path.iterdir())


def test_the_bytes_of_a_tree_are_counted():
    tree = Tree(2, 50, 40)
    edges = sum(array.nbytes for array in vars(tree).values() if getattr(array, "ndim", 0) == 3)
    assert edges == EDGE_BYTES * 2 * 50 * 40


def test_a_container_may_have_less_memory_than_its_machine(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("1000000\n")
    monkeypatch.setattr(memory, "CONTAINER", (str(tmp_path / "max"),))
    assert memory.memory_of.__wrapped__(torch.device("cpu")) == 1_000_000
    (tmp_path / "max").write_text("max\n")
    assert memory.memory_of.__wrapped__(torch.device("cpu")) > 10**8


def test_data_without_an_end_are_refused(monkeypatch, tmp_path, tokenizer):
    """Rows that never stop: through a pipe, and as tokens that would not fit."""
    many = ({"prompt": f"Q{i}", "completion": "c"} for i in range(5000))
    monkeypatch.setattr(data, "memory_of", lambda device: 1e5)
    with pytest.raises(UserError, match=r"more than 10,000 tokens, too many for the memory"):
        tokenize(many, tokenizer, 20)
    monkeypatch.setattr(text, "PIPED", 1000)
    os.mkfifo(tmp_path / "pipe")
    rows = [{"prompt": "Q", "completion": "c"}] * 100
    threading.Thread(target=write, args=(tmp_path / "pipe", rows), daemon=True).start()
    with pytest.raises(UserError, match="is a pipe of more than"):
        list(Rows(tmp_path / "pipe"))
    write(tmp_path / "file", rows)
    assert len(list(Rows(tmp_path / "file"))) == 100
