"""A real pretrained chat model, SmolLM2-135M-Instruct, against transformers and tokenizers.

    MINQSTAR_SMOLLM2=FOLDER python -m pytest tests/test_real.py tests/test_borrowed.py

The folder is no part of the project: these tests are skipped where the variable names none.
"""

import os
from pathlib import Path

import pytest
import torch

from minqstar.pair import load_pair
from minqstar.search.decode import decode, greedy
from minqstar.search.evaluator import Network
from minqstar.training.groups import Group
from minqstar.training.scoring import score_groups

FOLDER = os.environ.get("MINQSTAR_SMOLLM2", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="MINQSTAR_SMOLLM2 names no folder of SmolLM2-135M-Instruct")
QUESTIONS = [
    "Explain how a refrigerator works, step by step, in detail.",
    "What is the capital of France?",
    "Count to 9.",
]


@pytest.fixture(scope="module")
def both():
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return theirs, load_pair(Path(FOLDER), FOLDER, chat=True)


@torch.no_grad()
def test_logits_and_packed_log_probs(both):
    theirs, pair = both
    answers = [
        [" It cools.", " It is a box in which a gas boils and is pressed again 🧊."],
        [" Paris.", " 2,161,000"],
        [" 1"],
    ]
    groups = [
        Group(pair.tokenizer.encode_prompt(prompt), tuple(map(pair.tokenizer.encode_response, texts)))
        for prompt, texts in zip(QUESTIONS, answers, strict=True)
    ]
    worst = {"logits": 0.0, "log-probs": 0.0}
    for group, found in zip(groups, score_groups(pair.model, groups, pair.tokenizer.pad), strict=True):
        for response, logps in zip(group.responses, found, strict=True):
            tokens = torch.tensor([group.prompt + response])
            expected, ours = theirs(tokens).logits, pair.model.logits(pair.model(tokens))
            alone = expected[0, len(group.prompt) - 1 : -1].log_softmax(-1)
            alone = alone.gather(-1, torch.tensor(response)[:, None])[:, 0]
            worst["logits"] = max(worst["logits"], (expected - ours).abs().max().item())
            worst["log-probs"] = max(worst["log-probs"], (alone - logps).abs().max().item())
    print(worst)
    assert worst["logits"] < 5e-4 and worst["log-probs"] < 1e-4


@torch.no_grad()
def test_128_greedy_tokens(both):
    theirs, pair = both
    prompt = pair.tokenizer.encode_prompt(QUESTIONS[0])
    ((found,),) = decode(Network(pair.model), [prompt], pair.tokenizer.ends, 128, greedy)
    tokens = torch.tensor([prompt])
    expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=128, do_sample=False)
    assert found.tokens == expected[0, len(prompt) :].tolist() and len(found.tokens) == 128
