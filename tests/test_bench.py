"""The bench measures what it says: both sides do the same work, and the report adds up. No test asserts a time."""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import command

from minqstar.errors import UserError, require
from minqstar.lab.bench import compare as bench
from minqstar.lab.bench import growth, levers, workloads
from minqstar.lab.bench.compare import SIDES, SIZES, Options, limit
from minqstar.lab.bench.workloads import config_of, random_model, texts, transformers_model
from minqstar.lm.attention import attend, prepare
from minqstar.lm.model import GPT, SquaredReLU, rms_norm
from minqstar.training.data import Group, PackedData
from minqstar.training.scoring import token_logps

SMALL = replace(SIZES["tiny"], n_layer=1, n_embd=32, vocab_size=64, pairs=4, warm_up=2, new_tokens=5)


def test_both_sides_have_the_same_parameters():
    for size in (SMALL, SIZES["tiny"]):
        ours = {name: p.shape for name, p in GPT(config_of(size)).named_parameters()}
        assert sum(p.numel() for p in transformers_model(size).parameters()) == sum(s.numel() for s in ours.values())
    with torch.device("meta"):
        gpt2 = GPT(config_of(SIZES["gpt2"]))
    assert gpt2.num_parameters() == 124_439_808


def test_texts_are_the_same_every_time_and_hold_no_special_token():
    some = texts(SMALL, 50)
    assert some == texts(SMALL, 50)
    for prompt, chosen, rejected in some:
        assert 32 <= len(prompt) <= 64 and 12 <= len(chosen) <= 24 and 12 <= len(rejected) <= 24
        assert max(prompt + chosen + rejected) < 62


OF = {"train": {}, "decode": {"batch": 2, "beams": 2}, "mcts": {"batch": 2, "simulations": 3}}


def test_options_of_other_work_are_refused(tmp_path):
    for what, name in (("train", "batch"), ("train", "beams"), ("mcts", "beams"), ("decode", "simulations")):
        done = command(tmp_path, "-m", "minqstar.lab.bench", what, f"--{name}", "1")
        assert done.returncode == 2 and f"--{name} needs" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("what, side", [key for key in SIDES if "trl" not in key[1]])
def test_every_side_runs(what, side):
    class Enough(Exception):
        pass

    pieces = []

    def done(units: float):
        pieces.append(units)
        if len(pieces) == 3:
            raise Enough

    with pytest.raises(Enough):
        SIDES[what, side](SMALL, Options(what, **OF[what]), done)
    expected = {"train": 4, "decode": 2 * 5, "mcts": 3 if side == "transformers" else 2 * 3}[what]
    assert pieces == pytest.approx([expected] * 3, rel=0.5 if what == "train" else 1e-9)


def test_decoding_reads_and_makes_the_same_tokens(monkeypatch):
    """Ours and transformers': equal numbers of new tokens, none of them EOS."""
    model = random_model(SMALL).eval()
    prompts = [prompt for prompt, _, _ in texts(SMALL, 3)]
    for (found,) in workloads.decode(workloads.Endless(model), prompts, 62, 5, workloads.greedy):
        assert len(found.tokens) == 5 and 62 not in found.tokens


class Scripted:
    """A side whose turns are known, and that notes when it is asked."""

    def __init__(self, script: dict, asked: list, name: str):
        require(name in script, f"{name}: no compiler")
        self.turns, self.asked, self.name = iter(script[name]), asked, name

    def turn(self):
        self.asked.append(self.name)
        return bench.Turn(*next(self.turns))

    def close(self):
        self.asked.append(f"{self.name} closed")


def test_the_report_adds_up(monkeypatch, capsys):
    """Medians, the faster of two peers, the median ratio of a round; sides in turns, processes closed."""
    script = {"ours": [(10.0, 1.0), (32.0, 1.2), (20.0, 1.5)], "trl": [(4.0, 2.0)] * 3}
    script["trl compiled"] = [(5.0, 2.5), (8.0, 2.5), (4.0, 3.0)]
    asked: list[str] = []
    monkeypatch.setattr(bench, "Side", lambda options, name: Scripted(script, asked, name))
    monkeypatch.setattr(bench, "version", "of {}".format)  # the peers need not be installed here
    bench.main(Options(what="train", peer="trl", rounds=3, json=True))
    report = json.loads(capsys.readouterr().out)
    assert asked == ["ours", "trl", "trl compiled"] * 3 + ["trl compiled closed", "trl closed", "ours closed"]
    assert report["ours"] == 20 and report["peer"] == 5 and report["ratio"] == 4
    assert report["ours_peak_gb"] == 1.5 and report["peer_peak_gb"] == 3
    assert report["share_of_limit"] == pytest.approx(20 / report["limit"])
    assert report["versions"] == {name: f"of {name}" for name in ("torch", "numpy", "trl", "transformers")}


