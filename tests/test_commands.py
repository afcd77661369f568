"""The commands as a person meets them: a tiny run end to end, and one clear line for each mistake."""

import io
import json
import math
import random
import re
import shlex
import shutil
import xml.etree.ElementTree
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, TINY, command, process, random_model, reseal

from minqstar import bellman
from minqstar.lab import credit
from minqstar.lm.tokenizer import train_vocabulary
from minqstar.training.checkpoint import differences
from minqstar.training.formats import as_pairs
from minqstar.training.writer import RunWriter
from minqstar.world.grammar import PAID
from minqstar.world.tldr import world_hash

REAL = ROOT.parent / "shared" / "data" / "real_prefs.jsonl"
KEYS = set(
    """reward_margin chosen_reward rejected_reward kl_to_ref fact_error_rate ref_fact_error_rate
    optimal_fact_error_rate judge_return ref_judge_return optimal_judge_return pair_accuracy
    optimal_pair_accuracy win_rate_vs_preferred off_grammar_rate greedy_off_grammar_rate mean_length
    q_gap_rmse q_gap_correlation q_gap_r2 q_gap_by_class""".split()
)  # what the design asks of the evaluation


def test_the_summary_has_its_keys(trained):
    summary = json.loads((trained / "runs/dpo/summary.json").read_text())
    keys = set("stage steps seconds device dtype parameters tokens_seen first_loss last_loss eval".split())
    assert keys <= summary.keys() and summary["eval"].keys() >= KEYS
    assert abs(summary["first_loss"] - math.log(24)) < (1e-5 if summary["dtype"] == "float32" else 1e-4)
    assert set(summary["eval"]["q_gap_by_class"]) == {"fact", "clause", "filler", "forced"}
    assert summary["steps"] == len((trained / "runs/dpo/metrics.jsonl").read_text().splitlines())
    for name in ("fact_error_rate", "off_grammar_rate", "pair_accuracy", "win_rate_vs_preferred"):
        assert 0 <= summary["eval"][name] <= 1
    sft = json.loads((trained / "runs/sft/summary.json").read_text())
    assert sft["stage"] == "sft" and sft["eval"]["loss"] < math.log(1024)


def test_a_second_run_reuses_sft_and_never_overwrites(trained):
    again = command(trained, "train.py", "--stage", "dpo", *TINY)
    assert again.returncode == 1 and "runs/dpo exists" in again.stderr and again.stderr.count("\n") == 1
    other = command(trained, "train.py", "--stage", "dpo", *TINY, "--sft.lr", "0.5", "--runs", "runs")
    assert other.returncode == 1 and other.stderr.count("\n") == 1
    before = (trained / "runs/dpo/config.json").read_bytes()
    (trained / "elsewhere").mkdir()
    (trained / "elsewhere/sft").symlink_to(trained / "runs/sft")
    reused = command(trained, "train.py", *TINY, "--runs", "elsewhere")
    assert reused.returncode == 0 and "trained before with these very options" in reused.stdout
    stale = command(trained, "train.py", *TINY, "--runs", "elsewhere", "--sft.lr", "0.5")
    assert stale.returncode == 1
    (trained / "stale").mkdir()
    (trained / "stale/sft").symlink_to(trained / "runs/sft")
    stale = command(trained, "train.py", *TINY, "--runs", "stale", "--sft.lr", "0.5")
    assert stale.returncode == 1 and "trained otherwise (sft.lr: 0.02 -> 0.5)" in stale.stderr
    assert (trained / "runs/dpo/config.json").read_bytes() == before


SEARCHES = [
    "greedy",
    "sample --top-k 20 --top-p 0.9",
    "best-of-n --n 40",
    "best-of-n --rank-by judge",
    "beam --beam.width 4 --beam.n 3 --beam.alpha 0.5",
    "beam --proxy-base runs/sft --proxy-alpha 0.5",
    "mcts --mcts.budget 30 --mcts.leaves 2 --mcts.advance",
    "mcts --step implicit --mcts.budget 70",
    "mcts --step guided",
]


