"""Any pair of models: opened, scored, searched and checked, from Python and at the command line."""

import itertools
import json
import math
import shutil
from collections import Counter

import pytest
import tokenizers
import torch
import transformers
from conftest import command
from test_borrowed import folders  # noqa: F401 (a fixture)

import minqstar
from minqstar import score
from minqstar.errors import UserError
from minqstar.lm.pretrained import export
from minqstar.pair import load_pair
from minqstar.training.data import PackedData, tokenize
from minqstar.training.scoring import ReferenceCache, score_groups
from minqstar.training.trainer import DPO, DPOConfig, Trainer

PADDED = 9  # ids of the models that no token has
ROWS = [
    {"prompt": "the lazy dog", "chosen": " is quick", "rejected": " is brown 2024"},
    {"prompt": "the lazy dog", "chosen": " jumps", "rejected": " jumps over", "note": "kept"},
    {"prompt": "", "chosen": " a", "rejected": " b"},
    {"prompt": "print", "chosen": "ing", "rejected": " the quick"},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, folders):  # noqa: F811
    """A policy, its reference, and a model with another tokenizer: small Llamas whose vocabularies are padded."""
    made = []
    for seed, tokenizer in enumerate(("smollm2", "smollm2", "qwen")):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        for file in folders[tokenizer].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 96}
        config = transformers.LlamaConfig(
            vocab_size=size + PADDED, **sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
            bos_token_id=1, eos_token_id=[2, 0],
        )  # fmt: skip
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
        made.append(folder)
    return made


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "rows.jsonl"


@torch.no_grad()
def test_rewards_are_beta_log_ratios_of_transformers_models(pair):
    """Five lines of Python; the other side is transformers on the whole text."""
    q = minqstar.load(pair[0], reference=pair[1], beta=0.3)
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in pair[:2]]
    prompt = q.tokenizer.encode_prompt("the lazy dog")
    for one in q.score("the lazy dog", [" is quick", "", " 2024 dogs"]):
        assert one.ids[-1] == q.tokenizer.eos == 2 and one.tokens[-1] == "<|im_end|>"
        logps = []
        for model in models:
            logits = model(torch.tensor([prompt + one.ids])).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(-1, torch.tensor(one.ids)[:, None])[:, 0])
        assert torch.allclose(one.logps, logps[0], atol=1e-4) and torch.allclose(one.ref_logps, logps[1], atol=1e-4)
        assert torch.allclose(one.rewards, 0.3 * (logps[0] - logps[1]), atol=1e-4)
        assert math.isclose(one.total, one.rewards.sum().item(), abs_tol=1e-5)
    assert minqstar.load(pair[0], reference=pair[1]).beta == 0.1
    assert "the lazy dog" not in str(one) and "sum" in str(one)


def test_equal_models_pay_exactly_nothing(pair):
    q = minqstar.load(pair[0], reference=pair[0])
    assert all((one.rewards == 0).all() for one in q.score("the lazy dog", [" is quick", " is", ""]))


@pytest.mark.parametrize("how", ["greedy", "sample", "best-of-n", "beam", "mcts"])
def test_every_search_answers(pair, how):
    q = minqstar.load(pair[0], reference=pair[1])
    answer = q.search("the lazy dog", how, max_new_tokens=5)
    assert answer.text == q.tokenizer.decode(answer.best.tokens) and answer.scored.ids == answer.best.tokens
    ((alone,),) = score_groups(q.run.model, [score.Group(q.tokenizer.encode("the lazy dog"), (answer.best.tokens,))], 2)
    assert torch.allclose(alone.double(), torch.tensor(answer.best.logps).double(), atol=1e-4)


def test_any_end_token_ends_a_response(pair):
    q = minqstar.load(pair[0], reference=pair[1])
    assert q.tokenizer.ends == (2, 0)
    draws = [q.search("the lazy dog", "sample", seed=seed, max_new_tokens=60).best for seed in range(40)]
    last = {draw.tokens[-1] for draw in draws if not draw.truncated}
    assert last == {0, 2} and all(not {0, 2} & set(draw.tokens[:-1]) for draw in draws)


def test_a_run_of_ours_takes_another_reference_and_beta(run_folder):
    own, pair = load_pair(run_folder), load_pair(run_folder, run_folder.parent / "sft", beta=2.0)
    for a, b in zip(own.reference.parameters(), pair.reference.parameters(), strict=True):
        assert torch.equal(a, b)
    assert pair.beta == 2.0 and load_pair(run_folder, run_folder.parent / "sft").beta == own.beta
    assert pair.config["reference"]["hash"] == score.weights_hash(own.reference)