def test_a_side_is_a_process_that_waits_for_its_turns():
    """The rate of its turns, and the last line of what a dying one said."""
    side = bench.Side(Options(what="mcts", simulations=3), "ours")
    turns = [side.turn() for _ in range(2)]
    assert all(turn.rate > 1 and 0.01 < turn.peak_gb < 10 for turn in turns) and turns[0] != turns[1]
    side.process.kill()
    with pytest.raises(UserError, match="ours: it died"):
        side.turn()
    side.close()
    with pytest.raises(UserError, match="nobody: KeyError"):
        bench.Side(Options(what="mcts"), "nobody")


def test_the_limit_counts_every_weight(monkeypatch):
    """Decoding: bytes of the weights that a call reads. Training: by hand, for texts of one length."""
    monkeypatch.setattr(bench, "read_rate", lambda: 1e9)
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype: 1e12)
    read = sum(p.numel() for n, p in random_model(SMALL).named_parameters() if p.ndim == 2 and "wpe" not in n)
    assert limit(Options(what="decode", batch=3), SMALL)[0] == pytest.approx(3 * 1e9 / (4 * read))
    one = replace(SMALL, prompts=(40, 40), responses=(20, 20))
    linear = 6 * ((40 + 42) * 12 * 32**2 + 42 * 64 * 32)  # six operations a weight and token; the head where scored
    seen = 6 * (40 + 42) * 2 * 32 * (40 + 10) / 2  # scores and sums over half of the keys
    assert limit(Options(what="train"), one)[0] == pytest.approx(1e12 / (linear + seen))


def test_a_peer_that_cannot_be_measured_is_one_clear_line(tmp_path):
    done = command(tmp_path, "-m", "minqstar.lab.bench", "train", "--peer", "transformers")
    assert done.returncode == 2 and "train has the peer trl, not transformers" in done.stderr
    done = command(tmp_path, "-m", "minqstar.lab.bench", "decode", "--batch", "0")
    assert done.returncode == 2 and "batch must be between 1 and 10,000" in done.stderr


def test_growth_finds_the_order(monkeypatch, capsys):
    """Rates that fall as n^1.5 in every measure; memory that doubles."""
    works = []

    def side(work, name):
        works.append((work.what, work.length, work.vocabulary, work.batch, work.beams, work.simulations))
        n = work.length * max(work.vocabulary, 1) * work.batch * max(work.beams, 1) * work.simulations
        units = {"train": 1, "decode": work.batch, "mcts": work.simulations}
        return Scripted({name: [(units[work.what] / n**1.5, n)]}, [], name)

    monkeypatch.setattr(growth, "Side", side)
    growth.main(growth.Options(rounds=1, json=True))
    report = json.loads(capsys.readouterr().out)
    assert len(works) == len(set(works)) == 20 and len(report) == 5
    for row in report.values():
        assert row["order"] == pytest.approx(1.5)
        assert row["values"][-1] == 8 * row["values"][0] and row["peak_gb"][-1] == 8 * row["peak_gb"][0]


def test_the_work_grows_as_asked():
    size = bench.size_of(Options("train", length=2, vocabulary=1024))
    assert (size.prompts, size.responses, size.row_length, size.vocab_size) == ((64, 128), (24, 48), 352, 1024)
    assert max(map(len, texts(size, 50)[7])) <= 128 and max(max(p) for p, _, _ in texts(size, 50)) > 900


def test_a_lever_is_worth_what_its_sides_take(monkeypatch):
    """Sides that sleep, one replaced by the patch of its lever."""

    def work():
        while True:
            levers.time.sleep(0.004 if levers.plain_rms_norm else 0.001)
            yield 2.0

    slow = {"lab.bench.levers.plain_rms_norm": True}
    monkeypatch.setattr(levers, "plain_rms_norm", None)
    monkeypatch.setitem(levers.LEVERS, "nap", (work, work, slow))
    assert 1.5 < levers.worth("nap", 5) < 6


def test_without_a_lever_the_work_is_the_same():
    """What replaces a lever computes the same, and is found where its patch looks for it."""
    for _, _, replaced in levers.LEVERS.values():
        for place in replaced:
            module, name = place.rsplit(".", 1)
            assert hasattr(importlib.import_module(f"minqstar.{module}"), name)
    data = PackedData([Group([1, 2, 3], ([4, 5], [6, 7, 8])), Group([9], ([1, 2], [3, 4]))], 0, 20)
    batch, model = data.batch(np.arange(1)), random_model(SMALL)
    with torch.no_grad():
        assert torch.allclose(levers.head_everywhere(model, batch), token_logps(model, batch), atol=1e-5)
        q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
        seen = prepare(batch.mask(), torch.float32)
        assert torch.allclose(levers.fused(q, k, v, seen), attend(q, k, v, seen), atol=1e-6)
        assert torch.allclose(levers.plain_rms_norm(q), rms_norm(q), atol=1e-6)
        assert torch.equal(levers.PLAIN["lm.model.SquaredReLU"].apply(q), SquaredReLU.apply(q))
    assert next(levers.trees(8)) == 16 and next(levers.decoding()) == 16