@pytest.mark.parametrize("how", SEARCHES)
def test_sample_answers_in_json(trained, tokenizer, how):
    done = command(trained, "sample.py", "--search", *how.split(), "--json", "--seed", "3")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert tokenizer.decode(found["token_ids"]) == found["text"]
    assert len(found["rewards"]) == len(found["tokens"]) == len(found["logps"])
    assert found["logp"] == pytest.approx(sum(found["logps"]))
    assert found["implicit_return"] == pytest.approx(sum(found["rewards"]))
    assert found["judge"].keys() == {"return", "on_grammar", "right", "wrong"}
    assert found["model_calls"] > 0 and found["tokens_forwarded"] > found["nodes"] > 0
    assert len(found["others"]) == (2 if "beam.n" in how else 0)
    assert (found["mcts"] is not None) == ("mcts" in how)
    if "guided" in how:
        assert found["mcts"]["proved"]
    again = json.loads(command(trained, "sample.py", "--search", *how.split(), "--json", "--seed", "3").stdout)
    assert again | {"seconds": 0} == found | {"seconds": 0}


def test_a_search_tree_to_look_at(trained):
    """One self-contained page: well-formed, every drawn token in it, nothing loaded from elsewhere."""
    done = command(trained, *"sample.py --search mcts --mcts.budget 300 --mcts.leaf value --tree tree.html".split())
    assert done.returncode == 0 and "simulations" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    page = (trained / "tree.html").read_text()
    body = xml.etree.ElementTree.fromstring(page).find("body")
    tokens = [e for e in body.iter("span") if e.get("title")]
    nodes = int(re.search(r"nodes: ([\d,]+)", page)[1].replace(",", ""))
    assert len(tokens) >= nodes - 1 and len([li for li in body.iter("li") if li.get("class") == "best"]) == 1
    assert "http" not in page and "<script" not in page


def test_sample_in_the_terminal_and_from_standard_input(trained):
    shown = command(trained, "sample.py", "--search", "greedy")
    assert shown.returncode == 0 and "log-probability" in shown.stdout and "judge's return" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    piped = command(trained, "sample.py", "--prompt-file", "-", "--run", "runs/sft", "--json", input=b"Hello there")
    assert piped.returncode == 0 and json.loads(piped.stdout)["judge"] is None
    assert json.loads(piped.stdout)["rewards"] is None and json.loads(piped.stdout)["implicit_return"] is None
    plain = command(trained, "sample.py", "--run", "runs/sft")
    assert plain.returncode == 0 and "log-probability" in plain.stdout and "implicit return" not in plain.stdout


