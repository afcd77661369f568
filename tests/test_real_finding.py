"""The finding on real language: its pairs and measures against the oracle and closed forms, and all of it, tiny."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from test_borrowed import folders  # noqa: F401 (a fixture)

from minqstar.errors import UserError
from minqstar.lab import figures
from minqstar.lab.findings import real
from minqstar.lab.findings.intervals import again, wilson
from minqstar.lab.findings.real import Real, by_hand_rows, edited_rows, figures_of, summary
from minqstar.score import token_rewards
from minqstar.training.trainer import DPOConfig
from minqstar.world.posts import read_post

PREFS = [
    {"prompt": f"Task {i % 5}.\n\nthe fox {i}", "chosen": f"the dog {i}", "rejected": f"the brown fox {i}"}
    for i in range(15)
]  # five instructions, three prompts each


@pytest.fixture(scope="module")
def model(tmp_path_factory, folders):  # noqa: F811
    """A small Llama of random weights, with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    for file in folders["smollm2"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    config = transformers.LlamaConfig(
        vocab_size=size, **sizes, num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=[2, 0]
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return folder


@pytest.fixture
def prefs(tmp_path):
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PREFS))
    return tmp_path / "prefs.jsonl"


@pytest.fixture
def tiny(monkeypatch):
    """Few pairs, long enough texts for a tokenizer that knows few words, large steps."""
    few = {"SEEDS": 2, "EDITED": 4, "ASKED": 3, "TRAINED": 8, "HELD_OUT": 6, "WATCHED": 2, "MARKS": (0.5, 1.0)}
    for name, value in {**few, "LONGEST": 1500}.items():
        monkeypatch.setattr(real, name, value)
    steps = {"matrices": "adamw", "lr": 1e-2, "adam_lr": 1e-2, "min_steps": 6, "beta": 0.1, "row_length": 2048}
    for name in ("FACTS", "PREFERENCES"):
        monkeypatch.setattr(real, name, DPOConfig(**steps))


def test_the_worlds_pairs_differ_in_one_fact(world):
    train, test = (edited_rows(world, split, 20, 0) for split in ("train", "test"))
    for row in train + test:
        right, wrong = (world.judge(read_post(row["prompt"]), " " + row[name]) for name in ("chosen", "rejected"))
        assert not right.wrong and len(set(wrong.wrong)) == 1 and right.total > wrong.total
    assert train == edited_rows(world, "train", 20, 0) != edited_rows(world, "train", 20, 1)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


def test_posts_by_hand_state_the_right_value_and_not_the_wrong_one():
    rows = by_hand_rows()
    assert len(rows) == 16
    for row in rows:
        right, wrong = (set(row[name].split()) for name in ("chosen", "rejected"))
        (stated,), (other,) = right - wrong, wrong - right
        assert stated.lower().strip(".,") in row["prompt"].lower(), row
        assert other.lower().strip(".,") not in row["prompt"].lower(), row
        assert read_post(row["prompt"]) is None


def test_what_is_said_of_pairs():
    """Three pairs: their right tokens earn more in two, and the surprise finds the wrong token always."""
    base = {"at": 1, "ref_logps": [-1.0, -9.0, -1.0]}
    pairs = [
        {**base, "right": 1.0, "wrong": -1.0, "margin": 4.0, "rewards": [0.0, -1.0, 0.5]},
        {**base, "right": 1.0, "wrong": -1.0, "margin": 1.0, "rewards": [0.0, -1.0, -2.0]},
        {**base, "right": 0.0, "wrong": 1.0, "margin": -1.0, "rewards": [0.0, 1.0, 0.0]},
    ]
    found = summary([pairs[:2], pairs[2:]], same=False)
    assert found["above"] == [2, 0] and found["ranked"] == [2, 0] and found["pairs"] == [2, 1]
    assert found["share"]["all"] == pytest.approx(3 / 4) and found["share"]["seeds"] == pytest.approx([4 / 5, 1.0])
    assert found["difference"]["all"] == pytest.approx(1.0) and found["margin"]["all"] == pytest.approx(4 / 3)
    others, low = np.array([0.0, 0.5, 0.0, -2.0, 0.0, 0.0]), np.array([-1.0, -1.0, 1.0])
    naive = np.mean([(a < b) + 0.5 * (a == b) for a in low for b in others])
    assert found["auroc_reward"]["all"] == pytest.approx(naive) and found["auroc_surprise"]["all"] == 1
    assert found["auroc_surprise"]["interval"] == [1, 1]
    once, thrice = summary([pairs], same=True), summary([pairs] * 3, same=True)  # the same said again is no surer
    assert thrice["above"] == [2, 2, 2] and thrice["above_interval"] == pytest.approx(once["above_interval"])
    assert all(thrice[name]["interval"] == pytest.approx(once[name]["interval"]) for name in ("margin", "auroc_reward"))


