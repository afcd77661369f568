"""A run folder is whole or not there; what does not fit is named."""

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_model, reseal
from safetensors.torch import load_file, save_file

from minqstar.errors import UserError
from minqstar.files import replace_file
from minqstar.training.checkpoint import as_json, held_out, load_run, sealed
from minqstar.training.writer import RunWriter

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, tokenizer):
    """A finished SFT run and its model."""
    model = random_model(vocab_size=tokenizer.n_vocab)
    write(tmp_path / "sft", model, tokenizer)
    return tmp_path / "sft", model


def write(path, model, tokenizer, overwrite=False, stage="sft", reference=None):
    config = {"stage": stage, "model": vars(model.config), "dpo": {"beta": 0.5}}
    with RunWriter(path, config, overwrite) as writer:
        writer.log({"step": 0, "loss": 1.0})
        writer.save_model(model)
        if reference:
            writer.keep_reference(load_run(reference, CPU))
        tokenizer.save(writer.folder / "vocab.tiktoken")


def test_what_is_saved_is_loaded(run, tokenizer):
    path, model = run
    loaded = load_run(path, CPU)
    assert loaded.reference is None and not loaded.model.training
    assert all(torch.equal(a, loaded.model.state_dict()[name]) for name, a in model.state_dict().items())
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert json.loads((path / "metrics.jsonl").read_text()) == {"step": 0, "loss": 1.0}


def test_a_dpo_run_holds_its_reference(run, tmp_path, tokenizer):
    path, reference = run
    policy = random_model(5, vocab_size=tokenizer.n_vocab)
    write(tmp_path / "dpo", policy, tokenizer, stage="dpo", reference=path)
    write(path, random_model(6, vocab_size=tokenizer.n_vocab), tokenizer, overwrite=True)  # the SFT run changes
    loaded = load_run(tmp_path / "dpo", CPU)
    assert torch.equal(loaded.reference.wte.weight, reference.wte.weight)
    assert torch.equal(loaded.model.wte.weight, policy.wte.weight)


def test_a_failed_run_leaves_nothing_and_an_old_one_stays(run, tokenizer):
    path, _ = run
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    refused(path, "exists", {}, overwrite=False)
    with pytest.raises(RuntimeError), RunWriter(path, {}, overwrite=True) as writer:
        writer.log({"step": 0})
        raise RuntimeError
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in path.parent.iterdir()] == ["sft"]


def test_overwriting_replaces_the_whole_folder(run, tokenizer):
    path, _ = run
    (path / "stray").write_text("x")
    write(path, random_model(8, vocab_size=tokenizer.n_vocab), tokenizer, overwrite=True)
    assert not (path / "stray").exists() and [p.name for p in path.parent.iterdir()] == ["sft"]


CONFIG = {"stage": "sft", "sft": {"lr": 0.02}}


def refused(path, message, config=CONFIG, **kwargs):
    with pytest.raises(UserError, match=message) as error, RunWriter(path, config, **kwargs):
        pytest.fail("it was begun")
    assert "\n" not in str(error.value)


def unfinished(path, steps=3, logged=5, **kwargs):
    """A run that was killed: saved at one step, logged up to another."""
    with pytest.raises(KeyboardInterrupt), RunWriter(path, CONFIG, **kwargs) as writer:
        for step in range(logged):
            writer.log({"step": step})
            if step + 1 == steps:
                writer.save_state({"w": torch.arange(4.0)}, {"step": steps})
        raise KeyboardInterrupt