def test_the_evaluation_repeats_what_the_summary_says(trained):
    shown = command(trained, "-m", "minqstar.evaluate", "runs/dpo")
    assert shown.returncode == 0 and "fact_error_rate" in shown.stdout
    done = command(trained, "-m", "minqstar.evaluate", "runs/dpo", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((trained / "runs/dpo/summary.json").read_text())["eval"]


def test_searches_that_cannot_be_are_refused_in_one_line(trained, tokenizer, tmp_path):
    small = train_vocabulary(["a post of few words"] * 9, 270)
    for stage in ("sft", "dpo"):
        shutil.copytree(trained / "runs" / stage, tmp_path / stage)
    model = random_model(vocab_size=270, block_size=96)
    with RunWriter(tmp_path / "other", {"stage": "sft", "model": vars(model.config)}) as writer:
        writer.save_model(model)
        small.save(writer.folder / "vocab.tiktoken")
    for words, message in (
        ("--search sample --top-k 5000", "top-k is 5000; the vocabulary has 1024"),
        ("--search mcts --step guided --prompt Hello", "needs a post of the TL;DR world"),
        ("--run sft --search mcts --step implicit", "sft is an SFT run"),
        ("--search beam --proxy-base other", "other and dpo have different vocabularies"),
        ("--search mcts --proxy-base nowhere", "nowhere is not a run folder"),
        ("--search beam --proxy-base sft --proxy-alpha nan", "alpha must be between -1000 and 1000"),
        ("--search beam --max-new-tokens 2000", "leaves no room for 2000 new ones"),
        ("--search mcts --tree no/such/folder/tree.html", "there is no folder no/such/folder"),
    ):
        done = command(tmp_path, "sample.py", *([] if "--run" in words else ["--run", "dpo"]), *words.split())
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_table_of_searches(trained):
    """On a policy that has learned nothing, and on the exact one: beams and trees beat greedy, tokens are counted."""
    words = ("-m", "minqstar.lab.searches", "--posts", "6", "--most", "90")
    shown = command(trained, *words)
    assert shown.returncode == 0 and max(map(len, shown.stdout.splitlines())) <= 80, shown.stderr
    tables = json.loads(command(trained, *words, "--json").stdout)
    learned, exact = tables["learned"], tables["exact"]
    assert learned.keys() == exact.keys() - {"A*"} and {"greedy", "beam 5", "beam 20"} < learned.keys()
    for row in learned.values():
        assert row.keys() >= {"mean_logp", "tokens_forwarded", "ge_greedy"} and 0 <= row["ge_greedy"] <= 1
    assert learned["greedy"]["ge_greedy"] == 1 and learned["beam 20"]["ge_greedy"] == 1
    for name, row in exact.items():
        assert row.keys() >= {"optimum_found", "mean_regret", "tokens_forwarded"} and row["mean_regret"] > -1e-9
        assert name == "greedy" or row["mean_regret"] <= exact["greedy"]["mean_regret"]
        assert row["optimum_found"] < 1 or row["mean_regret"] < 1e-6
    assert exact["best first"]["proof_efficiency"] == 1 < exact["A*"]["proof_efficiency"]
    for name in ("depth first", "mcts to a proof"):
        assert 0 < exact[name]["proved"] <= exact["best first"]["proved"] == exact["A*"]["proved"] == 1
        assert exact[name]["proof_efficiency"] <= 1
    assert exact["beam 20"]["optimum_found"] == exact["mcts as beam 20"]["optimum_found"] == 1
    assert exact["mcts as beam 5"]["tokens_forwarded"] <= exact["beam 5"]["tokens_forwarded"]


def test_a_file_of_ones_own(tmp_path):
    rows = [{"prompt": f"Say {i}.", "chosen": f" {i}, gladly.", "rejected": f" {i * 2} no"} for i in range(1, 40)]
    rows += [
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "y " * 600, "chosen": "a", "rejected": "b"},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = shlex.split("--model.n-layer 1 --model.n-embd 32 --model.block-size 256")
    short = shlex.split("--sft.min-steps 10 --dpo.min-steps 20")
    done = command(tmp_path, "train.py", "--data", "mine.jsonl", *small, *short)
    assert done.returncode == 0, done.stderr
    assert "chosen equals rejected" in done.stdout
    summary = json.loads((tmp_path / "runs/mine/dpo/summary.json").read_text())
    assert summary["rows_skipped"] == {"chosen equals rejected": 1, "longer than 256 tokens": 1}
    assert summary["last_loss"] < summary["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert "pair_accuracy" in summary["eval"] and "fact_error_rate" not in summary["eval"]
    answer = command(tmp_path, "sample.py", "--run", "runs/mine/dpo", "--prompt", "Say 7.", "--json")
    assert answer.returncode == 0 and json.loads(answer.stdout)["judge"] is None


def test_pairs_and_rankings_in_one_file(tmp_path):
    rows = [{"prompt": f"Say {i}.", "chosen": f" {i}, gladly.", "rejected": f" {i * 2} no"} for i in range(1, 40, 2)]
    rows += [{"prompt": f"Say {i}.", "ranked": [f" {i}, gladly.", f" {i}.", f" {i * 2} no"]} for i in range(2, 40, 2)]
    rows += [{"prompt": "x", "ranked": ["a", "b", "a"]}]
    random.Random(0).shuffle(rows)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = shlex.split("--model.n-layer 1 --model.n-embd 32 --model.block-size 256 --sft.on chosen --held-out 0.2")
    short = shlex.split("--sft.min-steps 10 --dpo.min-steps 20 --dpo.batch-tokens 1000000")
    done = command(tmp_path, "train.py", "--stage", "dpo", "--data", "mine.jsonl", *small, *short)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/mine/dpo/summary.json").read_text())
    assert summary["rows_skipped"] == {"a response is ranked twice": 1}
    held = [json.loads(line) for line in (tmp_path / "runs/mine/dpo/held_out.jsonl").read_text().splitlines()]
    prompts = {row["prompt"] for row in held}
    mine = [row for row in rows if row["prompt"] in prompts]
    assert held == as_pairs(mine) and {len(row.get("ranked", "ab")) for row in mine} == {2, 3}
    assert summary["eval"]["pairs"] == len(held)
    left = [len(row.get("ranked", "ab")) for row in rows if row["prompt"] not in {*prompts, "x"}]
    assert summary["first_loss"] == pytest.approx(np.mean([math.log(math.factorial(K)) for K in left]), abs=1e-4)
    assert summary["last_loss"] < summary["first_loss"] and summary["rows_used"] == len(left)
    asked = command(tmp_path, "-m", "minqstar.evaluate", "runs/mine/dpo", "--data", "mine.jsonl", "--json")
    usable = [row for row in rows if row["prompt"] != "x"]
    assert asked.returncode == 0 and json.loads(asked.stdout)["pairs"] == len(as_pairs(usable)), asked.stderr


@pytest.mark.skipif(not REAL.exists(), reason="the real preference data are not beside this checkout")
def test_real_data(tmp_path):
    small = shlex.split("--model.n-layer 1 --model.n-embd 32 --sft.min-steps 5 --sft.epochs 0.1 --dpo.min-steps 80")
    done = command(tmp_path, "train.py", "--data", str(REAL), *small)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/real_prefs/dpo/summary.json").read_text())
    assert summary["rows_used"] + sum(summary["rows_skipped"].values()) <= 113 and summary["rows_used"] > 20
    assert summary["last_loss"] < math.log(2)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ("train.py --data nowhere.jsonl", 1, "cannot read nowhere.jsonl: No such file"),
        ("train.py --data bad.jsonl", 1, "bad.jsonl:2: the field 'rejected' is missing"),
        ("train.py --data long.jsonl", 1, "every row was skipped"),
        ("train.py --nonsense 3", 2, "Unrecognized options: --nonsense"),
        ("train.py --stage rl", 2, "invalid choice 'rl'"),
        ("train.py --dpo.beta 0", 2, "--dpo.beta must be positive"),
        ("train.py --sft.lr nan", 2, "--sft.lr must be positive and finite"),
        ("train.py --sft.lr fast", 2, "could not convert"),
        ("train.py --model.n-head 5", 2, "--model.n-embd (128) must be a multiple of twice --model.n-head (5)"),
        ("train.py --model.n-layer 1000 --model.n-embd 65536", 1, "GB of memory; this machine has"),
        ("train.py --model.n-layer 1000000000", 2, "--model.n-layer must be a whole number between 1 and 1,000"),
        ("train.py --world.ranked 1", 2, "ranked must be between 2 and 8, got 1"),
        ("train.py --world.pairs 0", 2, "pairs must be between 1 and ten million"),
        ("train.py --vocabulary nowhere", 1, "cannot read the vocabulary nowhere"),
        ("sample.py --run nowhere", 1, "nowhere is not a run folder"),
        ("sample.py --search sample --temperature -1", 2, "--temperature must be finite and not negative"),
        ("sample.py --search magic", 2, "invalid choice 'magic'"),
        ("sample.py --search beam --beam.width 0", 2, "--beam.width must be between 1"),
        ("sample.py --search beam --beam.alpha nan", 2, "alpha must be between 0 and 10"),
        ("sample.py --search beam --beam.n 6", 2, "n must be between 1 and the width (5)"),
        ("sample.py --search mcts --mcts.budget 0", 2, "budget must be between 1"),
        ("sample.py --search sample --top-p 0", 2, "--top-p must be above 0"),
        ("sample.py --tree tree.html", 2, "--tree needs --search mcts"),
        ("sample.py --step implicit", 2, "--step implicit needs --search mcts"),
        ("-m minqstar.lab.searches --posts 0", 2, "posts must be positive"),
        ("-m minqstar.lab.searches --most 0", 2, "most must be between 1 and 100,000"),
        ("-m minqstar.evaluate nowhere", 1, "nowhere is not a run folder"),
        ("-m minqstar.world.tldr --data.pairs x", 2, "invalid literal"),
        ("-m minqstar.world.tldr --data.sft 7", 2, "sft must be a multiple of 4"),
        ("-m minqstar.training.data nowhere.jsonl --train-vocabulary v", 1, "cannot read nowhere.jsonl"),
        ("-m minqstar.training.data bad.jsonl --train-vocabulary v --vocabulary-size 300", 1, "bad.jsonl:2"),
    ],
)
def test_a_mistake_gives_one_line_and_writes_nothing(tmp_path, args, status, message):
    fine = json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n"
    (tmp_path / "bad.jsonl").write_text(fine + json.dumps({"prompt": "p", "chosen": "c"}) + "\n")
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "p " * 3000, "chosen": "c", "rejected": "r"}) + "\n")
    done = command(tmp_path, *args.split())
    assert done.returncode == status, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1
    kept = {"data"} if "train.py --data long" in args else set()  # the cache, which is whole
    assert {p.name for p in tmp_path.iterdir()} == {"bad.jsonl", "long.jsonl"} | kept


