"""From data to a finished run, the story of the paper in its order; `train.py` is this file's command.

1. Read data: the TL;DR world, whose Q* is known, or anyone's preference pairs.
2. SFT: imitate responses. The result is the reference policy pi_ref.
3. Score the pairs under pi_ref once: DPO needs its log-probs at every step.
4. DPO: move the policy until beta log(pi/pi_ref), summed over a response, explains the preferences (Eq. 8, 9).
5. Evaluate: are beta log(pi/pi_ref), token by token, the exact advantages A* (Eq. 10, 11)?
"""

from dataclasses import replace
from pathlib import Path

import torch

from minqstar.datasets import Data, read_data
from minqstar.errors import require
from minqstar.evaluate import evaluate, mean_nll
from minqstar.files import owner
from minqstar.lm.lora import LoRAConfig, adapter_tensors, add_lora, merged
from minqstar.lm.memory import held
from minqstar.lm.model import GPT
from minqstar.lm.tokenizer import load_tokenizer
from minqstar.options import NEEDS, Options, defaults, fingerprint  # noqa: F401 (the rules of the command)
from minqstar.show import figures_in_words, figures_table, next_commands
from minqstar.training.checkpoint import Run, described, load_run, load_weights, read_config, save_tensors
from minqstar.training.data import PackedData, tokenize
from minqstar.training.estimate import REACHED, estimate, rate
from minqstar.training.groups import Group, Groups
from minqstar.training.scoring import ReferenceCache, weights_hash
from minqstar.training.session import Session, check_memory, finish, train_stage
from minqstar.training.trainer import DPO, SFT, Trainer, plan
from minqstar.training.writer import RunWriter, abandon, claim, otherwise, unfinished


def main(options: Options):
    """All of it: data, SFT, reference, DPO, evaluation."""
    options, session = begin(options)
    out = options.folder / options.stage
    if options.plan:
        show_plan(options, session, read_data(options, session))
        return
    with owner(options.folder):
        claim(out, options.overwrite, options.resume, options.folder / "sft", options.extend)
        with session.phase("data"):
            data = read_data(options, session)
        if options.overwrite and not options.resume:
            abandon(out)  # now, lest it meet another reference after a stop in SFT
        if options.has_sft:
            sft(options, session, data, options.folder / "sft")
        if options.stage == "dpo":
            figures = dpo(options, session, data, options.reference or options.folder / "sft", out)
            if figures:
                session.console.print(figures_table(figures))
                session.console.print(figures_in_words(figures))
    total = session.seconds
    phases = ", ".join(f"{name} {seconds:.0f} ({seconds / total:.0%})" for name, seconds in session.phases.items())
    session.console.print(f"the run is in {out}: {total:.0f} s\n{phases}")
    session.console.say(f"next: {next_commands(options.stage, out)}")


def show_plan(options: Options, session: Session, data: Data):
    """What each stage takes: memory, tokens, minutes."""
    here = held()
    for stage, of in (("sft", data.sft if options.has_sft else None), ("dpo", data.pairs)):
        if of and (stage == "sft" or options.stage == "dpo"):
            config = getattr(options, stage)
            packed = PackedData(of[0], session.tokenizer.pad, config.row_length)
            lora = options.lora if stage == options.stage else LoRAConfig()
            what = (options.seed, session.dtype, lora, options.recompute, stage == "dpo")
            found = estimate(options.model, packed, config, *what)
            seconds = found.flops / (REACHED * rate(session.dtype, session.device))
            session.console.print(found.table(stage.upper(), seconds, here))


def begin(options: Options) -> tuple[Options, Session]:
    """The options with the architecture that holds, and what all stages share."""
    given = [described(path) for path in (options.reference, options.init) if path]
    alike = len({(tokenizer.fingerprint, config) for tokenizer, config in given}) <= 1
    require(alike, f"{options.init} and {options.reference} differ in their vocabulary or architecture")
    tokenizer = given[0][0] if given else load_tokenizer(options.vocabulary)
    if options.chat:
        tokenizer.start_chat()
    model = given[0][1] if given else replace(options.model, vocab_size=tokenizer.n_vocab)
    options = replace(options, model=model, max_length=min(model.block_size, options.max_length or model.block_size))
    session = Session(tokenizer, options.device, options.dtype, options.compile, options.save_every)
    longest = max(options.sft.row_length, options.dpo.row_length)
    check_memory(options.model, longest, session.device, adapted=options.lora.rank > 0)
    return options, session


