"""How fast: training, decoding and tree search, against the big frameworks on the same machine and in the same run.

    python -m minqstar.lab.bench train --size tiny --peer trl
    python -m minqstar.lab.bench decode --size gpt2 --peer transformers --beams 5
    python -m minqstar.lab.bench mcts --size tiny --peer transformers

Both sides get GPT-2's architecture with equal parameters, random weights and random text of the same lengths. Each
measurement is a process of its own; sides take turns (A B A B …), so that what the machine does besides hits both.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from minqstar.cli import require, run
from minqstar.data import Group, PackedData
from minqstar.model import GPT, GPT2, GPTConfig
from minqstar.scoring import ReferenceCache, has_fast_bf16
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import decode, greedy
from minqstar.search.evaluator import Network
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.trainer import DPO, DPOConfig, Trainer, pass_order

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """A model and the texts that it is trained on and decodes after."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    prompts: tuple[int, int]  # tokens, shortest and longest
    responses: tuple[int, int]
    pairs: int  # of a training batch
    steps: int  # timed, after as many warm-up steps
    row_length: int  # of packed rows
    new_tokens: int  # decoded
    dtype: torch.dtype  # of decoding


SIZES = {
    "tiny": Size(4, 4, 128, 512, (32, 64), (12, 24), 32, 30, 176, 64, torch.float32),
    "gpt2": Size(12, 12, 768, 50257, (96, 192), (32, 64), 4, 4, 512, 32, torch.bfloat16),
}