@pytest.mark.parametrize("right, count", [(15, 16), (0, 7), (60, 60), (5, 9)])
def test_wilsons_interval_holds_what_a_test_would_not_reject(right, count):
    for p in wilson(right, count):
        assert (right / count - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / count, abs=1e-12)


def test_intervals_draw_whole_instructions():
    """Of two instructions one is always ranked rightly: drawn again, the share is 0, 1 or between."""
    two = [[1.0, 0.0]] * 3 + [[0.0, 1.0]]
    logp, length = [[-1.0, -1.0]] * 4, [[2, 1]] * 3 + [[1, 2]]
    found = figures_of({"task": [0, 0, 0, 1], "return": two, "eos": two, "ref_logp": logp, "length": length})
    assert found["accuracy"]["policy"] == {"all": 0.75, "interval": [0, 1]} and found["instructions"] == 2
    assert found["accuracy"]["likelihood"]["all"] == 0.5 and found["accuracy"]["longer"]["all"] == 0.75
    assert found["chosen_reward"] == 0.75 and found["rejected_eos_reward"] == 0.25
    assert again(np.mean, [3.0] * 5) == [3, 3]


def test_credit_is_that_of_the_first_token_that_differs(model, prefs, tmp_path, tiny):
    of = Real(model, [prefs], tmp_path)
    policy = replace(of.base, reference=of.base.model)
    assert all(pair["right"] == pair["margin"] == 0 for pair in real.credits(policy, of.groups(PREFS)[0]))
    torch.manual_seed(1)
    moved, _ = of.tune(PREFS[:8], real.FACTS, 0)
    groups = of.groups(PREFS)[0]
    for group, pair in zip(groups, real.credits(of.pair(moved), groups), strict=True):
        (right,), (wrong,) = (
            token_rewards(of.pair(moved), [group._replace(responses=(ids,))], [None])[0] for ids in group.responses
        )
        at = pair["at"]
        assert right.ids[:at] == wrong.ids[:at] and right.ids[at] != wrong.ids[at]
        assert pair["right"] == pytest.approx(right.rewards[at].item(), abs=1e-5)
        assert pair["wrong"] == pytest.approx(wrong.rewards[at].item(), abs=1e-5)
        assert pair["margin"] == pytest.approx(right.total - wrong.total, abs=1e-4) and pair["margin"] != 0


def test_held_out_instructions_are_in_no_pair_trained_on(model, prefs, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(real, "TRAINED", 100)
    long = {"prompt": "Task 9", "chosen": "the fox " * 900, "rejected": "a"}
    prefs.write_text(prefs.read_text() + json.dumps(long) + "\n")
    train, held_out, left_out = Real(model, [prefs], tmp_path).split
    tasks = [{row["prompt"].split("\n\n")[0] for row in rows} for rows in (train, held_out)]
    assert not tasks[0] & tasks[1] and len(train) == 9 and len(held_out) == 6 and left_out.total() == 1


def test_all_of_it_and_again_without_training(model, prefs, tmp_path, tiny, monkeypatch):
    options = figures.Options(only="real", model=model, data=(prefs,), runs=tmp_path / "runs", out=tmp_path / "out")
    options.out.mkdir()
    (options.out / "results.json").write_text('{"of": "x", "leak": {"kept": 1}}')
    figures.main(options)
    text = (options.out / "results.json").read_bytes()
    found = json.loads(text)
    assert found["of"] == "x" and found["leak"] == {"kept": 1} and (options.out / "real.png").stat().st_size > 10_000
    of = found["real"]
    assert of["world"]["pairs"] == [3, 3] and of["by_hand"]["pairs"] == [16, 16]
    assert [m["step"] for m in of["preferences"]["measured"]] == [3, 6]
    assert all(m["chosen_expected_reward"] < 0 for m in of["preferences"]["measured"])
    assert of["preferences"]["trained"] == 8 and of["preferences"]["held_out"] == 6
    monkeypatch.setattr(real, "Trainer", None)  # whatever trains would fail
    figures.main(options)
    assert (options.out / "results.json").read_bytes() == text


def test_what_is_missing_is_one_line(model, tmp_path):
    with pytest.raises(UserError, match="give --model FOLDER and --data FILE"):
        figures.Options(only="real")
    (tmp_path / "texts.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="rows with chosen and rejected"):
        Real(model, [tmp_path / "texts.jsonl"], tmp_path)
