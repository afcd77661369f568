"""Who does the work: we, transformers and TRL. A side works piece after piece, without end."""

import gc
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from minqstar.errors import UserError, require
from minqstar.lab.bench.turns import Turns
from minqstar.lab.bench.work import CONTEXT, DEPTH, Size, Work, decoder, prompts, random_model, texts, train_dtype
from minqstar.lm.borrowed import load_borrowed
from minqstar.lm.fast import compiled
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import decode, greedy
from minqstar.search.evaluator import Network
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.training.checkpoint import load_run
from minqstar.training.data import Group, PackedData
from minqstar.training.groups import fit
from minqstar.training.scoring import ReferenceCache
from minqstar.training.trainer import DPO, DPOConfig, Trainer

ENDLESS = 10**6  # steps
Pieces = Iterator[float]  # does a piece of work at each step, and says how many units it was
Done = Callable[[float | None], None]  # to be called with the units of each piece: see `Turns`


class Endless(Network):
    """A network that never says EOS, so that every response has full length, as with transformers' min_new_tokens."""

    def _evaluation(self, logps):
        evaluation = super()._evaluation(logps)
        evaluation.logps[..., -2] = -torch.inf
        return evaluation


def train(size: Size, work: Work, compile: bool = False) -> Pieces:
    """Pairs, through the one training loop. The reference's log-probs are cached before."""
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
        yield len(groups) / len(trainer.passes)  # the mean: passes differ a little


def train_on_pairs(size: Size, work: Work, done: Done):
    """DPO of a checkpoint: a piece is the reference's pass over all pairs and one epoch, from the first weights."""
    while True:
        gc.collect()  # what the last piece held does not count as memory of this one
        run = load_run(work.model, torch.device("cpu"))
        groups = work.pairs(run.tokenizer)[1]
        done(None)
        row_length, rows = packing([group.length for group in groups], len(groups) // size.pairs)
        data, dtype = PackedData(groups, run.tokenizer.pad, row_length), train_dtype()
        config = DPOConfig(
            matrices="adamw", lr=1e-6, adam_lr=1e-6, beta=0.1, row_length=row_length, batch_tokens=rows * row_length,
            micro_tokens=row_length, min_steps=1,
        )  # fmt: skip
        trainer = Trainer(run.model, data, config, None, dtype, 0)
        trainer.objective = DPO(ReferenceCache(run.model, data, dtype, trainer.passes), config.beta)
        for _ in trainer.run():
            done(0)
        done(len(groups))
        del run, trainer


def packing(lengths: list[int], steps: int) -> tuple[int, int]:
    """Tokens of a row, and rows of a step: the shortest rows that share out evenly to the steps, if any do."""
    longest, most = max(lengths), sum(lengths) // steps + 64
    for row_length in range(longest, most, 16):
        rows = len(fit(np.array(lengths), row_length)[1]) - 1
        if rows % steps == 0:
            return row_length, rows // steps
    return longest, max(1, sum(lengths) // (steps * longest))


def training_texts(size: Size) -> list[tuple[list[int], list[int], list[int]]]:
    return texts(size, 4 * size.warm_up * size.pairs)


def decoding(size: Size, work: Work, compile: bool = False) -> Pieces:
    """New tokens of one response to each prompt, greedy or by beams."""
    evaluator = Endless(decoder(work), compiled=compile)
    require(evaluator.compiled == compile, "nothing to compile: the weights are packed, or there is no compiler")
    what = (evaluator, prompts(size, work.batch), (size.vocab_size - 2,), size.new_tokens)
    while True:
        beam_search(*what, BeamConfig(work.beams)) if work.beams else decode(*what, greedy)
        yield work.batch * size.new_tokens


def searching(size: Size, work: Work) -> Pieces:
    """Simulations of a batch of trees. Each makes one leaf."""
    evaluator = Endless(random_model(size).to(size.dtype).eval())
    config = MCTSConfig(budget=work.simulations + DEPTH, leaf="value")
    what = (evaluator, prompts(size, work.batch), (size.vocab_size - 2,), DEPTH, config)
    while True:
        mcts(*what)
        yield work.batch * work.simulations


# ---- the same with the big frameworks


def transformers_model(size: Size):
    import transformers

    sizes = {name: getattr(size, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ids = {"bos_token_id": size.vocab_size - 2, "eos_token_id": size.vocab_size - 2}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=CONTEXT, **sizes, **none, **ids))


def transformers_decoding(size: Size, work: Work) -> Pieces:
    """`generate` with its cache, and prompts padded on the left, as its documentation advises."""
    import transformers

    if work.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=size.dtype).eval()
    else:
        model = transformers_model(size).to(size.dtype).eval()
    given = prompts(size, work.batch)
    longest = max(map(len, given))
    padded = torch.tensor([[size.vocab_size - 1] * (longest - len(p)) + p for p in given])
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in given])
    kept = {"num_beams": max(work.beams, 1), "do_sample": False, "pad_token_id": size.vocab_size - 1}
    length = {"min_new_tokens": size.new_tokens, "max_new_tokens": size.new_tokens}
    while True:
        model.generate(padded, attention_mask=real, **kept, **length)
        yield work.batch * size.new_tokens