def test_the_command_scores_every_row_and_uses_what_it_kept(tmp_path, pair, rows, monkeypatch):
    line = ("-m", "minqstar.score", "--policy", str(pair[0]), "--ref", str(pair[1]), "--beta", "0.3", str(rows))
    first = command(tmp_path, *line, "--out", "scored.jsonl", "--html", "page.html")
    assert first.returncode == 0, first.stderr
    assert "±" in first.stdout and "_se" not in first.stdout
    assert first.stdout.count("the lazy dog") == 1 and first.stdout.count("<|im_end|>") == 2  # the first row is shown
    assert "skipped 1 of 4 rows: 1 empty prompt" in first.stdout
    q = minqstar.load(pair[0], reference=pair[1], beta=0.3)
    written = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    margins = []
    for row, found in zip(ROWS, written, strict=True):
        scored = found.pop("scored")
        assert found == row
        if not row["prompt"]:
            assert scored is None
            continue
        sides = q.score(row["prompt"], [row["chosen"], row["rejected"]])
        for one, name in zip(sides, ("chosen", "rejected"), strict=True):
            of = scored[name]
            assert of["tokens"] == one.tokens and of["ids"] == one.ids
            assert torch.allclose(torch.tensor(of["rewards"]), one.rewards, atol=1e-5)
            assert math.isclose(of["reward"], sum(of["rewards"]), abs_tol=1e-5)
            assert of["eos_reward"] == of["rewards"][-1] and math.isclose(of["logp"], sum(of["logps"]), abs_tol=1e-4)
        assert math.isclose(scored["margin"], scored["chosen"]["reward"] - scored["rejected"]["reward"])
        margins.append(scored["margin"])
    again = command(tmp_path, *line, "--json")
    figures = json.loads(again.stdout)
    assert figures["rows"] == 4 and figures["skipped"] == 1 and figures["beta"] == 0.3
    mean = torch.tensor(margins, dtype=torch.float64)
    assert math.isclose(figures["reward_margin"], mean.mean().item(), abs_tol=1e-6)
    assert math.isclose(figures["reward_margin_se"], mean.std(correction=0).item() / 3**0.5, abs_tol=1e-6)
    assert figures["pair_accuracy"] == (mean > 0).double().mean().item()
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h2>") == 3 and "<script" not in page

    (kept,) = (tmp_path / "data/ref_logps").iterdir()
    run_, groups = q.run, tokenize(ROWS, q.tokenizer, 96)[0]
    expected = q.score("the lazy dog", [ROWS[0]["chosen"]])[0].ref_logps
    monkeypatch.setattr(score, "score_groups", None)  # the reference is not asked again
    logps = score.kept_logps(kept.parent, score.weights_hash(run_.reference), run_, groups)
    assert torch.allclose(logps[0][0], expected, atol=1e-5)
    with pytest.raises(TypeError):  # other weights are another file
        score.kept_logps(kept.parent, score.weights_hash(run_.model), run_, groups)
    monkeypatch.undo()
    kept.write_bytes(kept.read_bytes()[:-4] + b"abcd")
    damaged = command(tmp_path, *line)
    assert damaged.returncode == 1 and damaged.stderr.count("\n") == 1 and "is damaged; remove it" in damaged.stderr


