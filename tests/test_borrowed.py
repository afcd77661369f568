"""Other people's tokenizers: the oracles are the `tokenizers` library itself and transformers' templates."""

import json
import os
import random
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

from minqstar.errors import UserError
from minqstar.lm import chat
from minqstar.lm.borrowed import BorrowedTokenizer, load_borrowed

LINES = """The cat sat on the mat, and it's 1234 o'clock — naïve café!
Привет, мир. 你好，世界。 שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี ጤና ይስጥልኝ こんにちは 안녕하세요 γειά
def f(x):    return x + 2024\n\n\t# done 🙂👍🏽 "quoted" don't we'll""".split("\n")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DOUBLING = "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
CHATML = """{% for m in messages %}
<|im_start|>{{ m.role }}
{{ m['content'] }}<|im_end|>
  {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """{{ bos_token }}
{%- for m in messages %}{% generation %}
{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim }}<|eot|>
{%- endgeneration %}{% endfor %}{{ '<|head|>assistant<|/head|>\n\n' if add_generation_prompt }}"""
ZEPHYR = """{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
{{ '<|' ~ m.role ~ '|>' }}
{{ m.content ~ eos_token }}
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}
{% endif %}"""


def trained(bpe: models.BPE, normalizer, pre_tokenizer, specials: list[str], alphabet=(), size=500):
    tokenizer = tokenizers.Tokenizer(bpe)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([*LINES, "a\n\n\tb <|/>\n"] * 3, trainer)
    return tokenizer


def parts(*steps):
    return pre_tokenizers.Sequence(list(steps))


def shape(name: str):
    """A small tokenizer of a family's shape, its tokenizer_config, its chat template, and its generation_config."""
    level, alphabet = pre_tokenizers.ByteLevel, pre_tokenizers.ByteLevel.alphabet()
    config, template, generation = {"eos_token": "<|endoftext|>"}, None, {}
    if name == "gpt2":
        made = trained(models.BPE(), None, level(add_prefix_space=False), ["<|endoftext|>"], alphabet)
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    if name == "prefix":  # as RoBERTa has it
        made = trained(models.BPE(), None, level(add_prefix_space=True), ["<|endoftext|>"], alphabet)
    if name == "smollm2":
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        steps = parts(pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False))
        made = trained(models.BPE(), None, steps, specials, sorted(alphabet)[:94])
        config, template, generation = {"eos_token": "<|im_end|>"}, CHATML, {"eos_token_id": 2}
    if name == "qwen":
        steps = parts(pre_tokenizers.Split(Regex(SPLIT), "isolated"), level(add_prefix_space=False, use_regex=False))
        made = trained(models.BPE(), normalizers.NFC(), steps, [], alphabet)
        made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        made.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<think>", normalized=False)])
        config["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHATML}]
    if name == "llama3":
        steps = parts(pre_tokenizers.Split(Regex(SPLIT), "isolated"), level(add_prefix_space=False, use_regex=False))
        made = trained(models.BPE(ignore_merges=True), None, steps, [], alphabet)
        made.add_special_tokens(["<|begin|>", "<|end|>", "<|head|>", "<|/head|>", "<|eot|>"])
        bos = [("<|begin|>", made.token_to_id("<|begin|>"))]
        made.post_processor = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A $B", bos)
        config, template = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}, LLAMA3
        generation = {"eos_token_id": [made.token_to_id("<|end|>"), made.token_to_id("<|eot|>")]}
    if name == "neox":
        made = trained(models.BPE(), normalizers.NFC(), level(add_prefix_space=False), ["<|endoftext|>"], alphabet)
        made.add_tokens([AddedToken(" " * n, normalized=True) for n in range(2, 25)])
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    if name in ("llama2", "metaspace"):
        specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        legacy = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        how = (legacy, None) if name == "llama2" else (None, first)
        bpe = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        made = trained(bpe, *how, specials)
        spec = json.loads(made.to_str())  # the library writes 256 bytes as tokens, as they stand in Llama's file
        spec["added_tokens"] = spec["added_tokens"][:3]
        made = tokenizers.Tokenizer.from_str(json.dumps(spec))
        made.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A $B", [("<s>", 1), ("</s>", 2)])
        config, template = {"eos_token": "</s>", "bos_token": "<s>"}, ZEPHYR
    return made, config, template, generation