def transformers_searching(size: Size, work: Work) -> Pieces:
    """The plain way to write it: each node is an object, and each expansion reads its whole prefix again."""
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
        for prompt in prompts(size, work.batch):
            root = Node(1.0, 0.0)
            for _ in range(work.simulations):
                node, path, prefix = root, [root], list(prompt)
                while node.children:
                    token, node = choose(node)
                    path.append(node)
                    prefix.append(token)
                expand(node, prefix)
                for passed in path:
                    passed.visits += 1
                    passed.total += node.score
            yield work.simulations


def trl_train(size: Size, work: Work, done: Done, compiled: bool = False):
    """DPOTrainer. Its reference's log-probs are computed before. Dtype and texts are the same; a token is a word."""
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

    options = {"max_steps": ENDLESS, "learning_rate": 1e-4, "torch_compile": compiled}
    of_trl(trl.DPOTrainer, transformers_model(size), tokenizer, rows, size.pairs, Clock(), **options).train()


def of_trl(kind: type, model, tokenizer, rows: list[dict], pairs: int, callback, **options):
    """A DPOTrainer that holds the reference's log-probs already. It saves nothing: `output_dir` stays as it is."""
    import datasets
    import trl

    config = trl.DPOConfig(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=pairs, bf16=train_dtype() == torch.bfloat16,
        use_cpu=True, precompute_ref_log_probs=True, max_length=None, gradient_checkpointing=False,
        save_strategy="no", logging_steps=10**9, report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    return kind(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[callback])


def trl_train_on_pairs(size: Size, work: Work, done: Done):
    """The same pieces as `train_on_pairs`. The pass of the reference is measured, and then the steps: from
    `on_train_begin`, where model and optimizer stand ready, to the end of the last."""
    import transformers
    import trl

    class Clocked(trl.DPOTrainer):
        def _precompute_ref_logps(self, *args):
            done(None)
            data = super()._precompute_ref_logps(*args)
            done(0)
            return data

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            done(None)

        def on_step_end(self, _, state, *__, **___):
            done(len(rows) if state.global_step == state.max_steps else 0)

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(work.model)
    pairs = work.pairs(load_borrowed(work.model))[0]  # by our own count of tokens
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs]
    options = {"max_steps": len(rows) // size.pairs, "learning_rate": 1e-6, "beta": 0.1}
    while True:
        gc.collect()
        model = transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
        of_trl(Clocked, model, tokenizer, rows, size.pairs, Clock(), **options).train()
        del model


# ---- sides, by what they do and by name


def each(pieces: Callable[[Size, Work], Pieces]) -> Callable[[Size, Work, Done], None]:
    def side(size: Size, work: Work, done: Done):
        for units in pieces(size, work):
            done(units)

    return side


SIDES = {
    ("train", "ours"): each(train),
    ("train", "ours compiled"): each(partial(train, compile=True)),
    ("train", "trl"): trl_train,
    ("train", "trl compiled"): partial(trl_train, compiled=True),
    ("train on pairs", "ours"): train_on_pairs,
    ("train on pairs", "trl"): trl_train_on_pairs,
    ("decode", "ours"): each(decoding),
    ("decode", "ours compiled"): each(partial(decoding, compile=True)),
    ("decode", "transformers"): each(transformers_decoding),
    ("mcts", "ours"): each(searching),
    ("mcts", "transformers"): each(transformers_searching),
}


if __name__ == "__main__":  # one side, as a process of its own: its name, and the work as JSON
    name, work = sys.argv[1], Work.of(json.loads(sys.argv[2]))
    size = work.scaled()
    try:
        SIDES[work.job, name](size, work, Turns(size.warm_up if work.job == "train" else 1))
    except UserError as e:
        sys.exit(str(e))