def config_of(size: Size) -> GPTConfig:
    sizes = {name: getattr(size, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return GPTConfig(block_size=1024, **sizes, **GPT2)


def texts(size: Size, count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Random prompts with two responses each, as token ids; the last two ids are EOS and PAD."""
    rng = np.random.default_rng(0)
    draw = lambda bounds: rng.integers(0, size.vocab_size - 2, rng.integers(*bounds, endpoint=True)).tolist()  # noqa: E731
    return [(draw(size.prompts), draw(size.responses), draw(size.responses)) for _ in range(count)]


def random_model(size: Size) -> GPT:
    """Weights like a fresh GPT-2's, but none of them zero: output projections that start at zero would decode one
    token for ever."""
    model = GPT(config_of(size))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02, generator=generator)
    return model


class Endless(Network):
    """A network that never says EOS: every response has full length, as with transformers' min_new_tokens."""

    def _evaluation(self, hidden):
        evaluation = super()._evaluation(hidden)
        evaluation.logps[..., -2] = -torch.inf
        return evaluation


# ---- what is timed; each returns units per second


def ours_train(size: Size, options: "Options") -> float:
    """Pairs per second of the training loop itself, reference log-probs cached before."""
    eos, pad = size.vocab_size - 2, size.vocab_size - 1
    pairs = texts(size, 2 * size.steps * size.pairs)
    groups = [Group(prompt, ([*chosen, eos], [*rejected, eos])) for prompt, chosen, rejected in pairs]
    tokens = sum(group.length for group in groups) * size.pairs // len(groups)
    rows = max(1, round(tokens / size.row_length))
    data = PackedData(groups, pad, size.row_length)
    model, dtype = random_model(size), train_dtype()
    config = DPOConfig(
        matrices="adamw", lr=1e-4, adam_lr=1e-4, batch_tokens=rows * data.row_length, row_length=data.row_length,
        min_steps=2 * size.steps,
    )  # fmt: skip
    trainer = Trainer(model, data, config, None, dtype, 0)
    trainer.objective = DPO(ReferenceCache(model, data, dtype, trainer.passes), config.beta)
    done = []
    for _ in trainer.run():
        done.append(time.perf_counter())
        if trainer.step == 2 * size.steps:
            break
    order = pass_order(len(trainer.passes), 0, size.steps, 2 * size.steps)
    counted = sum(int(data.responses_in_row[trainer.passes[i]].sum()) // 2 for i in order)
    return counted / (done[-1] - done[size.steps - 1])


def train_dtype() -> torch.dtype:
    return torch.bfloat16 if has_fast_bf16(CPU) else torch.float32


def ours_decode(size: Size, options: "Options") -> float:
    """New tokens per second, of every prompt's one answer."""
    prompts = [prompt for prompt, _, _ in texts(size, options.batch)]
    evaluator = Endless(random_model(size).to(size.dtype).eval())
    what = (evaluator, prompts, size.vocab_size - 2, size.new_tokens)
    search = (lambda: beam_search(*what, BeamConfig(options.beams))) if options.beams else lambda: decode(*what, greedy)
    return options.batch * size.new_tokens / median_seconds(search)


def ours_mcts(size: Size, options: "Options") -> float:
    """Simulations per second, each of one new leaf, of a batch of trees."""
    prompts = [prompt for prompt, _, _ in texts(size, options.batch)]
    evaluator = Endless(random_model(size).to(size.dtype).eval())
    config = MCTSConfig(budget=options.simulations + 8, leaf="value")
    search = lambda: mcts(evaluator, prompts, size.vocab_size - 2, 8, config)  # noqa: E731
    return options.batch * options.simulations / median_seconds(search)


def median_seconds(search: Callable[[], object], times: int = 3) -> float:
    """Of a call, after one that warms up."""
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        search()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def transformers_model(size: Size):
    import transformers

    sizes = {name: getattr(size, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ids = {"bos_token_id": size.vocab_size - 2, "eos_token_id": size.vocab_size - 2}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=1024, **sizes, **none, **ids))


def transformers_decode(size: Size, options: "Options") -> float:
    """`generate` with its cache, left-padded, as its documentation says."""
    model = transformers_model(size).to(size.dtype).eval()
    prompts = [prompt for prompt, _, _ in texts(size, options.batch)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[size.vocab_size - 1] * (longest - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    kept = {"num_beams": max(options.beams, 1), "do_sample": False, "pad_token_id": size.vocab_size - 1}
    length = {"min_new_tokens": size.new_tokens, "max_new_tokens": size.new_tokens}
    search = lambda: model.generate(padded, attention_mask=real, **kept, **length)  # noqa: E731
    return options.batch * size.new_tokens / median_seconds(search)


def transformers_mcts(size: Size, options: "Options") -> float:
    """The straightforward search: nodes are objects, and every expansion reads its whole prefix again."""
    model = transformers_model(size).to(size.dtype).eval()

    class Node:
        def __init__(self, prior: float, score: float):
            self.prior, self.score, self.visits, self.total, self.children = prior, score, 0, 0.0, {}

    @torch.inference_mode()
    def expand(node: Node, prefix: list[int]):
        logps = model(torch.tensor([prefix])).logits[0, -1].float().log_softmax(-1)
        for logp, token in zip(*(t.tolist() for t in logps.topk(16)), strict=True):
            node.children[token] = Node(math.exp(logp), node.score + logp)

    def choose(node: Node) -> tuple[int, Node]:
        def puct(child: Node) -> float:
            value = child.total / child.visits if child.visits else node.total / node.visits
            return value + 2 * child.prior * math.sqrt(node.visits) / (1 + child.visits)

        return max(node.children.items(), key=lambda item: puct(item[1]))

    def search():
        for prompt, _, _ in texts(size, options.batch):
            root = Node(1.0, 0.0)
            for _ in range(options.simulations):
                node, path, prefix = root, [root], list(prompt)
                while node.children:
                    token, node = choose(node)
                    path.append(node)
                    prefix.append(token)
                expand(node, prefix)
                for passed in path:
                    passed.visits += 1
                    passed.total += node.score

    return options.batch * options.simulations / median_seconds(search, 1)


def trl_train(size: Size, options: "Options", compiled: bool = False) -> float:
    """DPOTrainer with precomputed reference log-probs, in the same dtype, on the same texts as words."""
    import datasets
    import tokenizers
    import transformers
    import trl

    V = size.vocab_size
    words = {f"t{i}": i for i in range(V - 2)} | {"<eos>": V - 2, "<pad>": V - 1}
    spelled = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    spelled.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=spelled, eos_token="<eos>", pad_token="<pad>")
    text = lambda ids: "".join(f" t{i}" for i in ids)  # noqa: E731
    rows = [
        {"prompt": text(prompt).strip(), "chosen": text(chosen), "rejected": text(rejected)}
        for prompt, chosen, rejected in texts(size, 2 * size.steps * size.pairs)
    ]
    done = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            done.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=size.pairs, num_train_epochs=1, learning_rate=1e-4,
            bf16=train_dtype() == torch.bfloat16, use_cpu=True, precompute_ref_log_probs=True, max_length=None,
            gradient_checkpointing=False, torch_compile=compiled, save_strategy="no", logging_steps=10**9,
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model=transformers_model(size), args=config, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return size.steps * size.pairs / (done[-1] - done[size.steps - 1])


SIDES: dict[tuple[str, str], Callable[[Size, "Options"], float]] = {
    ("train", "ours"): ours_train,
    ("train", "trl"): trl_train,
    ("train", "trl compiled"): partial(trl_train, compiled=True),
    ("decode", "ours"): ours_decode,
    ("decode", "transformers"): transformers_decode,
    ("mcts", "ours"): ours_mcts,
    ("mcts", "transformers"): transformers_mcts,
}
UNITS = {"train": "pairs/s", "decode": "new tokens/s", "mcts": "simulations/s"}


# ---- the limit of the machine


def matmul_rate(dtype: torch.dtype, n: int = 2048) -> float:
    """Floating point operations per second of an n x n product, the best of five."""
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    best = min(timed(lambda: a @ b) for _ in range(6))
    return 2 * n**3 / best


def read_rate() -> float:
    """Bytes per second read by a sum over 512 MB, the best of five."""
    x = torch.ones(2**27)
    return 4 * len(x) / min(timed(x.sum) for _ in range(6))


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def limit(options: "Options", size: Size) -> tuple[float, str]:
    """The most units per second that the machine could do, and what that rests on."""
    C, L = size.n_embd, size.n_layer
    blocks, head = 12 * L * C**2, size.vocab_size * C  # weights
    if options.what == "train":
        pairs = texts(size, 200)
        scored = np.mean([len(c) + len(r) + 2 for _, c, r in pairs])
        tokens = np.mean([len(p) for p, _, _ in pairs]) + scored
        keys = np.mean([len(p) + len(c) / 2 for p, c, _ in pairs]) / 2  # that a token sees
        flops = 6 * (tokens * (blocks + 2 * L * C * keys) + scored * head)
        rate = matmul_rate(train_dtype())
        return (
            rate / flops,
            f"{rate / 1e9:.0f} GFLOP/s of {str(train_dtype())[6:]} products, {flops / 1e9:.2f} GFLOP a pair",
        )
    weights = (blocks + head) * size.dtype.itemsize
    rate = read_rate()
    calls = rate / weights  # a call reads every weight once
    note = f"{rate / 1e9:.1f} GB/s read, {weights / 1e6:.0f} MB of weights a call"
    return calls * options.batch, note


@dataclass(frozen=True)
class Options:
    """Measure training, decoding or tree search, beside a peer."""

    what: Annotated[Literal["train", "decode", "mcts"], tyro.conf.Positional] = "train"
    """Pairs per second of DPO; new tokens per second; simulations per second."""
    size: Literal["tiny", "gpt2"] = "tiny"
    """4 layers of 128 channels and 512 tokens, or GPT-2's 12 of 768 and 50,257."""
    peer: Literal["none", "trl", "transformers"] = "none"
    """Whom to measure beside: trl for train (eager and compiled), transformers for decode and mcts."""
    batch: int = 1
    """Of decode and mcts: prompts at once."""
    beams: int = 0
    """Of decode: beams of each prompt; 0 is greedy."""
    simulations: int = 64
    """Of mcts: leaves of each tree."""
    rounds: int = 3
    """How often the sides take turns."""
    json: bool = False
    """Print one JSON object: medians of `ours` and `peer` and their `ratio`, in units per second; peak memory of each
    side in GB; the machine's own `limit` in the same units, and the `share_of_limit` that ours reaches."""
    side: Annotated[str, tyro.conf.arg(help="Used by the bench itself: measure one side in this process.")] = ""

    def __post_init__(self):
        for name in ("batch", "rounds", "simulations"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(self.beams >= 0, f"beams must not be negative, got {self.beams}")
        fits = self.peer == "none" or (self.peer == "trl") == (self.what == "train")
        require(fits, f"{self.what} has the peer {'trl' if self.what == 'train' else 'transformers'}, not {self.peer}")


def measure(options: Options, side: str) -> tuple[float, float]:
    """Units per second and peak memory in GB of one side, in a process of its own."""
    words = [sys.executable, "-m", "minqstar.lab.bench", options.what, "--size", options.size, "--side", side]
    for name in ("batch", "beams", "simulations"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"{side}: {(done.stderr.strip().splitlines() or ['it died'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["rate"], found["peak_gb"]


def main(options: Options):
    size = SIZES[options.size]
    if options.side:
        rate = SIDES[options.what, options.side](size, options)
        print(json.dumps({"rate": rate, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
        return
    sides = ["ours", *(side for what, side in SIDES if what == options.what and side.startswith(options.peer))]
    rates: dict[str, list[float]] = {side: [] for side in sides}
    peaks = dict.fromkeys(sides, 0.0)
    for _ in range(options.rounds):
        for side in sides:
            rate, peak = measure(options, side)
            rates[side].append(rate)
            peaks[side] = max(peaks[side], peak)
    medians = {side: statistics.median(values) for side, values in rates.items()}
    best = max(sides[1:], key=medians.get, default=None)
    most, why = limit(options, size)
    libraries = [
        "torch",
        "numpy",
        *({"trl": ["trl", "transformers"]}.get(options.peer, [options.peer]) if best else []),
    ]
    report = {
        "ours": medians["ours"],
        "peer": best and medians[best],
        "ratio": best and medians["ours"] / medians[best],
        "ours_peak_gb": peaks["ours"],
        "peer_peak_gb": best and peaks[best],
        "limit": most,
        "share_of_limit": medians["ours"] / most,
        "versions": {name: version(name) for name in libraries},
    }
    if options.json:
        print(json.dumps(report))
        return
    table = Table("side", UNITS[options.what], "slowest", "fastest", "peak GB", title=f"{options.what}, {options.size}")
    for side, values in rates.items():
        cells = (medians[side], min(values), max(values), peaks[side])
        table.add_row(side, *(f"{cell:.4g}" for cell in cells))
    console = Console(highlight=False)
    console.print(table)
    if best:
        console.print(f"ratio to {best}: {report['ratio']:.2f}")
    console.print(f"limit: {most:.4g} {UNITS[options.what]} ({why}); ours reaches {report['share_of_limit']:.1%}")


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.lab.bench")