NAMES = "gpt2 prefix smollm2 qwen llama3 neox llama2 metaspace".split()


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name in NAMES:
        folder = made[name] = tmp_path_factory.mktemp(name)
        tokenizer, config, template, generation = shape(name)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text(json.dumps(generation))
        if template:
            (folder / "chat_template.jinja").write_text(template)
    return made


class Both:
    def __init__(self, folder: Path):
        self.ours = load_borrowed(folder)
        self.theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.theirs.encode_special_tokens = True
        self.theirs.no_truncation()


@pytest.fixture(scope="session")
def both(folders) -> dict[str, Both]:
    return {name: Both(folder) for name, folder in folders.items()}


MARKS = ["<|im_end|>", "<|endoftext|>", "</s>", "<s>", "<unk>", "<|eot|>", "<tool_call>", "<think>", "<0x0A>", "▁", "Ġ"]
RANGES = [
    "az",
    "09",
    "Яя",
    "一丿",
    "את",
    "ءي",
    "अह",
    "กฮ",
    "ሀቿ",
    "あん",
    "가힣",
    "αω",
    "🌀🙏",
    "\x00\x1f",
    "\u0300\u0345",
    "À\xff",
]
pieces = st.one_of(
    st.sampled_from(
        [*MARKS, *LINES, " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200d", "é", "e\u0301"]
    ),
    st.builds(str.__mul__, st.sampled_from(" \n\t"), st.integers(1, 30)),
    *(st.text(st.characters(min_codepoint=ord(a), max_codepoint=ord(b)), min_size=1, max_size=6) for a, b in RANGES),
)
texts = st.lists(st.one_of(pieces, st.characters(exclude_categories=["Cs"])), max_size=8).map("".join)


def random_texts(count: int, seed: int = 0):
    """Texts as above, drawn quickly."""
    draw = random.Random(seed)
    fixed = [
        *MARKS,
        *LINES,
        *(" " * n for n in range(1, 30)),
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "é",
        "e\u0301",
        "\u3000",
        "\u200d",
    ]
    for _ in range(count):
        yield "".join(
            draw.choice(fixed) if draw.random() < 0.5
            else "".join(chr(draw.randint(*map(ord, draw.choice(RANGES)))) for _ in range(draw.randint(1, 5)))
            for _ in range(draw.randint(1, 7))
        )  # fmt: skip


def agree(two: Both, text: str) -> bool:
    """Ids as the library has them, or an error where its tokens do not hold the text; whether there were ids."""
    theirs = two.theirs.encode(text, add_special_tokens=False)
    try:
        ids = two.ours.encode(text)
    except UserError as e:
        assert "has no token for" in str(e) and "\n" not in str(e)
        normal = two.theirs.normalizer.normalize_str(text) if two.theirs.normalizer else text
        decoded = b"".join(two.ours.bytes_of(theirs.ids)).decode("utf-8", "replace")
        assert decoded.lstrip(" ▁") != normal.lstrip(" ▁")  # the library lost something
        return False
    assert ids == theirs.ids
    return True


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_librarys(both, name):
    """10,000 texts in all."""
    held = sum(agree(both[name], text) for text in random_texts(1250))
    assert held == 1250 or (name == "smollm2" and 50 < held < 1250)


@pytest.mark.parametrize("name", NAMES)
@given(text=texts)
@settings(max_examples=60)
def test_ids_are_the_librarys_on_texts_that_hypothesis_finds(both, name, text):
    agree(both[name], text)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "smollm2"])
@given(text=texts)
def test_a_response_is_its_text_and_one_eos(both, name, text):
    ours, theirs = both[name].ours, both[name].theirs
    ids = ours.encode_response(text)
    normal = theirs.normalizer.normalize_str(text) if theirs.normalizer and name != "llama2" else text
    normal = normal.replace("▁", " ") if ours.spaced else normal
    assert ids[-1] == ours.eos and not ours.special & set(ids[:-1])
    assert ours.decode(ids) == normal == "".join(span.text for span in ours.spans(ids[:-1]))
    assert ours.texts_of(ids)[-1] in ("<|endoftext|>", "<|im_end|>", "<|eot|>", "</s>")