def sft(options: Options, session: Session, data: Data, out: Path):
    """Train the reference pi_ref by imitation, or leave the run that is there if it is the same one."""
    with session.phase("data"):
        groups, skipped = data.sft
        used = groups.used
        if options.sft.on == "chosen":
            require(groups.compared, "--sft.on chosen needs rows with chosen and rejected")
            groups = Groups(map(Group.best, groups))
        packed = PackedData(groups, session.tokenizer.pad, options.sft.row_length)
        held_out, _ = tokenize(data.held_out, session.tokenizer, options.max_length)
    init = load_run(options.init, session.device) if options.init else None
    config = {**fingerprint(options, session, "sft", packed), "init": init and origin(init)}
    if out.exists() and options.stage == "dpo":
        before = read_config(out)
        odd = otherwise(before, config, options.source("sft"))
        if not odd:
            unknown = "; it does not say on which world" if "world" in config.keys() - before.keys() else ""
            session.console.print(f"SFT: {out} was trained before with these very options{unknown}")
            return
        message = f"{out} was trained {odd}; use --overwrite, or another --runs"
        require(options.overwrite or (options.resume and unfinished(out)), message)
    torch.manual_seed(options.seed)
    model = init.model if init else GPT(options.model).to(session.device)
    prepare(options, model, adapted=options.stage == "sft")
    session.console.print(f"SFT: {packed.num_scored:,} tokens to imitate, {model.num_parameters():,} parameters")
    with RunWriter(out, config, options.overwrite, options.resume, options.source("sft"), options.extend) as writer:
        trainer = Trainer(session.fast(model), packed, options.sft, SFT(), session.dtype, options.seed)
        history = train_stage(session, "SFT", trainer, writer)
        finished = finish_model(writer, model)
        with session.phase("evaluation"):
            figures = {"loss": mean_nll(finished, held_out, session.tokenizer.pad)} if held_out else {}
        finish(session, writer, finished, history, used, skipped, data.held_out, figures)


def dpo(options: Options, session: Session, data: Data, reference_path: Path, out: Path) -> dict:
    """Train the policy against its reference and evaluate the two; the closing figures.

    The policy starts as the reference, so the reference's log-probs are computed with it before the first step: there
    is one model in memory, not two.
    """
    own = options.extend and options.reference is None  # the one it keeps, whatever has become of that run
    run = load_run(out if own else reference_path, session.device)
    apart = options.init and options.reference and options.init.resolve() != options.reference.resolve()
    init = load_run(options.init, torch.device("cpu")) if apart else None
    groups, skipped = data.pairs
    with session.phase("data"):
        packed = PackedData(groups, session.tokenizer.pad, options.dpo.row_length)
    model, of = (run.reference, run.config["reference"]) if own else (run.model, origin(run))
    config = {**fingerprint(options, session, "dpo", packed), "reference": of, "init": init and origin(init)}
    torch.manual_seed(options.seed)
    session.console.print(f"DPO: {groups.used:,} preferences, beta {options.dpo.beta} against {of['path']}")
    with RunWriter(out, config, options.overwrite, options.resume, options.source("dpo"), options.extend) as writer:
        if not options.extend:
            writer.keep_reference(run)
        prepare(options, model, adapted=True)
        fast, passes = session.fast(model), plan(packed, options.dpo, options.seed).visited(writer.more)
        with session.phase("reference"), session.progress("reference", sum(map(len, passes))) as advance:
            cache = ReferenceCache(fast, packed, session.dtype, passes, advance)
        cache.check(of["hash"], packed)
        if init:
            model.load_state_dict(init.model.state_dict())
        objective = DPO(cache, options.dpo.beta, options.dpo.sft_weight)
        trainer = Trainer(fast, packed, options.dpo, objective, session.dtype, options.seed)
        history = train_stage(session, "DPO", trainer, writer)
        policy = finish_model(writer, model)
        with session.phase("evaluation"):
            reference = load_weights(options.model, writer.folder / "reference.safetensors", session.device)
            finished = Run(out, config, session.tokenizer, policy, reference, options.dpo.beta)
            figures = evaluate(finished, data.held_out, options.seed)
        finish(session, writer, policy, history, groups.used, skipped, data.held_out, figures)
    return figures


def prepare(options: Options, model: GPT, adapted: bool):
    """Make a model ready to be trained: with an adapter, if that is asked for of this stage."""
    model.recompute = options.recompute
    if adapted and options.lora.rank:
        add_lora(model, options.lora, options.seed)


def finish_model(writer: RunWriter, model: GPT) -> GPT:
    """The trained model, an adapter merged; the adapter alone is written too."""
    adapter = adapter_tensors(model)
    if not adapter:
        return model
    save_tensors(adapter, writer.folder / "adapter.safetensors")
    return merged(model).eval()


def origin(run: Run) -> dict:
    """Where a model came from: what tells it apart is its hash."""
    return {"path": str(run.path), "hash": weights_hash(run.model)}