def test_the_checker_of_a_run(trained):
    done = command(trained, "-m", "minqstar.bellman", "runs/dpo", "--cases", "5", "--pairs", "32", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] and len(report["identities"]) == 25 + 9 and len(report["faults"]) == 24 + 6
    figures = json.loads((trained / "runs/dpo/summary.json").read_text())["eval"]
    for name in ("q_gap_rmse", "q_gap_correlation", "q_gap_r2"):
        assert report["optimality"][name] == pytest.approx(figures[name], rel=1e-3)
    shown = command(trained, "-m", "minqstar.bellman", "--cases", "5")
    assert shown.returncode == 0 and "all faults flagged" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_what_takes_long_shows_what_it_has_and_then_a_bar(trained, monkeypatch):
    """The bar is on standard error, and there only if that is a terminal; what is printed is whole without it."""
    monkeypatch.chdir(trained)
    of_credit, of_checker = credit.Options(), bellman.Options(run=Path("runs/dpo"), cases=1, pairs=4)
    for main, options, first, bar, last in (
        (credit.main, of_credit, "wrong: ", "scoring 32 held-out pairs", "held-out summaries edited"),
        (bellman.main, of_checker, "planted fault", "checking runs/dpo", "distance to the exact optimum"),
    ):
        seen = {}
        for terminal in ("", "1"):
            monkeypatch.setenv("FORCE_COLOR", terminal)
            out, err, both = io.StringIO(), io.StringIO(), io.StringIO()
            with redirect_stdout(out), redirect_stderr(err):
                main(options)
            with redirect_stdout(both), redirect_stderr(both):
                main(options)
            seen[terminal] = out.getvalue(), err.getvalue(), both.getvalue()
        assert seen[""][1] == "" and bar not in seen["1"][0] and "100%" in seen["1"][1]
        text = seen["1"][2]
        assert text.index(first) < text.index(bar) < text.index(last)
        with redirect_stdout(out := io.StringIO()), redirect_stderr(err := io.StringIO()):
            main(replace(options, json=True))
        assert json.loads(out.getvalue()) and bar in err.getvalue()