def test_a_prompt_has_the_tokens_that_stand_in_front(both):
    assert both["llama3"].ours.encode_prompt("The cat")[0] == both["llama3"].theirs.token_to_id("<|begin|>")
    for name in NAMES:
        two = both[name]
        whole = two.theirs.encode("The cat").ids  # with special tokens, those behind too
        assert two.ours.encode_prompt("The cat") == (whole[:-1] if name in ("llama2", "metaspace") else whole)


def test_ends_and_pad(both):
    def ids(name, *texts):
        return tuple(both[name].theirs.token_to_id(text) for text in texts)

    assert both["smollm2"].ours.ends == (2,) and both["gpt2"].ours.ends == (0,)
    assert both["llama3"].ours.ends == ids("llama3", "<|eot|>", "<|end|>")  # the template's own first
    assert both["qwen"].ours.ends == ids("qwen", "<|im_end|>", "<|endoftext|>")
    assert both["llama2"].ours.eos == both["llama2"].ours.pad == 2
    for two in both.values():
        assert two.ours.n_vocab == max(two.theirs.get_vocab().values()) + 1


def test_ids_below_eos_are_text_and_ids_without_a_token_are_shown(both):
    ours = both["qwen"].ours
    beyond = ours.n_vocab + 3
    ids = [*ours.encode("a中"), ours.eos, beyond]
    assert ours.texts_of(ids)[-2:] == ["<|im_end|>", f"⟨id {beyond}⟩"] and ours.spans(ids)[-1].stop == len(ids)
    assert ours.decode(ids) == f"a中⟨id {beyond}⟩"
    small = both["smollm2"].ours
    assert small.decode([0, *small.encode("the cat"), 1, 2]) == "the cat"


CHATS = [
    [{"role": "user", "content": "Hello  there, 123"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " spaces \n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "x": None},
        {"role": "user", "content": "<think>"},
    ],
]


CHAT_NAMES = ["smollm2", "qwen", "llama3", "llama2", "metaspace"]


def transformers_of(folder: Path, name: str):
    _, config, template, _ = shape(name)
    roles = {role: t if isinstance(t, str) else t["content"] for role, t in config.items() if role != "chat_template"}
    file = str(folder / "tokenizer.json")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=file, chat_template=template or CHATML, **roles)


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_a_conversation_is_what_transformers_makes_of_it(folders, both, name):
    fast = transformers_of(folders[name], name)
    for messages in CHATS:
        ids = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert both[name].ours.encode_prompt(messages) == ids


