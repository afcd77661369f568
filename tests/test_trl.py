"""Our DPO and TRL's, on one pair of models and the same preferences: the same numbers, token by token."""

import pytest
import torch
import transformers
from test_borrowed import folders  # noqa: F401 (a fixture)
from test_pair import pair  # noqa: F401 (a fixture)

from minqstar.pair import load_pair
from minqstar.training.data import PackedData, tokenize
from minqstar.training.scoring import ReferenceCache, by_group, token_logps
from minqstar.training.trainer import DPO, DPOConfig, Trainer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

BETA = 0.3
ROWS = [  # an answer begins where a word does, so that no token reaches across the border
    {"prompt": "The cat sat on", "chosen": " the mat, and it's 1234 o'clock", "rejected": " the mat"},
    {"prompt": "def f(x):", "chosen": " return x + 2024", "rejected": " done"},
    {"prompt": "The cat sat on", "chosen": " café!", "rejected": " the cat sat on the cat sat on the cat"},
    {"prompt": "quoted", "chosen": "\n\n# done", "rejected": " 🙂"},
]
ACROSS = {"prompt": "The ca", "chosen": "t sat", "rejected": "fé"}


def trainer_of_trl(policy, reference, rows: list[dict], out) -> "trl.DPOTrainer":
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (policy, reference)
    )
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(policy.name_or_path)
    config = trl.DPOConfig(
        output_dir=str(out), beta=BETA, bf16=False, use_cpu=True, max_length=None, gradient_checkpointing=False,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    return trl.DPOTrainer(policy, reference, config, train_dataset=data, processing_class=tokenizer)


def test_log_ratios_and_loss_are_those_of_trl(pair, tmp_path):  # noqa: F811
    """TRL's own tokens, batch, forward and loss, in float32; and the norm of the gradient that follows from them."""
    theirs = trainer_of_trl(*pair[:2], ROWS, tmp_path)
    batch = theirs.data_collator(list(theirs.train_dataset))  # all chosen, then all rejected
    loss = theirs.compute_loss(theirs.model, batch)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in theirs.model.parameters()]).norm()
    ids, scored = batch["input_ids"], batch["completion_mask"].bool()
    inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": ids.where(scored, -100)}
    with torch.no_grad():
        logps, ref_logps = (m(**inputs, fused_lm_head=True).log_probs for m in (theirs.model, theirs.ref_model))

    ours = load_pair(*pair[:2], BETA)
    groups, skipped = tokenize(ROWS, ours.tokenizer, 96, share=False)
    assert not skipped
    data = PackedData(groups, ours.tokenizer.pad, 64)
    config = DPOConfig(batch_tokens=len(data) * data.row_length, beta=BETA, min_steps=1)
    trainer = Trainer(ours.model, data, config, None, torch.float32, 0)
    cache = ReferenceCache(ours.reference, data, torch.float32, trainer.passes)
    trainer.objective = DPO(cache, BETA)
    (rows,) = trainer.passes
    order = cache.data.scored(rows).argsort()
    with torch.no_grad():
        ratios = (token_logps(ours.model, data.batch(rows)) - cache[rows])[order]
    for i, (group, found) in enumerate(zip(groups, by_group(ratios, data, groups), strict=True)):
        for response, ratio, at in zip(group.responses, found, (i, i + len(ROWS)), strict=True):
            assert ids[at, scored[at]].tolist() == response  # its tokenisation agrees: then so must all else
            assert torch.allclose(ratio, (logps - ref_logps)[at, scored[at, 1:]], atol=1e-4)
            assert ratio.abs().max() > 0.1
    metrics = next(trainer.run())
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_where_trl_scores_other_tokens(pair, tmp_path):  # noqa: F811
    """TRL tokenises prompt and answer together. Where a token reaches across the border, the prompt loses its end, and
    tokens that the policy never has to say are scored: those of an answer that is sampled follow the whole prompt."""
    (theirs,) = trainer_of_trl(*pair[:2], [ACROSS], tmp_path).train_dataset
    ours = load_pair(*pair[:2], BETA).tokenizer
    whole = theirs["prompt_ids"] + theirs["chosen_ids"]
    assert whole == [*ours.encode("The cat sat"), ours.eos]
    prompt = ours.encode_prompt(ACROSS["prompt"])
    assert ours.decode(prompt) == "The ca" and whole[: len(prompt)] != prompt
    assert len(theirs["prompt_ids"]) < len(prompt) and theirs["chosen_ids"] != ours.encode_response(ACROSS["chosen"])