def test_the_checker_fails_on_a_run_with_another_reference(trained, tmp_path):
    shutil.copytree(trained / "runs/dpo", tmp_path / "odd")
    (tmp_path / "odd/reference.safetensors").write_bytes((tmp_path / "odd/model.safetensors").read_bytes())
    options = ["--cases", "2", "--pairs", "4", "--data", str(trained / "data/tldr/test.jsonl")]
    done = command(tmp_path, "-m", "minqstar.bellman", "odd", *options)
    assert done.returncode == 1 and "odd/reference.safetensors is not what the run was finished with" in done.stderr
    reseal(tmp_path / "odd")
    done = command(tmp_path, "-m", "minqstar.bellman", "odd", *options)
    assert done.returncode == 1 and "FAILS" in done.stdout and "recorded reference" in done.stdout
    sft = command(tmp_path, "-m", "minqstar.bellman", str(trained / "runs/sft"), *options)
    assert sft.returncode == 1 and "without its reference" in sft.stderr


def strict(text: str) -> dict:
    """JSON as the standard has it: no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("what", ["edited response", "foreign facts", "tight context", "untouched"])
def test_the_evaluation_never_loses_a_run(trained, tmp_path, what):
    """Rows that look like the world's and are not get the figures that need no oracle."""
    rows = [json.loads(line) for line in (trained / "data/tldr/train.jsonl").read_text().splitlines()][:40]
    for row in rows:
        if what == "edited response":
            row["ranked"][0] += " Indeed."
        if what == "foreign facts":
            row |= {"prompt": f"Say {row['prompt'][-30:]}", "facts": {"scenario": "mine", "subreddit": "x"}}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model.block-size", "140"] if what == "tight context" else []
    done = command(tmp_path, "train.py", "--data", "rows.jsonl", "--sft.epochs", "0.1", *SMALL, *options)
    assert done.returncode == 0, done.stderr
    figures = strict((tmp_path / "runs/rows/dpo/summary.json").read_text())["eval"]
    assert "pair_accuracy" in figures
    assert ("q_gap_rmse" in figures) == (what in ("untouched", "tight context"))
    shown = command(tmp_path, "sample.py", "--run", "runs/rows/dpo", "--max-new-tokens", "4")
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize(("share", "held_out"), [("0.9", 36), ("0.3", 12), ("0.01", 1), ("5e-324", 1)])
def test_the_held_out_share_is_what_was_asked_for(tmp_path, share, held_out):
    rows = [{"prompt": f"Say {i}.", "chosen": " a", "rejected": " b"} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command(tmp_path, "train.py", "--data", "mine.jsonl", "--held-out", share, *SMALL)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (tmp_path / "runs/mine/dpo/held_out.jsonl").read_text().splitlines()]
    assert len(kept) == held_out
    assert json.loads((tmp_path / "runs/mine/dpo/summary.json").read_text())["rows_used"] == 40 - held_out


