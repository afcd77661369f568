"""The bench measures what it says: both sides do the same work, and the report adds up. No test asserts a time."""

import contextlib
import io
import json
import pkgutil
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ENVIRONMENT, ROOT, command
from hypothesis import given
from hypothesis import strategies as st
from test_borrowed import folders  # noqa: F401 (a fixture)
from test_pair import pair  # noqa: F401 (a fixture)

from minqstar.errors import Stopped, UserError, require
from minqstar.lab.bench import compare, levers, sides, turns
from minqstar.lab.bench.compare import Options, limit
from minqstar.lab.bench.sides import SIDES, transformers_model
from minqstar.lab.bench.turns import Turn, Turns, alternate, side
from minqstar.lab.bench.work import SIZES, Work, config_of, prompts, random_model, texts
from minqstar.lm.attention import attend, prepare
from minqstar.lm.borrowed import load_borrowed
from minqstar.lm.model import GPT, SquaredReLU, rms_norm
from minqstar.training.data import Group, PackedData
from minqstar.training.scoring import token_logps

SMALL = replace(SIZES["tiny"], n_layer=1, n_embd=32, vocab_size=64, pairs=4, warm_up=2, new_tokens=5)


# ---- both sides do the same work


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


COMPILES = pytest.param("train", "ours compiled", marks=pytest.mark.slow)  # ten seconds to begin
HERE = [COMPILES if key == ("train", "ours compiled") else key for key in SIDES if key[0] in OF and "trl" not in key[1]]


@pytest.mark.parametrize("what, name", HERE)
def test_every_side_runs(what, name):
    class Enough(Exception):
        pass

    pieces = []

    def done(units: float):
        pieces.append(units)
        if len(pieces) == 3:
            raise Enough

    with pytest.raises(Enough):
        SIDES[what, name](SMALL, Work(what, **OF[what]), done)
    expected = {"train": 4, "decode": 2 * 5, "mcts": 3 if name == "transformers" else 2 * 3}[what]
    assert pieces == pytest.approx([expected] * 3, rel=0.5 if what == "train" else 1e-9)


def test_decoding_reads_and_makes_the_same_tokens():
    """Ours and transformers': equal numbers of new tokens, none of them EOS."""
    model = random_model(SMALL).eval()
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1)
        model.wte.weight[62] = 1  # EOS would be the likeliest token everywhere
    for (found,) in sides.decode(sides.Endless(model), prompts(SMALL, 3), (62,), 5, sides.greedy):
        assert len(found.tokens) == 5 and 62 not in found.tokens


def test_the_work_grows_as_asked():
    size = Work("train", length=2, vocabulary=1024).scaled()
    assert (size.prompts, size.responses, size.row_length, size.vocab_size) == ((64, 128), (24, 48), 352, 1024)
    assert max(map(len, texts(size, 50)[7])) <= 128 and max(max(p) for p, _, _ in texts(size, 50)) > 900


# ---- a checkpoint on real pairs


@pytest.fixture(scope="module")
def real(tmp_path_factory, pair) -> Work:  # noqa: F811
    """A small Llama, and twenty pairs, of which two are too long and one has an empty answer."""
    rows = [{"prompt": f"The cat {n}", "chosen": " sat" * (5 + n), "rejected": " on" * 7} for n in range(20)]
    rows[3]["prompt"] = rows[11]["rejected"] = "mat " * 600
    rows[5]["chosen"] = ""
    data = tmp_path_factory.mktemp("real") / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Work("train", model=pair[0], data=data)


def test_real_pairs_are_spread_over_those_that_are_short_enough(real):
    rows, groups = real.pairs(load_borrowed(real.model))
    of_file = [int(row["prompt"].split()[-1]) for row in rows]
    assert of_file == [n for n in range(20) if n not in (3, 5, 11, 19)] and len(groups) == 16
    few = replace(real, data=real.data.with_name("few.jsonl"))
    few.data.write_text("".join(real.data.read_text().splitlines(keepends=True)[:18]))
    with pytest.raises(UserError, match="15 pairs have at most 512 tokens, of 16 that are needed"):
        few.pairs(load_borrowed(real.model))