ANSWERS = [
    [{"role": "assistant", "content": "mat <|im_end|> 1234"}],
    [{"role": "assistant", "content": "x"}, {"role": "user", "content": "why?"}, {"role": "assistant", "content": "b"}],
    [{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two </s>"}],
]


@pytest.mark.parametrize("name", CHAT_NAMES)
@pytest.mark.parametrize("prompt", CHATS)
def test_an_answer_goes_on_where_its_prompt_ends(folders, both, name, prompt):
    """Prompt and answer, each tokenised apart, are transformers' ids of the whole conversation; the end is scored."""
    ours, fast = both[name].ours, transformers_of(folders[name], name)
    for answer in ANSWERS:
        if "<" in answer[-1]["content"] + answer[0]["content"]:
            continue  # transformers takes such text for the token itself
        ids, _ = ours.encode_answer(prompt, answer)
        whole = fast.apply_chat_template([*prompt, *answer], add_generation_prompt=False, return_dict=False)
        assert (ours.encode_prompt(prompt) + ids) == whole[: len(ours.encode_prompt(prompt)) + len(ids)]
        assert ids[-1] == ours.eos and not {ours.eos, *ours.ends} & set(whole[len(ours.encode_prompt(prompt) + ids) :])


@pytest.mark.parametrize("name", CHAT_NAMES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_of_an_answer_the_assistant_wrote_its_turns_with_their_ends(both, name, answer):
    """What others say in between is given; and so is what opens the next turn."""
    ours = both[name].ours
    ids, given = ours.encode_answer(CHATS[0], answer)
    turns = [message["content"] for message in answer if message["role"] == "assistant"]
    own = [i for place, i in enumerate(ids) if place not in given]
    assert own.count(ours.eos) == len(turns) and own[-1] == ours.eos
    assert ours.decode(own) == "".join(turns)
    said = ours.decode([ids[place] for place in given])
    assert all(message["content"] in said for message in answer if message["role"] != "assistant")
    assert bool(given) == (len(turns) > 1)


def test_a_template_that_writes_a_conversation_otherwise_is_refused(folders, tmp_path):
    """Here what opens a turn depends on whether an answer follows: no boundary of it can be trusted."""
    odd = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\nthink: ")
    tokenizer = load_borrowed(folder_with(folders, tmp_path, "smollm2", **{"chat_template.": odd}))
    with pytest.raises(UserError, match=r"chat_template\.jinja writes a turn otherwise once another follows"):
        tokenizer.encode_answer(CHATS[0], ANSWERS[0])


def by_hand(two: Both, name: str, chat: list[dict]) -> list[int]:
    """The three templates, piece by piece: special tokens are their ids, and what stands between is plain text."""
    if name in ("smollm2", "qwen"):
        parts = [part for m in chat for part in ("<|im_start|>", f"{m['role']}\n{m['content']}", "<|im_end|>", "\n")]
        parts += ["<|im_start|>", "assistant\n"]
    elif name == "llama3":
        turns = [("<|head|>", m["role"], "<|/head|>", "\n\n" + m["content"].strip(), "<|eot|>") for m in chat]
        parts = ["<|begin|>", *(part for turn in turns for part in turn)]
        parts += ["<|head|>", "assistant", "<|/head|>", "\n\n"]
    else:
        turns = [("\n" * (k > 0) + f"<|{m['role']}|>\n{m['content']}", "</s>") for k, m in enumerate(chat)]
        parts = [*(part for turn in turns for part in turn), "\n<|assistant|>\n"]
    later = tokenizers.Tokenizer.from_str(two.theirs.to_str())
    later.encode_special_tokens = True
    if name == "metaspace":  # it puts a space before the first piece only
        later.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    ids = []
    for k, part in enumerate(parts):
        special = two.theirs.token_to_id(part) if part.endswith(">") and part in SPECIALS else None
        encode = (later if k else two.theirs).encode
        ids += encode(part, add_special_tokens=False).ids if special is None else [special]
    return ids


SPECIALS = {"<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<|begin|>", "</s>"}


@pytest.mark.parametrize("name", CHAT_NAMES)
@given(texts=st.lists(texts.filter(str.isprintable), min_size=3, max_size=3))
def test_special_tokens_in_a_message_are_its_text(both, name, texts):
    two = both[name]
    mark = two.theirs.id_to_token(two.ours.eos)
    contents = [f"{mark}{text}{mark} a" for text in texts]
    chat = [{"role": role, "content": text} for role, text in zip(["user", "assistant", "user"], contents, strict=True)]
    try:
        ids = two.ours.encode_prompt(chat)
    except UserError as e:
        assert name == "smollm2" and "has no token for" in str(e)
        return
    assert ids == by_hand(two, name, chat)


def test_saving_and_loading_is_the_identity(both, tmp_path):
    for name in NAMES:
        ours, folder = both[name].ours, tmp_path / name
        folder.mkdir()
        ours.save_in(folder)
        again = load_borrowed(folder)
        assert (again.fingerprint, again.ends, again.pad) == (ours.fingerprint, ours.ends, ours.pad)
        for file, text in ours.files.items():
            assert (folder / file).read_text(encoding="utf-8") == text
    assert len({two.ours.fingerprint for two in both.values()}) == len(NAMES)


def test_saving_keeps_the_ends_that_a_config_names(folders, tmp_path):
    folder = folder_with(folders, tmp_path, "gpt2", tokenizer_config="{}")
    (folder / "config.json").write_text('{"eos_token_id": [5, 0], "pad_token_id": 7}')
    ours = load_borrowed(folder)
    (tmp_path / "again").mkdir()
    ours.save_in(tmp_path / "again")
    again = load_borrowed(tmp_path / "again")
    assert again.ends == ours.ends == (5, 0) and again.pad == ours.pad == 7


def test_bytes_without_a_token_are_named(both):
    with pytest.raises(UserError, match=r"tokenizer.json has no token for the byte 04 in 'a␄b'"):
        both["smollm2"].ours.encode("a\x04b")


def folder_with(folders, tmp_path, name="smollm2", **files) -> Path:
    """A copy with some files exchanged; None takes one away."""
    for path in folders[name].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for file, text in files.items():
        path = next(p for p in tmp_path.iterdir() if p.name.startswith(file))
        path.write_text(text) if text is not None else path.unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.": None}, "has no tokenizer.json, which"),
        ({"tokenizer.": '{"model": {"type": "X"}}'}, "tokenizer.json: no tokenizer: "),
        ({"tokenizer.": "[" * 10**5}, "tokenizer.json: no tokenizer: "),
        ({"tokenizer_config": "{"}, "tokenizer_config.json: no JSON"),
        ({"tokenizer_config": "[]"}, "tokenizer_config.json: want a JSON object"),
        ({"tokenizer_config": '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'}, "auto_map.*never run"),
        ({"generation": '{"eos_token_id": 99999}'}, "eos_token_id 99999 is no token"),
        ({"generation": "{}", "tokenizer_config": "{}", "chat": "{{ messages[1].content }}"}, "no file names"),
        ({"chat": "{% if"}, "chat_template.jinja: the chat template fails: "),
        ({"chat": "{{ raise_exception('not\x1b this') }}"}, "fails: not␛ this"),
        ({"chat": "{{ ().__class__.__base__.__subclasses__() }}"}, "unsafe"),
        ({"chat": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"}, "more than"),
        ({"chat": "{{ range(10**9) | list }}"}, "chat_template.jinja: .* Range"),
        ({"chat": "{{ 'a' * 10**9 }}"}, "huge"),
        ({"chat": "{{ 9**9**9 }}"}, "huge"),
        ({"chat": DOUBLING}, "too long"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(folders, tmp_path, monkeypatch, files, message):
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    with pytest.raises(UserError, match=message) as caught:
        load_borrowed(folder_with(folders, tmp_path, **files))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_damaged_part_of_a_tokenizer_is_refused(folders, tmp_path):
    """The library would end the process at the first, and panic at the second."""
    spec = json.loads((folders["llama3"] / "tokenizer.json").read_text())
    prefix = spec | {"model": spec["model"] | {"continuing_subword_prefix": "x"}}
    behind = spec | {"post_processor": spec["post_processor"] | {"special_tokens": {}}}
    for damaged, message in ((prefix, "continuing_subword_prefix 'x'"), (behind, "its post_processor fails")):
        with pytest.raises(UserError, match=f"tokenizer.json: .*{message}"):
            load_borrowed(folder_with(folders, tmp_path, "llama3", **{"tokenizer.": json.dumps(damaged)}))


def test_an_older_form_of_tokenizer_says_how_to_convert(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"transformers makes it of tokenizer\.model: AutoTokenizer.*save_pretrained"):
        load_borrowed(tmp_path)


def test_a_template_that_is_not_there_or_refuses(both):
    with pytest.raises(UserError, match=r"has no chat template \(chat_template\.jinja\)"):
        both["gpt2"].ours.start_chat()
    with pytest.raises(UserError, match=r"chat_template\.jinja: the chat template fails: no tools here"):
        both["llama2"].ours.encode_prompt([{"role": "tool", "content": "x"}])
    for messages in ([], ["hi"], [{"role": "user", "content": b"x"}]):
        with pytest.raises(UserError, match="message"):
            both["smollm2"].ours.encode_prompt(messages)


def test_a_real_tokenizer():
    folder = os.environ.get("MINQSTAR_SMOLLM2")
    if not folder:
        pytest.skip("MINQSTAR_SMOLLM2 names no folder of SmolLM2-135M-Instruct")
    two = Both(Path(folder))
    assert isinstance(two.ours, BorrowedTokenizer) and two.ours.eos == 2 and two.ours.n_vocab == 49152
    assert sum(agree(two, text) for text in random_texts(10_000)) > 5_000
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for messages in CHATS:
        ids = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert two.ours.encode_prompt(messages) == ids