def test_odd_values_are_taken_as_they_are(trained, tmp_path):
    """Markup in a path, a tiny temperature, a huge bias, endless white space: nothing special, and no traceback."""
    shutil.copytree(trained / "runs", tmp_path / "r[/x]")
    cold = command(tmp_path, "sample.py", "--run", "r[/x]/dpo", "--search", "sample", "--temperature", "1e-40")
    assert cold.returncode == 0, cold.stderr
    again = command(tmp_path, "train.py", "--runs", "r[/x]", *TINY)
    assert again.returncode == 1 and "r[/x]/dpo exists" in again.stderr
    few = ["--data.pairs", "4", "--data.sft", "4", "--data.held-out", "2"]
    few += ["--data.length-bias", "-100", "--out", "w"]
    assert command(tmp_path, "-m", "minqstar.world.tldr", *few).returncode == 0
    assert (
        "w: made anew (seed 0 -> 1)" in command(tmp_path, "-m", "minqstar.world.tldr", *few, "--data.seed", "1").stdout
    )
    (tmp_path / "w/manifest.json").write_text("garbage")
    damaged = command(tmp_path, "-m", "minqstar.world.tldr", *few)
    assert damaged.returncode == 1 and "is damaged" in damaged.stderr and damaged.stderr.count("\n") == 1


FILLER = ("filler", -1.0)  # a changed reward


