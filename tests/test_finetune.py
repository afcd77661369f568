"""Somebody's checkpoint trained on somebody's data: from the command line to a run that every command takes."""

import json
import random
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, command, line_of, process
from safetensors.torch import load_file
from test_borrowed import folders  # noqa: F401 (a fixture)
from test_pair import pair  # noqa: F401 (a fixture)
from torch import nn

import minqstar
from minqstar.lm.lora import LoRAConfig, add_lora, load_adapter, merged
from minqstar.lm.model import GPT, GPTConfig
from minqstar.lm.pretrained import load_pretrained
from minqstar.options import FINE_TUNING, Options, defaults
from minqstar.training.checkpoint import load_run
from minqstar.training.data import PackedData, tokenize
from minqstar.training.estimate import Living, estimate
from minqstar.training.trainer import DPOConfig

CPU = torch.device("cpu")
CALL = {"role": "assistant", "content": "look"}
TOOL = {"role": "tool", "content": "2024 dogs"}
SMALL = shlex.split("--dpo.row-length 96 --dpo.batch-tokens 192 --dpo.lr 1e-3 --dpo.adam-lr 1e-3 --dtype float32")


def talk(i: int) -> dict:
    """A conversation with two answers; in the first a tool has its say."""
    said = [{"role": "user", "content": f"the lazy dog {i}"}]
    answer = {"role": "assistant", "content": f"jumps {i}"}
    return {"chosen": [*said, CALL, TOOL, answer], "rejected": [*said, {"role": "assistant", "content": "no"}]}


def write(folder: Path, count: int = 24):
    (folder / "mine.jsonl").write_text("".join(json.dumps(talk(i)) + "\n" for i in range(count)))


@pytest.fixture
def work(tmp_path) -> Path:
    write(tmp_path)
    return tmp_path


def train(folder: Path, model: Path, *more: str):
    done = command(folder, "train.py", "--init", str(model), "--data", "mine.jsonl", *SMALL, *more)
    assert done.returncode == 0, done.stderr
    return done


def test_dpo_of_a_checkpoint_on_conversations(pair, work):  # noqa: F811
    """The reference is the checkpoint; the tool is seen and not scored; the run needs nothing but its folder."""
    done = train(work, pair[0])
    assert "mine.jsonl: 24 rows of format implicit" in done.stdout
    first = done.stdout[done.stdout.index("chosen, scored:") :].split("rejected")[0].replace("\n", "")
    assert "⟦look<|im_end|>⟧" in first and "⟦jumps 0<|im_end|>⟧" in first and first.count("⟦") == 2
    assert "2024 dogs" in first and "-beta KL(pi_ref||pi)" in done.stdout
    run = work / "runs/mine/dpo"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["first_loss"] == pytest.approx(0.6931472, abs=1e-6) and summary["last_loss"] < 0.68
    assert summary["rows_used"] == 23 and summary["eval"]["pairs"] == 1
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["chosen_reward"] == metrics[0]["rejected_reward"] == 0.0
    loaded, origin = load_run(run, CPU), load_pretrained(pair[0], CPU)
    for (name, kept), given in zip(loaded.reference.named_parameters(), origin.parameters(), strict=True):
        assert torch.equal(kept, given), name
    assert loaded.tokenizer.encoding_key == minqstar.load(pair[0]).tokenizer.encoding_key and loaded.beta == 0.1
    q, row = minqstar.load(run), talk(99)
    prompt, answers = row["chosen"][:1], [row["chosen"][1:], row["rejected"][1:]]
    one, other = q.score(prompt, answers)
    others = [i for i, token in enumerate(one.tokens) if one.rewards[i] == 0]
    assert "2024 dogs" in q.tokenizer.decode([one.ids[i] for i in others]) and (other.rewards != 0).all()
    assert one.rewards[-1] != 0 and one.ids[-1] == q.tokenizer.eos
    for args in (
        ["-m", "minqstar.score", "--policy", "runs/mine/dpo", "mine.jsonl", "--html", "page.html", "--out", "o.jsonl"],
        ["-m", "minqstar.evaluate", "runs/mine/dpo", "--data", "mine.jsonl"],
        ["sample.py", "--run", "runs/mine/dpo", "--max-new-tokens", "4"],
        ["-m", "minqstar.lab.searches", "runs/mine/dpo", "--most", "60"],
    ):
        after = command(work, *args)
        assert after.returncode == 0 and not after.stderr, after.stderr
    assert "&lt;|im_start|&gt;user" in (work / "page.html").read_text()
    refused = command(work, "-m", "minqstar.bellman", "runs/mine/dpo", "--cases", "1")
    assert refused.returncode == 1 and "others speak inside of every response" in refused.stderr