@pytest.mark.parametrize("name", ["ours", "trl"])
def test_a_piece_is_the_reference_and_four_steps(real, name, monkeypatch):
    """Loading is not measured. The second piece starts from the first weights again, with sixteen pairs of its own."""
    if name == "trl":
        pytest.importorskip("trl")
    calls, seen = [], []

    def done(units: float | None):
        calls.append(units)
        if calls.count(16) == 2:
            raise Stopped(signal.SIGINT)

    for module, call in ((sides, "ReferenceCache"), (sides, "of_trl")):
        true = getattr(module, call)
        monkeypatch.setattr(module, call, lambda *args, true=true, **rest: seen.append(args) or true(*args, **rest))
    with pytest.raises(Stopped):
        SIDES["train on pairs", name](real.scaled(), real, done)
    assert calls == 2 * {"ours": [None, 0, 0, 0, 0, 16], "trl": [None, 0, None, 0, 0, 0, 16]}[name]
    rows, groups = real.pairs(load_borrowed(real.model))
    if name == "trl":
        assert [row["prompt"] for row in seen[1][3]] == [row["prompt"] for row in rows]
    else:
        assert seen[1][1].num_scored == sum(len(response) for group in groups for response in group.responses)


@given(st.lists(st.integers(60, 900), min_size=16, max_size=16))
def test_rows_are_shared_out_evenly_to_the_steps(lengths):
    """Always where no pair is longer than four mean ones; and never does a row lack room."""
    row_length, rows = sides.packing(lengths, 4)
    assert row_length >= max(lengths) and rows >= 1
    if 4 * max(lengths) <= sum(lengths):
        assert len(sides.fit(np.array(lengths), row_length)[1]) - 1 == 4 * rows


# ---- the report


@contextlib.contextmanager
def scripted(script: dict, asked: list, name: str):
    """A side whose turns are known, and that notes when it is asked."""
    require(name in script, f"{name}: no compiler")
    turns = iter(script[name])

    def turn() -> Turn:
        asked.append(name)
        return Turn(*next(turns))

    yield turn
    asked.append(f"{name} closed")


def test_the_report_adds_up(monkeypatch, capsys):
    """Medians, the faster of two peers, the median ratio of a round; sides in turns, processes closed."""
    script = {"ours": [(10.0, 1.0, 0.3), (32.0, 1.2, 0.1), (20.0, 1.5, 0.2)], "trl": [(4.0, 2.0, 0.7)] * 3}
    script["trl compiled"] = [(5.0, 2.5, 0.5), (8.0, 2.5, 0.1), (4.0, 3.0, 0.8)]
    asked: list[str] = []
    monkeypatch.setattr(compare, "process", lambda options, name: scripted(script, asked, name))
    monkeypatch.setattr(compare, "version", "of {}".format)  # the peers need not be installed here
    compare.main(Options(what="train", peer="trl", rounds=3, json=True))
    report = json.loads(capsys.readouterr().out)
    assert asked == ["ours", "trl", "trl compiled"] * 3 + ["trl compiled closed", "trl closed", "ours closed"]
    assert report["ours"] == 20 and report["peer"] == 5 and report["ratio"] == 4
    assert report["ours_peak_gb"] == 1.5 and report["peer_peak_gb"] == 3
    assert (report["ours_cpu_seconds"], report["peer_cpu_seconds"], report["cpu_ratio"]) == (0.2, 0.5, 0.4)
    assert report["share_of_limit"] == pytest.approx(20 / report["limit"])
    assert report["versions"] == {name: f"of {name}" for name in ("torch", "numpy", "trl", "transformers")}
    work = {"what": "train", "size": "tiny", "batch": 1, "beams": 0, "simulations": 64, "length": 1, "vocabulary": 0}
    work["model"] = work["data"] = None
    assert report["options"] == work | {"peer": "trl", "rounds": 3}


def test_the_limit_counts_every_weight(monkeypatch):
    """Decoding: bytes of the weights that a call reads. Training: by hand, for texts of one length."""
    monkeypatch.setattr(compare, "read_rate", lambda: 1e9)
    monkeypatch.setattr(compare, "matmul_rate", lambda dtype: 1e12)
    read = sum(p.numel() for n, p in random_model(SMALL).named_parameters() if p.ndim == 2 and "wpe" not in n)
    monkeypatch.setattr(Work, "scaled", lambda work: SMALL)
    assert limit(Work("decode", batch=3))[0] == pytest.approx(3 * 1e9 / (4 * read))
    monkeypatch.setattr(Work, "scaled", lambda work: replace(SMALL, prompts=(40, 40), responses=(20, 20)))
    linear = 6 * ((40 + 42) * 12 * 32**2 + 42 * 64 * 32)  # six operations a weight and token; the head where scored
    seen = 6 * (40 + 42) * 2 * 32 * (40 + 10) / 2  # scores and sums over half of the keys
    assert limit(Work("train"))[0] == pytest.approx(1e12 / (linear + seen))