def test_a_changed_world_makes_its_data_anew_and_reuses_no_old_reference(trained, tmp_path, monkeypatch):
    """The one line names the world, also where a resumed or a finished run would do; nothing old is lost."""
    shutil.copytree(trained, tmp_path / "old")
    shutil.rmtree(tmp_path / "old/runs/dpo")
    before = (tmp_path / "old/runs/sft/model.safetensors").read_bytes()
    monkeypatch.setitem(PAID, *FILLER)
    stale = command(tmp_path / "old", "train.py", *TINY)
    assert stale.returncode == 1 and stale.stderr.count("\n") == 1
    assert "runs/sft was trained on another world than today's: its scenarios, eps or rewards" in stale.stderr
    assert "made anew (its world is not today's: other scenarios, eps or rewards)" in " ".join(stale.stdout.split())
    assert (tmp_path / "old/runs/sft/model.safetensors").read_bytes() == before
    shutil.copy(tmp_path / "old/data/tldr/train.jsonl", tmp_path / "old/mine.jsonl")
    mine = command(tmp_path / "old", "train.py", *SMALL, "--data", "mine.jsonl", "--runs", "runs")
    assert mine.returncode == 1 and "trained on other data than mine.jsonl holds now" in mine.stderr  # of no world
    again = command(tmp_path / "old", "train.py", *TINY, "--overwrite")
    assert again.returncode == 0 and "made anew" not in again.stdout, again.stderr
    worlds = [json.loads((tmp_path / f"old/runs/{stage}/config.json").read_text())["world"] for stage in ("sft", "dpo")]
    manifest = json.loads((tmp_path / "old/data/tldr/manifest.json").read_text())
    assert worlds == [manifest["world"]] * 2 == [world_hash()] * 2
    assert command(tmp_path / "old", "-m", "minqstar.evaluate", "runs/dpo").stderr == ""


ORACLE = {  # how to ask about a run, and what only the oracle can answer
    "-m minqstar.evaluate runs/dpo --json": lambda found: found.get("q_gap_r2"),
    "-m minqstar.bellman runs/dpo --json --cases 2 --pairs 4": lambda found: found["optimality"],
    "-m minqstar.lab.credit --json": lambda found: found["held_out"] or found["versions"]["right"]["exact"],
    "-m minqstar.lab.searches --posts 2 --most 60 --json": lambda found: found.get("exact"),
    "sample.py --json": lambda found: found["judge"],
}


@pytest.mark.parametrize("how", ORACLE)
def test_a_run_is_compared_only_with_the_world_that_it_learned(trained, tmp_path, monkeypatch, recwarn, how):
    """Every command that asks the oracle: of a run of today's world, of an unknown one, of another one."""

    def ask() -> tuple[object, set[str]]:
        recwarn.clear()
        done = command(tmp_path, *how.split())
        assert done.returncode == 0, done.stderr
        return ORACLE[how](json.loads(done.stdout)), {str(warning.message) for warning in recwarn}

    shutil.copytree(trained / "runs/dpo", tmp_path / "runs/dpo")
    answer, lines = ask()
    assert answer and not lines
    file = tmp_path / "runs/dpo/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "world"}))
    reseal(file.parent)
    unknown, lines = ask()
    assert unknown == answer
    assert len(lines) == 1 and "runs/dpo does not say which world it learned" in lines.pop()
    file.write_text(json.dumps(config))
    monkeypatch.setitem(PAID, *FILLER)
    answer, lines = ask()
    assert not answer and len(lines) == 1 and re.search("learned another world .* undo the change, or", lines.pop())


def test_another_world_is_said_once_in_one_line(trained, tmp_path):
    """However often the oracle is asked."""
    shutil.copytree(trained / "runs/dpo", tmp_path / "runs/dpo")
    file = tmp_path / "runs/dpo/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"world": "0123"}))
    reseal(file.parent)
    done = process(tmp_path, "-m", "minqstar.lab.credit")
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("python -m minqstar.lab.credit: runs/dpo learned another world (0123) than today's (")
    assert "A*" not in done.stdout