def test_sft_of_a_checkpoint_then_dpo_of_that(pair, work):  # noqa: F811
    """Texts in the chat template; the run remembers that its prompts are user's turns."""
    rows = [{"prompt": f"the lazy dog {i}", "chosen": f"jumps {i}", "rejected": "no"} for i in range(24)]
    (work / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = ("--stage", "sft", "--chat", "--sft.row-length", "96", "--sft.min-steps", "5", "--max-length", "90")
    done = command(work, "train.py", "--init", str(pair[0]), "--data", "mine.jsonl", *sft)
    assert done.returncode == 0, done.stderr
    config = json.loads((work / "runs/mine/sft/config.json").read_text())
    assert config["sft"]["matrices"] == "adamw" and config["sft"]["lr"] == 1e-5 and config["chat"] is True
    line = ("train.py", "--reference", "runs/mine/sft", "--data", "mine.jsonl", "--dpo.min-steps", "3")
    assert command(work, *line).returncode == 0
    q = minqstar.load(work / "runs/mine/dpo")
    turn = [{"role": "user", "content": "the lazy dog"}]
    assert q.group("the lazy dog", []).prompt == q.tokenizer.encode_prompt(turn)
    assert json.loads((work / "runs/mine/dpo/summary.json").read_text())["first_loss"] == pytest.approx(0.6931472)


def test_lora_is_saved_alone_and_merged(pair, work):  # noqa: F811
    more = ("--lora.rank", "3", "--lora.alpha", "5", "--recompute")
    train(work, pair[0], *more)
    run = work / "runs/mine/dpo"
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6) and first["margin"] == 0.0
    model = load_pretrained(pair[0], CPU)
    add_lora(model, LoRAConfig(rank=3, alpha=5.0), 7)
    load_adapter(model, load_file(run / "adapter.safetensors"))
    for name, weight in merged(model).state_dict().items():
        assert torch.equal(weight, load_run(run, CPU).model.state_dict()[name])
    state = load_file(run / "state.safetensors")
    assert {name.split("/")[0] for name in state} == {"model", "optimizer", "rng"}
    assert all("lora_" in name for name in state if name != "rng")
    files = sorted(work.rglob("*"))
    forgot = command(work, "train.py", "--init", str(pair[0]), "--data", "mine.jsonl", *SMALL, "--extend", "2")
    assert forgot.returncode == 1 and "was trained otherwise (lora: " in forgot.stderr, forgot.stderr
    assert sorted(work.rglob("*")) == files
    train(work, pair[0], *more, "--extend", "2")
    for odd, words in (
        (("--lora.rank", "3", "--lora.on", "attn.q_proj"), "LoRA on attn.q_proj: there is no such layer"),
        (("--lora.alpha", "3"), "--lora.alpha needs --lora.rank"),
        (("--lora.rank", "3", "--reference", str(pair[1])), "give --init or --reference, not both"),
    ):
        refused = command(work, "train.py", "--init", str(pair[0]), "--data", "mine.jsonl", "--overwrite", *odd)
        assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    refused = command(work, "train.py", "--data", "mine.jsonl", "--stage", "sft", "--lora.rank", "3")
    assert refused.returncode == 2 and "LoRA adapts a model that is there" in refused.stderr


ALL = pytest.param("--recompute --dpo.sft-weight 0.1", marks=pytest.mark.slow)