def test_the_limit_of_real_pairs_counts_the_reference_too(real, monkeypatch):
    """Eight operations a weight and token. The weights are counted by transformers."""
    monkeypatch.setattr(compare, "matmul_rate", lambda dtype: 1e12)
    model = transformers.AutoModelForCausalLM.from_pretrained(real.model)
    weights = sum(p.numel() for p in model.model.layers.parameters())
    groups = real.pairs(load_borrowed(real.model))[1]
    flops = 0
    for group in groups:
        scored = sum(map(len, group.responses))
        flops += 8 / 16 * (group.length * weights + scored * model.lm_head.weight.numel())
    assert limit(real)[0] == pytest.approx(1e12 / flops, rel=0.1)  # attention, which is little here, is left out


def test_preparation_is_not_measured(monkeypatch):
    """By a clock that the test turns: seconds of the machine, and of all its cores together."""
    clock, out = {"perf_counter": 0.0, "process_time": 0.0}, io.StringIO()
    monkeypatch.setattr(turns, "time", SimpleNamespace(**{name: lambda name=name: clock[name] for name in clock}))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(Turns, "_listen", lambda self: self.asked.release(3))
    done = Turns(1)

    def work(seconds: float, cpu_seconds: float, units: float | None):
        clock["perf_counter"] += seconds
        clock["process_time"] += cpu_seconds
        done(units)

    for _ in range(2):
        for step in ((5, 9, None), (1, 2, 0), (7, 7, None), (0.5, 0.5, 0), (0.5, 0.5, 4)):
            work(*step)
    for line in out.getvalue().splitlines():
        rate, _, cpu_seconds = json.loads(line)
        assert rate == 2 and cpu_seconds == 0.75
    assert out.getvalue().count("\n") == 2


# ---- processes: none is left behind