def test_an_unfinished_run_is_kept_and_continued_from_its_last_save(tmp_path):
    unfinished(tmp_path / "sft")
    assert [p.name for p in tmp_path.iterdir()] == ["sft.part"]
    (tmp_path / "sft.part/.state.safetensors.123-0123abcd.file").write_bytes(b"killed during a save")
    refused(tmp_path / "sft", "is an unfinished run; continue it with --resume")
    other = {"stage": "sft", "sft": {"lr": 0.5}}
    refused(tmp_path / "sft", r"begun otherwise \(sft.lr: 0.02 -> 0.5\)", other, resume=True)
    with RunWriter(tmp_path / "sft", CONFIG, resume=True) as writer:
        tensors, values = writer.resumed
        assert torch.equal(tensors["w"], torch.arange(4.0)) and values["step"] == 3
        assert [line["step"] for line in writer.history()] == [0, 1, 2]
        writer.log({"step": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["sft"]
    assert sorted(p.name for p in (tmp_path / "sft").iterdir()) == ["config.json", "metrics.jsonl", "state.safetensors"]
    assert len((tmp_path / "sft/metrics.jsonl").read_text().splitlines()) == 4
    unfinished(tmp_path / "dpo")
    with RunWriter(tmp_path / "dpo", CONFIG, overwrite=True) as writer:
        assert writer.resumed is None and writer.history() == []


def test_a_kill_between_the_two_renames_loses_nothing(run, tokenizer):
    """The old run has its name again when the next command owns it, and stays until the new one is complete."""
    path, _ = run
    unfinished(path, overwrite=True)
    path.rename(path.parent / ".sft.123-0123abcd.old")
    (path.parent / ".sft.123-0123abcd.gone").mkdir()
    with pytest.raises(KeyboardInterrupt), RunWriter(path, CONFIG, resume=True):
        assert load_run(path, CPU).tokenizer.fingerprint == tokenizer.fingerprint
        raise KeyboardInterrupt
    assert {p.name for p in path.parent.iterdir()} == {"sft", "sft.part"}


def test_a_file_takes_its_name_by_one_rename(tmp_path):
    """Its bytes are never written under its name: what stands there is the very file that was written aside."""
    inodes = []

    def write(aside):
        aside.write_text("new")
        inodes.append(aside.stat().st_ino)

    (tmp_path / "f").write_text("old")
    replace_file(tmp_path / "f", write)
    assert (tmp_path / "f").stat().st_ino == inodes[0] and (tmp_path / "f").read_text() == "new"

    def fail(aside):
        aside.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(UserError, match=r"cannot write .*f: disk full"):
        replace_file(tmp_path / "f", fail)
    assert (tmp_path / "f").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["f"]


def tree(folder) -> dict:
    """All files below a folder, and links, with what is in them."""
    files = (p for p in folder.rglob("*") if p.is_symlink() or p.is_file())
    return {str(p.relative_to(folder)): p.readlink() if p.is_symlink() else p.read_bytes() for p in files}


def test_what_is_not_ours_is_never_replaced_moved_or_removed(run, tmp_path, tokenizer):
    path, model = run
    for name in ("dpo", "new.part", "sft.old", "sft.gone", ".sft.old", ".sft.1-2.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    shutil.copytree(path, tmp_path / "empty.old")  # a run, but the person's copy of it
    (tmp_path / "file").write_text("x")
    (tmp_path / ".sft.7-0123abcd.old").symlink_to(tmp_path / "dpo")
    before = tree(tmp_path)
    refused(tmp_path / "dpo", "dpo exists and is not a run", overwrite=True)
    refused(tmp_path / "new", r"new.part exists and is not a run", overwrite=True)
    refused(tmp_path / "file", "file exists and is not a run", overwrite=True)
    refused(tmp_path / "file/sft", "cannot write .*file/.sft.lock: that is in no folder")
    (tmp_path / "empty.part").mkdir()  # nothing is lost
    write(tmp_path / "empty", model, tokenizer)
    write(path, model, tokenizer, overwrite=True)
    after = {name: content for name, content in tree(tmp_path).items() if not name.startswith("empty/")}
    assert after == before


@pytest.mark.parametrize("what", ["run", "dangling", "part"])
def test_no_run_is_made_through_a_link(run, tmp_path, what):
    path, _ = run
    link = tmp_path / ("dpo.part" if what == "part" else "dpo")
    link.symlink_to(tmp_path / "nowhere" if what == "dangling" else path)
    before = tree(tmp_path)
    refused(tmp_path / "dpo", r"dpo(.part)? is a link, and no run is made through one", overwrite=True)
    assert tree(tmp_path) == before
    assert what == "dangling" or load_run(link, CPU).config == load_run(path, CPU).config  # it may be read through one


def test_links_in_an_unfinished_run_are_replaced_not_followed(tmp_path):
    unfinished(tmp_path / "sft")
    for name in ("metrics.jsonl", "state.safetensors", "config.json"):
        file = tmp_path / "sft.part" / name
        (tmp_path / name).write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(tmp_path / name)
    before = {name: content for name, content in tree(tmp_path).items() if "/" not in name}
    with RunWriter(tmp_path / "sft", CONFIG, resume=True) as writer:
        writer.log({"step": 3})
        writer.save_state({"w": torch.ones(4)}, {"step": 4})
    assert {name: content for name, content in tree(tmp_path).items() if "/" not in name} == before
    assert not any(isinstance(content, Path) for content in tree(tmp_path).values())
    assert len((tmp_path / "sft/metrics.jsonl").read_text().splitlines()) == 4


def test_a_reference_that_is_a_link_is_brought_in_whole(run, tmp_path, tokenizer):
    path, reference = run
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "dpo", random_model(5, vocab_size=tokenizer.n_vocab), tokenizer, stage="dpo", reference=path)
    shutil.rmtree(path)
    (tmp_path / "elsewhere").unlink()
    assert torch.equal(load_run(tmp_path / "dpo", CPU).reference.wte.weight, reference.wte.weight)


@pytest.mark.parametrize("line", ["garbage", "{}"])
def test_a_damaged_log_is_named(tmp_path, line):
    unfinished(tmp_path / "sft")
    log = tmp_path / "sft.part/metrics.jsonl"
    log.write_text("\n".join([line, *log.read_text().splitlines()[1:]]) + "\n")
    with (
        pytest.raises(UserError, match=r"metrics.jsonl is damaged"),
        RunWriter(tmp_path / "sft", CONFIG, resume=True) as writer,
    ):
        writer.history()


@pytest.mark.parametrize("spoil", ["cut", "flip", "pickle", "no step", "lost lines"])
def test_a_damaged_state_is_named(tmp_path, spoil):
    unfinished(tmp_path / "sft")
    state = tmp_path / "sft.part/state.safetensors"
    match spoil:
        case "cut":
            state.write_bytes(state.read_bytes()[:-5])
        case "flip":  # of the last number
            state.write_bytes(state.read_bytes()[:-1] + bytes([state.read_bytes()[-1] ^ 1]))
        case "pickle":
            state.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        case "no step":
            save_file({"w": torch.zeros(1)}, state)
        case "lost lines":
            (tmp_path / "sft.part/metrics.jsonl").write_text("")
    refused(tmp_path / "sft", "start anew with --overwrite", resume=True)
    assert not (tmp_path / "exploded").exists()


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def test_pickles_are_refused_and_their_code_does_not_run(run, tmp_path):
    path, _ = run
    pickle.loads(pickle.dumps(Bomb(tmp_path / "armed"))).close()
    assert (tmp_path / "armed").exists()  # it would have worked
    for payload in (pickle.dumps(Bomb(tmp_path / "exploded")), torch_archive(tmp_path)):
        (path / "model.safetensors").write_bytes(payload)
        reseal(path)
        with pytest.raises(UserError, match="cannot load"):
            load_run(path, CPU)
    assert not (tmp_path / "exploded").exists()


def torch_archive(folder) -> bytes:
    torch.save({"wte.weight": Bomb(folder / "exploded")}, folder / "archive.pt")
    return (folder / "archive.pt").read_bytes()


def damage_weights(path):
    weights = load_file(path / "model.safetensors")
    weights["wte.weight"] = weights["wte.weight"][:-1].clone()
    save_file(weights, path / "model.safetensors")


def another_architecture(path):
    config = json.loads((path / "config.json").read_text())
    config["model"]["n_layer"] += 1
    (path / "config.json").write_text(json.dumps(config))


def not_finite(path):
    weights = load_file(path / "model.safetensors")
    weights["wte.weight"][0, 0] = float("nan")
    save_file(weights, path / "model.safetensors")


def nothing(_):
    """For what no hash stands before."""


@pytest.mark.parametrize(
    ("damage", "mend", "message"),
    [
        (lambda p: (p / "config.json").unlink(), nothing, "holds no run"),
        (lambda p: (p / "config.json").write_text("{"), nothing, "damaged"),
        (lambda p: (p / "config.json").write_text("{}"), nothing, "describes no model"),
        (lambda p: (p / "model.safetensors").unlink(), nothing, "cannot load .*model.safetensors"),
        (lambda p: (p / "vocab.tiktoken").unlink(), nothing, "cannot load .*vocab.tiktoken"),
        (lambda p: (p / "vocab.tiktoken").unlink(), reseal, "cannot read the vocabulary"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x80\x04no"), reseal, "cannot load .*model.safetensors"),
        (damage_weights, reseal, r"does not fit its config.json: wte.weight is \(1023, 16\)"),
        (another_architecture, reseal, "does not fit its config.json: .*attn.* is not there"),
        (not_finite, reseal, "wte.weight holds numbers that are not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*was made before")
def test_a_damaged_run_is_named(run, damage, mend, message):
    path, _ = run
    damage(path)
    mend(path)
    with pytest.raises(UserError, match=message) as error:
        load_run(path, CPU)
    assert "\n" not in str(error.value)


def test_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="not a run folder; train one"):
        load_run(tmp_path / "nowhere", CPU)


@pytest.fixture
def dpo(run, tmp_path, tokenizer):
    """A finished DPO run with held-out rows."""
    path, reference = run
    config = {"stage": "dpo", "model": vars(reference.config), "dpo": {"beta": 0.5}, "reference": {"path": "sft"}}
    with RunWriter(tmp_path / "dpo", config) as writer:
        writer.save_model(random_model(5, vocab_size=tokenizer.n_vocab))
        writer.keep_reference(load_run(path, CPU))
        tokenizer.save(writer.folder / "vocab.tiktoken")
        writer.write("held_out.jsonl", b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    return tmp_path / "dpo"


HASHED = ("config.json", "model.safetensors", "reference.safetensors", "vocab.tiktoken", "held_out.jsonl")


def test_a_run_whose_bits_flip_is_refused(dpo):
    """Any bit of any file that is loaded."""
    rng = random.Random(0)
    for i in range(120):
        file = dpo / HASHED[i % len(HASHED)]
        whole = file.read_bytes()
        bit = rng.randrange(8 * len(whole))
        file.unlink()  # the reference shares its bytes with the SFT run
        file.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        with pytest.raises(UserError, match=f"{file.name}|config.json") as error:
            load_run(dpo, CPU)
        assert "\n" not in str(error.value)
        file.write_bytes(whole)
    load_run(dpo, CPU)


def edit_config(path, change):
    config = json.loads((path / "config.json").read_bytes())
    change(config)
    (path / "config.json").write_bytes(as_json(config))


def swap(path):
    a, b = (path / name for name in ("model.safetensors", "reference.safetensors"))
    one, other = a.read_bytes(), b.read_bytes()
    b.unlink()
    a.write_bytes(other)
    b.write_bytes(one)


def permute(path):
    lines = (path / "vocab.tiktoken").read_text().splitlines()
    tokens = [line.split()[0] for line in lines]
    tokens[300], tokens[301] = tokens[301], tokens[300]
    (path / "vocab.tiktoken").write_text("".join(f"{token} {rank}\n" for rank, token in enumerate(tokens)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, "model.safetensors is not what the run was finished with"),
        (permute, "vocab.tiktoken is not what the run was finished with"),
        (lambda p: edit_config(p, lambda c: c["model"].update(n_head=4)), "config.json is not what the run"),
        (lambda p: edit_config(p, lambda c: c["dpo"].update(beta=0.1)), "config.json is not what the run"),
        (lambda p: edit_config(p, lambda c: c.pop("files")), "config.json is not what the run"),
        (lambda p: edit_config(p, lambda c: c.pop("sha256")), "config.json is not what the run"),
        (lambda p: edit_config(p, lambda c: c["files"].pop("vocab.tiktoken")), "config.json is not what the run"),
        (lambda p: edit_config(p, lambda c: c["files"].update(a=1)), "config.json is not what the run"),
        (lambda p: shutil.copy(p.parent / "sft/config.json", p), "model.safetensors is not what the run"),
    ],
)
def test_a_run_is_held_to_what_it_says_of_itself(dpo, change, message):
    change(dpo)
    with pytest.raises(UserError, match=message) as error:
        load_run(dpo, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("beta", [True, "0.5", None, [], 0, -1, float("nan"), float("inf"), 10**400])
def test_a_beta_of_another_type_or_out_of_bounds_is_named(dpo, beta):
    edit_config(dpo, lambda config: config["dpo"].update(beta=0.5))
    config = json.loads((dpo / "config.json").read_bytes())
    config["dpo"]["beta"] = beta
    (dpo / "config.json").write_text(json.dumps(sealed(config, dpo)))
    with pytest.raises(UserError, match="beta must be a number between"):
        load_run(dpo, CPU)


@pytest.mark.parametrize(
    "change", [{"qk_norm": 1}, {"bias": "yes"}, {"norm": ["rms"]}, {"n_head": 2.0}, {"n_head": True}]
)
def test_an_architecture_of_other_types_is_named(dpo, change):
    edit_config(dpo, lambda config: config["model"].update(change))
    reseal(dpo)
    with pytest.raises(UserError, match=f"config.json: {next(iter(change))} must be") as error:
        load_run(dpo, CPU)
    assert "\n" not in str(error.value)


def test_an_older_run_is_loaded_with_one_line_that_says_so(dpo):
    edit_config(dpo, lambda config: [config.pop(name) for name in ("files", "sha256")])
    with pytest.warns(UserWarning, match="made before runs knew the hashes of their files") as said:
        load_run(dpo, CPU)
    assert len(said) == 1 and "\n" not in str(said[0].message)


def test_a_run_that_was_replaced_since_it_was_loaded_gives_no_rows_and_no_reference(dpo, run, tokenizer):
    path, _ = run
    old, reference = load_run(dpo, CPU), load_run(path, CPU)
    assert held_out(old)[0]["prompt"] == "p"
    (dpo / "held_out.jsonl").write_text('{"prompt": "q", "chosen": "c", "rejected": "r"}\n')
    with pytest.raises(UserError, match="was replaced after it was read"):
        held_out(old)
    write(path, random_model(7, vocab_size=tokenizer.n_vocab), tokenizer, overwrite=True)
    with (
        pytest.raises(UserError, match="was replaced after it was read"),
        RunWriter(dpo.with_name("new"), CONFIG) as writer,
    ):
        writer.keep_reference(reference)


def test_changed_data_is_named_when_a_run_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunWriter(tmp_path / "sft", CONFIG | {"data": "1" * 64}) as writer:
        writer.log({"step": 0})
        writer.save_state({"w": torch.ones(1)}, {"step": 1})
        raise KeyboardInterrupt
    said = r"was begun on other data than mine.jsonl holds now, or another version read it \(sha256 1+ -> 2+\); repeat"
    refused(tmp_path / "sft", said, CONFIG | {"data": "2" * 64}, resume=True, source="mine.jsonl")