def test_what_needs_the_oracle_says_so_of_a_run_of_another_world(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.setitem(PAID, *FILLER)
    for words in ("--search mcts --step guided", "--search best-of-n --rank-by judge"):
        done = command(tmp_path, "sample.py", *words.split())
        assert done.returncode == 1 and "and a run that learned it" in done.stderr, done.stderr
    lab = command(tmp_path, *"-m minqstar.lab.figures --quick --only credit --runs runs".split())
    assert lab.returncode == 1 and "was not trained on today's TL;DR world" in lab.stderr


def test_runs_made_before_the_hash_are_used(trained, tmp_path):
    """A reference that names no world is reused, and the line says so."""
    shutil.copytree(trained / "runs/sft", tmp_path / "runs/sft")
    file = tmp_path / "runs/sft/config.json"
    old = {key: value for key, value in json.loads(file.read_text()).items() if key != "world"}
    file.write_text(json.dumps(old))
    reseal(file.parent)
    done = command(tmp_path, "train.py", *TINY)
    assert done.returncode == 0, done.stderr
    assert "with these very options; it does not say on which world" in " ".join(done.stdout.split())
    assert differences(old, old | {"world": world_hash()}) == []
    assert differences(old | {"world": "0"}, old | {"world": "1"}) == ["world: 0 -> 1"]


def test_evaluation_refuses_rows_that_are_no_pairs(trained):
    done = command(trained, "-m", "minqstar.evaluate", "runs/dpo", "--data", "data/tldr/sft.jsonl")
    assert done.returncode == 1 and "needs rows with chosen and rejected" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("sample.py --search mcts --tree rows.jsonl --data rows.jsonl", "rows.jsonl exists and is no .html file"),
        ("sample.py --search mcts --tree prompt.html --prompt-file prompt.html", "prompt.html is what is read"),
        ("sample.py --search mcts --tree dpo/model.safetensors", "exists and is no .html file"),
        ("sample.py --search mcts --tree no/tree.html", "there is no folder no"),
        ("sample.py --search mcts --tree dpo", "it is a folder"),
        ("-m minqstar.lab.credit --html dpo/config.json", "exists and is no .html file"),
        ("-m minqstar.lab.credit --html link.html", "a link"),
        ("-m minqstar.lab.credit --png other.png/x.png", "there is no folder"),
        ("-m minqstar.lab.figures --out pictures", "beams.png is there, but no pictures/results.json"),
        ("-m minqstar.lab.figures --out other", "results.json holds something else"),
        ("-m minqstar.lab.figures --out rows.jsonl", "that is in no folder"),
        ("-m minqstar.training.data rows.jsonl --train-vocabulary rows.jsonl", "exists and is no .tiktoken file"),
        ("-m minqstar.training.data v.tiktoken --train-vocabulary v.tiktoken", "is what is read"),
        ("-m minqstar.training.data rows.jsonl --train-vocabulary dpo/v.tiktoken", "is a file of the run or data set"),
        ("-m minqstar.world.tldr --train-vocabulary rows.jsonl", "exists and is no .tiktoken file"),
        ("-m minqstar.world.tldr --out dpo", "is not a data set of this world"),
        ("-m minqstar.world.tldr --out rows.jsonl", "is not a data set of this world"),
        ("-m minqstar.world.tldr --out .", "is not a data set of this world"),
        ("train.py --data dpo/held_out.jsonl --runs .", "is a file of a run that would be made anew"),
        ("train.py --runs rows.jsonl", "rows.jsonl is no folder that can be written to"),
        ("train.py --runs rows.jsonl/x", "that is in no folder"),
    ],
)
def test_an_output_that_would_lose_something_is_refused_at_the_start(tmp_path, args, message):
    """Before anything is read: no run is there that could be."""
    for name in ("dpo", "pictures", "other"):
        (tmp_path / name).mkdir()
    for name in ("rows.jsonl", "prompt.html", "v.tiktoken", "dpo/model.safetensors", "dpo/v.tiktoken", "other.png"):
        (tmp_path / name).write_text("x")
    (tmp_path / "dpo/config.json").write_text("{}")
    (tmp_path / "other/results.json").write_text('{"mine": 1}')
    (tmp_path / "pictures/beams.png").write_text("a person's")
    (tmp_path / "link.html").symlink_to(tmp_path / "prompt.html")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = command(tmp_path, *args.split())
    assert done.returncode in (1, 2) and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