@pytest.fixture
def line(monkeypatch):
    """A place that a process can call. The line stays open for as long as the process lives."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        yield server


def python(server: socket.socket, rest: str) -> list[str]:
    """The command of a process that first opens the line to the test."""
    call = f"import socket; line = socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))"
    return [sys.executable, "-c", f"{call}\n{rest}"]


def called(server: socket.socket) -> socket.socket:
    connection, _ = server.accept()
    connection.settimeout(60)
    return connection


def ended(connection: socket.socket) -> bool:
    """True once the process at the other end of the line has been ended; false if it went on to its own end."""
    with connection:
        return connection.recv(1) == b""


TURNS = "from minqstar.lab.bench.turns import Turns\nturns = Turns(1)\n"
WORKS = TURNS + "while True: turns(0.001)"
BUSY = TURNS + "while True: pass"  # it does not come to the end of its first turn
GOES_ON = "time.sleep(20); line.send(b'my own end')"
DEAF = f"import time; {GOES_ON}"  # it does not even read its input
ANSWERS = "import sys, time; sys.stdin.readline(); print('[1.0, 0.1, 0.1]', flush=True); sys.stdin.readline()\n"
FAILS = ANSWERS + "sys.exit('a few words\\nno more')"
TURNS_DEAF = f"{ANSWERS}print('[1.0, 0.1, 0.1]', flush=True); {GOES_ON}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_side_outlives_the_bench(line, number):
    """The bench ends while its side is in the middle of long work."""
    start = f"from minqstar.lab.bench.turns import side\nwith side('busy', {python(line, BUSY)}): pass"
    with subprocess.Popen([sys.executable, "-c", start], stderr=subprocess.DEVNULL) as bench, called(line) as busy:
        bench.send_signal(number)
        assert bench.wait(60) == -number and ended(busy)


def test_a_signal_during_the_warm_up_ends_a_side_that_hears_nothing(line):
    def stop(number, _):
        raise Stopped(number)

    def interrupt() -> socket.socket:
        connection = called(line)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
        return connection

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with ThreadPoolExecutor() as pool:
            caller = pool.submit(interrupt)
            with pytest.raises(Stopped), side("deaf", python(line, DEAF)):
                pass
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended(caller.result())


def test_when_one_side_fails_the_others_end(line):
    """It fails in its second turn. The last line that it wrote is the error."""
    with pytest.raises(UserError, match="b: no more"):
        alternate({"a": side("a", python(line, TURNS_DEAF)), "b": side("b", python(line, FAILS))}, 3)
    assert ended(called(line)) and ended(called(line))


def test_a_side_that_does_not_start_is_left_out(line):
    """The reason is kept, and the other side takes its turns."""
    dies = [sys.executable, "-c", "import os; os.abort()"]
    turns, failed = alternate({"a": side("a", python(line, WORKS)), "b": side("b", dies)}, 2)
    assert list(turns) == ["a"] and len(turns["a"]) == 2 and str(failed["b"]) == "b: it died"
    assert all(turn.rate > 0 and 0.001 < turn.peak_gb < 4 for turn in turns["a"]) and ended(called(line))


def test_a_real_side_takes_turns_and_ends_with_its_input(monkeypatch):
    monkeypatch.setattr(compare, "side", lambda name, command: command)
    real = compare.process(Options("mcts", simulations=3), "ours")
    with subprocess.Popen(real, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, bufsize=0) as process:
        try:
            process.stdin.write(b"\n")
            warm = Turn(*json.loads(process.stdout.readline()))
            process.stdin.write(b"\n")  # it is in the middle of its second turn …
            process.stdin.close()  # … when the bench goes
            assert process.wait(60) == 0 and warm.rate > 1 and 0.01 < warm.peak_gb < 10
        finally:
            process.kill()


# ---- options


def test_options_of_other_work_are_refused(real, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    given = {name: f"--{name} {getattr(real, name)}" for name in ("model", "data")}
    others = "train --batch 1", "train --beams 1", "mcts --beams 1", "decode --simulations 1", "decode --data 1"
    for line in (*others, f"mcts {given['model']}", f"train --length 1 {given['model']} {given['data']}"):
        done = command(tmp_path, "-m", "minqstar.lab.bench", *line.split())
        words = f"{line.split()[1]} {'does not go with --data' if 'length' in line else 'needs'}"
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --peer transformers", "train has the peer trl, not transformers"),
        ("decode --batch 0", "batch must be between 1 and 10,000, got 0"),
        (f"decode --batch {10**24}", f"batch must be between 1 and 10,000, got {10**24}"),
        ("decode --beams -1", "beams must be between 0 and 10,000, got -1"),
        (f"mcts --simulations {10**400}", "simulations must be between 1 and 10,000"),
        ("train --model folder", "train takes a model and data together"),
        ("train --data file", "train takes a model and data together"),
        ("train --rounds 0", "rounds must be positive, got 0"),
        ("train --vocabulary 15", "vocabulary must be 0 or between 16 and 100,000, got 15"),
        ("train --size gpt2 --length 4", "length 4 makes texts of 1025 tokens; the context has 1024"),
        ("mcts --length 16", "length 16 makes texts of 1032 tokens; the context has 1024"),
        ("decode --size gpt2 --batch 10000 --beams 10", "lower batch, beams or simulations"),
        ("mcts --size gpt2 --batch 10000 --simulations 10000", "lower batch, beams or simulations"),
    ],
)
def test_bad_sizes_are_one_line_before_a_process_starts(line, message, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    done = command(tmp_path, "-m", "minqstar.lab.bench", *shlex.split(line))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_longest_texts_that_are_let_through_fit_the_model():
    """By doing the work on texts that are all as long as the longest."""
    for what, length in (("train", 11), ("decode", 15), ("mcts", 15)):
        size = Work(what, length=length).scaled()
        longest = {"prompts": (size.prompts[1],) * 2, "responses": (size.responses[1],) * 2}
        small = replace(size, n_layer=1, n_head=1, n_embd=8, pairs=1, warm_up=1, **longest)
        of = {"train": sides.train, "decode": sides.decoding, "mcts": sides.searching}[what]
        assert next(of(small, Work(what))) > 0
        with pytest.raises(UserError, match="makes texts of"):
            Work(what, length=length + 1)


@pytest.mark.slow
def test_the_memory_is_estimated_from_above_but_not_by_far():
    """Beside what the searches really keep: keys and values, nodes and their paths."""

    def size_of(tensors) -> int:
        return sum(t.nbytes for t in tensors if hasattr(t, "nbytes"))

    size, given = SIZES["tiny"], prompts(SIZES["tiny"], 3)
    evaluator = sides.Endless(random_model(size).eval())
    sides.beam_search(evaluator, given, (510,), size.new_tokens, sides.BeamConfig(6))
    real = size_of(evaluator.places) + sum(map(size_of, evaluator.cache.layers))
    assert 2 * real < Work("decode", batch=3, beams=6).memory() < 12 * real
    _, tree = sides.mcts(evaluator, given, (510,), 8, sides.MCTSConfig(budget=208, leaf="value"))
    real = size_of(evaluator.places) + sum(map(size_of, evaluator.cache.layers)) + size_of(vars(tree).values())
    assert 2 * real < Work("mcts", batch=3, simulations=200).memory() < 12 * real


# ---- levers and growth


def test_growth_finds_the_order(monkeypatch, capsys):
    """Rates that fall as n^1.5 in every measure; memory that doubles."""
    works = []

    def process(work: Work, name: str):
        works.append((work.what, work.length, work.vocabulary, work.batch, work.beams, work.simulations))
        n = work.length * max(work.vocabulary, 1) * work.batch * max(work.beams, 1) * work.simulations
        units = {"train": 1, "decode": work.batch, "mcts": work.simulations}
        return scripted({name: [(units[work.what] / n**1.5, n, 1.0)]}, [], name)

    monkeypatch.setattr(levers, "process", process)
    levers.main(levers.Options(growth=True, rounds=1, json=True))
    report = json.loads(capsys.readouterr().out)
    assert len(works) == len(set(works)) == 20 and len(report) == 5
    for row in report.values():
        assert row["order"] == pytest.approx(1.5)
        assert row["values"][-1] == 8 * row["values"][0] and row["peak_gb"][-1] == 8 * row["peak_gb"][0]
    monkeypatch.setenv("COLUMNS", "120")
    levers.main(levers.Options(growth=True, only="beam", rounds=1))
    shown = capsys.readouterr().out
    assert "2 to 16" in shown and "2.8 8.0 22.6" in shown and "1.50" in shown and "vocabulary" not in shown


def test_a_lever_is_worth_what_its_sides_take(monkeypatch, capsys):
    """Sides that sleep, one replaced by the patch of its lever. A lever that cannot be measured is left out."""

    def work():
        while True:
            levers.time.sleep(0.004 if levers.plain_rms_norm else 0.001)
            yield 2.0

    def no_compiler():
        raise UserError("there is no compiler")
        yield

    slow = {"lab.bench.levers.plain_rms_norm": True}
    monkeypatch.setattr(levers, "plain_rms_norm", None)
    monkeypatch.setattr(levers, "LEVERS", {"nap": (work, work, slow), "compiled": (no_compiler, work, {})})
    with pytest.warns(UserWarning, match="compiled is not measured: there is no compiler"):
        levers.main(levers.Options(rounds=5, json=True))
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["nap"] and 1.5 < found["nap"] < 6


def test_only_asks_for_names_that_exist():
    assert levers.Options(only="gpt2").names() == ["packed weights: greedy, gpt2"]
    assert levers.Options(growth=True, only="b").names() == ["vocabulary", "batch", "beam width"]
    for growth, other in ((False, "vocabulary"), (True, "gpt2")):
        with pytest.raises(UserError, match=f"has '{other}' in its name"):
            levers.Options(growth=growth, only=other)


def test_without_a_lever_the_work_is_the_same():
    """What replaces a lever computes the same, and is found where its patch looks for it."""
    for _, _, replaced in levers.LEVERS.values():
        for place in replaced:
            assert pkgutil.resolve_name(f"minqstar.{place}") is not None
    data = PackedData([Group([1, 2, 3], ([4, 5], [6, 7, 8])), Group([9], ([1, 2], [3, 4]))], 0, 20)
    batch, model = data.batch(np.arange(1)), random_model(SMALL)
    with torch.no_grad():
        assert torch.allclose(levers.head_everywhere(model, batch), token_logps(model, batch), atol=1e-5)
        q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
        seen = prepare(batch.mask(), torch.float32)
        assert torch.allclose(levers.fused(q, k, v, seen), attend(q, k, v, seen), atol=1e-6)
        assert torch.allclose(levers.plain_rms_norm(q), rms_norm(q), atol=1e-6)
        assert torch.equal(levers.PLAIN["lm.model.SquaredReLU.apply"](q), SquaredReLU.apply(q))
    assert next(levers.trees(2)) == 2 * 32 and next(levers.tokens()) == 16


def test_the_page_names_every_lever_and_every_measure():
    page = (ROOT / "minqstar/lab/bench/README.md").read_text()
    assert levers.LEVERS.keys() | levers.MEASURES.keys() <= set(re.findall(r"^\| ([^|]+?) \|", page, re.M))
