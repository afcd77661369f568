"""What the bench times: ours, transformers' and TRL's way of doing the same work, piece after piece without end."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from minqstar.errors import require
from minqstar.lm.fast import compiled, has_fast_bf16
from minqstar.lm.model import GPT, GPT2, GPTConfig
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import decode, greedy
from minqstar.search.evaluator import Network
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.training.data import Group, PackedData
from minqstar.training.scoring import ReferenceCache
from minqstar.training.trainer import DPO, DPOConfig, Trainer

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
    warm_up: int  # training steps before the first that counts
    row_length: int  # of packed rows
    new_tokens: int  # decoded
    dtype: torch.dtype  # of decoding


ENDLESS = 10**6  # steps
SIZES = {
    "tiny": Size(4, 4, 128, 512, (32, 64), (12, 24), 32, 30, 176, 64, torch.float32),
    "gpt2": Size(12, 12, 768, 50257, (96, 192), (32, 64), 4, 3, 512, 32, torch.bfloat16),
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

    def _evaluation(self, logps):
        evaluation = super()._evaluation(logps)
        evaluation.logps[..., -2] = -torch.inf
        return evaluation


# ---- the work; each side calls `done(units)` after every piece of it


Done = Callable[[float], None]


class Load(Protocol):
    """What the options of the bench say of the work."""

    batch: int
    beams: int
    simulations: int


def ours_train(size: Size, load: Load, done: Done, compile: bool = False):
    """Pairs through the training loop itself, reference log-probs cached before."""
    eos, pad = size.vocab_size - 2, size.vocab_size - 1
    groups = [Group(prompt, ([*chosen, eos], [*rejected, eos])) for prompt, chosen, rejected in training_texts(size)]
    tokens = sum(group.length for group in groups) * size.pairs // len(groups)
    rows = max(1, round(tokens / size.row_length))
    data = PackedData(groups, pad, size.row_length)
    model, dtype = random_model(size), train_dtype()
    model = compiled(model) if compile else model
    config = DPOConfig(
        matrices="adamw", lr=1e-4, adam_lr=1e-4, batch_tokens=rows * data.row_length, row_length=data.row_length,
        min_steps=ENDLESS,
    )  # fmt: skip
    trainer = Trainer(model, data, config, None, dtype, 0)
    trainer.objective = DPO(ReferenceCache(model, data, dtype, trainer.passes), config.beta)
    for _ in trainer.run():
        done(len(groups) / len(trainer.passes))  # on average


def training_texts(size: Size) -> list[tuple[list[int], list[int], list[int]]]:
    return texts(size, 4 * size.warm_up * size.pairs)


def train_dtype() -> torch.dtype:
    return torch.bfloat16 if has_fast_bf16(CPU) else torch.float32


def ours_decode(size: Size, load: Load, done: Done, compile: bool = False):
    """New tokens of every prompt's one answer."""
    prompts = [prompt for prompt, _, _ in texts(size, load.batch)]
    evaluator = Endless(random_model(size).to(size.dtype).eval(), compiled=compile)
    require(evaluator.compiled == compile, "packed bfloat16 weights leave nothing to compile, or there is no compiler")
    what = (evaluator, prompts, size.vocab_size - 2, size.new_tokens)
    while True:
        beam_search(*what, BeamConfig(load.beams)) if load.beams else decode(*what, greedy)
        done(load.batch * size.new_tokens)


def ours_mcts(size: Size, load: Load, done: Done):
    """Simulations, each of one new leaf, of a batch of trees."""
    prompts = [prompt for prompt, _, _ in texts(size, load.batch)]
    evaluator = Endless(random_model(size).to(size.dtype).eval())
    config = MCTSConfig(budget=load.simulations + 8, leaf="value")
    while True:
        mcts(evaluator, prompts, size.vocab_size - 2, 8, config)
        done(load.batch * load.simulations)


def transformers_model(size: Size):
    import transformers

    sizes = {name: getattr(size, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ids = {"bos_token_id": size.vocab_size - 2, "eos_token_id": size.vocab_size - 2}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=1024, **sizes, **none, **ids))


def transformers_decode(size: Size, load: Load, done: Done):
    """`generate` with its cache, left-padded, as its documentation says."""
    model = transformers_model(size).to(size.dtype).eval()
    prompts = [prompt for prompt, _, _ in texts(size, load.batch)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[size.vocab_size - 1] * (longest - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    kept = {"num_beams": max(load.beams, 1), "do_sample": False, "pad_token_id": size.vocab_size - 1}
    length = {"min_new_tokens": size.new_tokens, "max_new_tokens": size.new_tokens}
    while True:
        model.generate(padded, attention_mask=real, **kept, **length)
        done(load.batch * size.new_tokens)


def transformers_mcts(size: Size, load: Load, done: Done):
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

    while True:
        for prompt, _, _ in texts(size, load.batch):
            root = Node(1.0, 0.0)
            for _ in range(load.simulations):
                node, path, prefix = root, [root], list(prompt)
                while node.children:
                    token, node = choose(node)
                    path.append(node)
                    prefix.append(token)
                expand(node, prefix)
                for passed in path:
                    passed.visits += 1
                    passed.total += node.score
            done(load.simulations)


def trl_train(size: Size, load: Load, done: Done, compiled: bool = False):
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
        for prompt, chosen, rejected in training_texts(size)
    ]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            done(size.pairs)

    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=size.pairs, max_steps=ENDLESS, learning_rate=1e-4,
            bf16=train_dtype() == torch.bfloat16, use_cpu=True, precompute_ref_log_probs=True, max_length=None,
            gradient_checkpointing=False, torch_compile=compiled, save_strategy="no", logging_steps=10**9,
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model=transformers_model(size), args=config, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()


SIDES: dict[tuple[str, str], Callable[[Size, Load, Done], None]] = {
    ("train", "ours"): ours_train,
    ("train", "ours compiled"): partial(ours_train, compile=True),
    ("train", "trl"): trl_train,
    ("train", "trl compiled"): partial(trl_train, compiled=True),
    ("decode", "ours"): ours_decode,
    ("decode", "ours compiled"): partial(ours_decode, compile=True),
    ("decode", "transformers"): transformers_decode,
    ("mcts", "ours"): ours_mcts,
    ("mcts", "transformers"): transformers_mcts,
}