def edited(folder, new, **config):
    """A copy of a folder with another config.json."""
    shutil.copytree(folder, new)
    (new / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return new


def test_what_is_kept_of_a_reference_is_not_taken_for_the_same_weights_in_another_shape(tmp_path, pair):
    pairs = [load_pair(pair[0], of) for of in (pair[1], edited(pair[1], tmp_path / "eps", rms_norm_eps=0.5))]
    for of in pairs:
        ((_, (one, _)),) = list(score.scored_rows(of, ROWS[:1], tmp_path / "kept", Counter()))
        alone = minqstar.QFunction(of).score(ROWS[0]["prompt"], ROWS[0]["chosen"])[0]
        assert torch.allclose(one.ref_logps, alone.ref_logps, atol=1e-5)


def test_an_id_that_the_reference_lacks_is_said(pair):
    q = minqstar.load(pair[0], reference=pair[1])
    with pytest.raises(UserError, match="the reference has no token 5000"):
        score.token_rewards(q.run, [score.Group([1], ([5000],))], [None])


@pytest.mark.parametrize("short", [0, 1])
def test_a_text_fits_the_context_of_both_models(tmp_path, pair, short):
    both = list(pair[:2])
    both[short] = edited(both[short], tmp_path / "short", max_position_embeddings=16)
    q = minqstar.load(both[0], reference=both[1])
    with pytest.raises(UserError, match="the run's context 16"):
        q.score("the lazy dog", ["the lazy dog" * 3])
    assert len(q.search("the", max_new_tokens=10).scored.ids) <= 10
    with pytest.raises(UserError, match="leaves no room"):
        q.search("the lazy dog", max_new_tokens=64)


def test_a_row_with_a_character_that_has_no_token_is_skipped_and_counted(tmp_path, pair):
    rows = [{"prompt": "odd \x04", "completion": "a"}, {"prompt": "the dog", "completion": "\x04"}]
    rows.append({"prompt": "the dog", "completion": " is"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ("-m", "minqstar.score", "--policy", str(pair[0]), "--ref", str(pair[1]), "rows.jsonl")
    done = command(tmp_path, *line)
    assert "skipped 2 of 3 rows: 2 with a character that has no token" in done.stdout, done.stderr
    (one,) = minqstar.load(pair[0], reference=pair[1]).score("the dog", [" is"])
    assert math.isclose(json.loads(command(tmp_path, *line, "--json").stdout)["reward"], one.total, abs_tol=1e-6)


def test_responses_alone_are_scored_too(tmp_path, pair):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the lazy dog", "completion": " is quick"}) + "\n")
    done = command(
        tmp_path, "-m", "minqstar.score", "--policy", str(pair[0]), "--ref", str(pair[1]), "rows.jsonl", "--json"
    )
    figures = json.loads(done.stdout)
    (one,) = minqstar.load(pair[0], reference=pair[1]).score("the lazy dog", [" is quick"])
    assert math.isclose(figures["reward"], one.total, abs_tol=1e-6) and "pair_accuracy" not in figures


def test_a_ranking_is_scored_and_counts_as_its_pairs(tmp_path, pair):
    ranked = [" is quick", " is slow", " jumps"]
    row = json.dumps({"prompt": "the lazy dog", "ranked": ranked}) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 4)
    line = ("-m", "minqstar.score", "--policy", str(pair[0]), "--ref", str(pair[1]), "rows.jsonl", "--json")
    figures = json.loads(command(tmp_path, *line, "--out", "out.jsonl").stdout)
    scored = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["scored"]["ranked"]
    S = [one.total for one in minqstar.load(pair[0], reference=pair[1]).score("the lazy dog", ranked)]
    assert [one["reward"] for one in scored] == pytest.approx(S, abs=1e-6)
    pairs = list(itertools.combinations(S, 2))
    assert figures["pair_accuracy"] == sum(a > b for a, b in pairs) / 3
    assert figures["reward_margin"] == pytest.approx(sum(a - b for a, b in pairs) / 3, abs=1e-6)
    assert figures["reward_margin_se"] < 1e-6, "rows that are alike: the pairs of a ranking are not independent"


def test_a_few_steps_of_dpo_on_somebodys_model_and_its_credit_page(tmp_path, pair, rows):
    """The pair that training makes of one checkpoint: its log-probs begin equal, then the preferred texts are paid."""
    base = load_pair(pair[1])
    model = load_pair(pair[1]).model
    data = PackedData(tokenize(ROWS, base.tokenizer, 96)[0], base.tokenizer.pad, 96)
    config = DPOConfig(matrices="adamw", lr=1e-3, adam_lr=1e-3, min_steps=12, row_length=96)
    trainer = Trainer(model, data, config, None, torch.float32, 0)
    trainer.objective = DPO(ReferenceCache(base.model, data, torch.float32, trainer.passes), 0.1)
    losses = [metrics["loss"] for metrics in trainer.run()]
    assert math.isclose(losses[0], math.log(2), abs_tol=1e-6) and losses[-1] < losses[0] - 0.02
    export(model, tmp_path / "trained", base.tokenizer)
    both = ("--policy", "trained", "--ref", str(pair[1]))
    figures = json.loads(command(tmp_path, "-m", "minqstar.score", *both, str(rows), "--json").stdout)
    assert figures["pair_accuracy"] == 1 and figures["reward_margin"] > 0.04
    texts = ("--prompt", "the lazy dog", "--response", " is brown 2024")
    credit = command(tmp_path, "-m", "minqstar.lab.credit", *both, *texts, "--html", "credit.html")
    assert credit.returncode == 0 and "DPO charges" in (tmp_path / "credit.html").read_text(), credit.stderr


def test_a_chat_prompt_is_a_users_turn(pair):
    q = minqstar.load(pair[0], reference=pair[1], chat=True)
    turn = [{"role": "user", "content": "the lazy dog"}]
    assert q.group("the lazy dog", []).prompt == q.tokenizer.encode_prompt(turn) != q.tokenizer.encode("the lazy dog")


def test_the_checker_the_figures_credit_and_sampling_take_a_pair(tmp_path, pair, rows):
    both = ("--policy", str(pair[0]), "--ref", str(pair[1]))
    checked = command(tmp_path, "-m", "minqstar.bellman", *both, "--data", str(rows), "--cases", "3", "--json")
    report = json.loads(checked.stdout)
    assert checked.returncode == 0 and report["passed"] and report["optimality"] is None
    assert {"packed = plain", "cached = plain", "search values"} <= {of["id"] for of in report["identities"]}
    figures = command(tmp_path, "-m", "minqstar.evaluate", *both, "--data", str(rows), "--json")
    scored = command(tmp_path, "-m", "minqstar.score", *both, str(rows), "--json")
    a, b = (json.loads(done.stdout) for done in (figures, scored))
    assert a["pairs"] == 3 and math.isclose(a["reward_margin"], b["reward_margin"], abs_tol=1e-5)
    texts = ("--prompt", "the lazy dog", "--response", " is quick")
    credit = command(tmp_path, "-m", "minqstar.lab.credit", *both, *texts, "--html", "credit.html", "--table")
    assert credit.returncode == 0 and "<|im_end|>" in credit.stdout, credit.stderr
    assert "exact" not in (tmp_path / "credit.html").read_text()
    line = (
        "sample.py",
        "--run",
        str(pair[0]),
        "--ref",
        str(pair[1]),
        "--prompt",
        "the lazy dog",
        "--max-new-tokens",
        "5",
    )
    sampled = command(tmp_path, *line, "--search", "beam", "--json")
    assert len(json.loads(sampled.stdout)["rewards"]) == len(json.loads(sampled.stdout)["token_ids"])


@pytest.mark.parametrize(
    "line, words",
    {
        "minqstar.score --policy A rows.jsonl": "A has no reference of its own; give one with --ref",
        "minqstar.score --policy A --ref C rows.jsonl": "A and C have different vocabularies",
        "minqstar.score --policy A --ref nowhere rows.jsonl": "nowhere is not a run folder",
        "minqstar.score --policy A --ref B rows.jsonl --out rows.jsonl": "rows.jsonl is what is read",
        "minqstar.score --policy A --ref B rows.jsonl --beta -1": "beta must be between 1e-6 and 1e6, got -1.0",
        "minqstar.score --policy A --ref B rows.jsonl --beta 0": "beta must be between 1e-6 and 1e6, got 0.0",
        "minqstar.score --policy A --ref B rows.jsonl --out x.jsonl --html x.jsonl": "--out and html are both x.jsonl",
        "minqstar.score --policy A --ref B rows.jsonl --cache empty.jsonl": "cannot keep log-probs in empty.jsonl",
        "minqstar.score --policy A --ref B empty.jsonl": "empty.jsonl: holds no rows",
        "minqstar.bellman --policy A --ref B": "A has no held-out rows; give other rows with --data",
        "minqstar.bellman A --policy A --ref B": "give a RUN or --policy, not both",
        "minqstar.bellman --ref B": "--ref needs RUN or --policy",
        "minqstar.evaluate --policy A --data rows.jsonl": "A has no reference of its own; give one with --ref",
        "minqstar.lab.credit --policy A --ref B": "A has no held-out rows; give --prompt and --response",
        "train.py --init C --reference A --data rows.jsonl": "C and A differ in their vocabulary or architecture",
        "train.py --init A --data empty.jsonl": "empty.jsonl: holds no rows",
        "sample.py --run A": "A has no held-out rows; give --prompt",
        "sample.py --run A --beta 2 --prompt a": "beta 2.0 needs a reference",
        "sample.py --run A --table --prompt a": "A has no reference",
    }.items(),
)
def test_what_cannot_be_is_one_line(tmp_path, pair, rows, line, words):
    for name, folder in zip("ABC", pair, strict=True):
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "empty.jsonl").write_text("")
    first, *rest = line.split()
    done = command(tmp_path, *([first] if first.endswith(".py") else ["-m", first]), *rest)
    assert done.returncode and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
    assert rows.read_text().count("\n") == len(ROWS)


def test_a_vocabulary_of_ours_has_no_chat_template(run_folder):
    with pytest.raises(UserError, match=r"no chat template: leave out --chat"):
        load_pair(run_folder, chat=True)


def test_a_model_with_fewer_tokens_than_its_tokenizer_is_refused(tmp_path, pair, folders):  # noqa: F811
    for file in pair[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((folders["llama2"] / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"the tokenizer has .* tokens, the model"):
        load_pair(tmp_path)