@pytest.mark.parametrize("how", [pytest.param("", marks=pytest.mark.slow), "--lora.rank 2", ALL])
def test_killed_and_resumed_equals_undisturbed(pair, tmp_path, how):  # noqa: F811
    """Bit for bit: weights, moments, logs."""
    options = ["train.py", "--init", str(pair[0]), "--data", "mine.jsonl", *SMALL, "--dpo.min-steps", "30"]
    options += [*shlex.split(how), "--save-every", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        write(folder)
    assert command(one, *options).returncode == 0
    rng, log = random.Random(how), two / "runs/mine/dpo.part/metrics.jsonl"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = subprocess.Popen(line_of(*options, "--resume"), cwd=two, env=ENVIRONMENT, **quiet)
    target = rng.randint(3, 12)
    while started.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= target):
        time.sleep(0.002)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL and log.exists()
    done = process(two, *options, "--resume")
    assert done.returncode == 0 and "DPO: resumed at step" in done.stdout, done.stderr
    runs = [folder / "runs/mine/dpo" for folder in (one, two)]
    files = ["model.safetensors", "reference.safetensors"] + ["adapter.safetensors"] * ("lora" in how)
    assert all(len({(run / file).read_bytes() for run in runs}) == 1 for file in files)
    states = [load_file(run / "state.safetensors") for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [m | {"seconds": 0} for m in logs[0]] == [m | {"seconds": 0} for m in logs[1]]


def test_a_share_of_sft_of_weight_zero_changes_no_bit(pair, tmp_path):  # noqa: F811
    weights = []
    for more in ((), ("--dpo.sft-weight", "0.0"), ("--dpo.sft-weight", "0.5")):
        write(tmp_path)
        train(tmp_path, pair[0], "--overwrite", *more)
        weights.append((tmp_path / "runs/mine/dpo/model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_model_that_others_trained_gets_the_usual_small_steps(pair, tmp_path):  # noqa: F811
    for args in (["--init", str(pair[0])], [f"--reference={pair[0]}"], ["--stage", "sft", "--init", str(pair[0])]):
        assert defaults(args) == Options(**FINE_TUNING)
    for args in ([], ["--init"], ["--init", str(tmp_path)], ["--data", str(pair[0])]):
        assert defaults(args) == Options()
    assert FINE_TUNING["dpo"].min_steps == 0 and 1e-6 <= FINE_TUNING["dpo"].lr <= 1e-5
    shown = command(tmp_path, "train.py", "--init", str(pair[0]), "--help-all").stdout
    assert "2e-06" in shown and "2e-06" not in command(tmp_path, "train.py", "--help-all").stdout


# ---- the plan


def test_living_bytes_are_those_of_the_tensors_that_are_alive():
    with torch.device("cpu"), Living() as living:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = (b + b).view(10, 100)[2:]
        assert living.bytes <= living.peak == 8_000  # a and b; b and b + b
        del b, c
        d = torch.zeros(7, dtype=torch.float64)
    assert living.bytes == 56 + 0 * len(d)


def test_a_plan_counts_weights_moments_and_products(pair):  # noqa: F811
    """On a model without attention's share: two matrices, whose products can be counted by hand."""
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c d"}] * 4
    groups, _ = tokenize(rows, minqstar.load(pair[0]).tokenizer, 64, share=False)
    architecture = GPTConfig(vocab_size=600, n_layer=5, n_head=2, n_embd=32)
    data, config = PackedData(groups, 2, 16), DPOConfig(matrices="adamw", min_steps=0, batch_tokens=64)
    found = estimate(architecture, data, config, 0, torch.float32, LoRAConfig(), False, reference=False)
    whole = GPT(architecture)
    assert found.parameters == found.trained == whole.num_parameters() and found.moments == 8 * found.trained
    assert found.weights == 4 * found.parameters and found.step > found.weights  # gradients alone are as many
    linear = sum(m.weight.numel() for m in whole.modules() if isinstance(m, nn.Linear))
    tokens, scored = found.tokens, data.num_scored
    products = 6 * (linear * tokens + 600 * 32 * scored)
    assert products < found.flops * 1.1 and found.flops < 1.3 * products  # attention is the rest; the last MLP less
    adapted = estimate(architecture, data, config, 0, torch.float32, LoRAConfig(rank=2), False, reference=True)
    assert adapted.moments == 8 * adapted.trained < 8 * found.trained / 10 and adapted.cache == 4 * scored
    muon = estimate(architecture, data, DPOConfig(min_steps=0), 0, torch.float32, LoRAConfig(), False, reference=False)
    assert muon.moments == 8 * found.trained - 4 * linear
    many = PackedData(tokenize(rows * 99, minqstar.load(pair[0]).tokenizer, 64, share=False)[0], 2, 64)
    config = DPOConfig(matrices="adamw", min_steps=0, batch_tokens=4096)
    kept, again = (
        estimate(architecture, many, config, 0, torch.float32, LoRAConfig(), recompute, False)
        for recompute in (False, True)
    )
    assert again.step < 0.7 * kept.step and again.flops > 1.1 * kept.flops


def test_a_plan_is_printed_and_nothing_is_made(pair, work):  # noqa: F811
    done = train(work, pair[0], "--plan")
    for words in ("parameters", "moments of the optimizer", "memory at its peak", "optimizer steps", "minutes, about"):
        assert words in done.stdout
    assert not (work / "runs").exists()


PLANNED = shlex.split(
    "--stage sft --sft.epochs 0.1 --sft.min-steps 3 --world.pairs 64 --world.sft 4000 --world.held-out 32 "
    "--model.n-layer 6 --model.n-embd 512 --model.n-head 8"
)
MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6 * 1.024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--sft.batch-tokens 11520", "--dtype float32", "--recompute"])
def test_the_planned_memory_is_what_is_measured(tmp_path, more):
    """Within 20%, on machines with and without bfloat16."""
    options = [*PLANNED, *shlex.split(more)]
    planned = process(tmp_path, "train.py", *options, "--plan").stdout
    (line,) = [line for line in planned.splitlines() if line.startswith("memory at its peak")]
    done = process(tmp_path, "-c", MEASURE, *line_of("train.py", *options)[1:])
    assert done.returncode == 0, done.stderr
    assert float(line.split()[-2]) == pytest.approx(float(done.stdout), rel=0.2)
