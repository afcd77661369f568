import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minqstar.errors import UserError
from minqstar.lm.tokenizer import EOS, PAD, Tokenizer, load_tokenizer, train_vocabulary

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(any_text)
def test_any_text_round_trips(text):
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.eos for i in ids)


def test_digits_stand_alone_and_words_take_their_space(tokenizer):
    assert tokenizer.texts_of(tokenizer.encode(" pay $62k in 2024")) == [
        *(" pay", " $", "6", "2", "k", " in", " ", "2", "0", "2", "4")
    ]


def test_special_tokens_cannot_be_written(tokenizer):
    ids = tokenizer.encode(f"a{EOS}b{PAD}")
    assert tokenizer.eos not in ids and tokenizer.pad not in ids
    assert tokenizer.decode([*ids, tokenizer.eos, tokenizer.pad]) == f"a{EOS}b{PAD}"


def test_a_response_ends_in_one_eos(tokenizer):
    ids = tokenizer.encode_response(" fine.")
    assert ids.count(tokenizer.eos) == 1 and ids[-1] == tokenizer.eos


def test_the_size_is_what_the_design_asks(tokenizer):
    assert 512 <= tokenizer.n_vocab <= 1024


def test_saving_and_loading_is_the_identity(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "v")
    again = load_tokenizer(tmp_path / "v")
    assert again.ranks == tokenizer.ranks and again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "256 single bytes"),
        (b"YQ== 0\n", "256 single bytes"),
        (b"YQ== zero\n", ":1: want"),
        (b"YQ==\n", ":1: want"),
        (b"!!! 0\n", ":1: want"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path, content, message):
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "v")


def test_a_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the vocabulary .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_training_gives_the_asked_size_and_is_deterministic():
    pytest.importorskip("rustbpe")
    texts = ["the cat sat on the mat with the hat 12 34"] * 50
    one, two = train_vocabulary(texts, 270), train_vocabulary(texts, 270)
    assert isinstance(one, Tokenizer) and one.n_vocab == 270 and one.ranks == two.ranks


def test_the_tokens_of_one_character_are_shown_together(tokenizer):
    ids = tokenizer.encode("a 中🙂é")
    assert [span.text for span in tokenizer.spans(ids)] == ["a", " ", "中", "🙂", "é"]
    assert tokenizer.texts_of(ids) == ["a", " ", "⟨e4⟩", "⟨b8⟩", "中", "⟨f0⟩", "⟨9f⟩", "⟨99⟩", "🙂", "⟨c3⟩", "é"]
    cut = tokenizer.encode("中")[:2]
    assert tokenizer.texts_of(cut) == ["⟨e4⟩", "⟨b8⟩"] == [span.text for span in tokenizer.spans(cut)]
    assert tokenizer.texts_of([*cut, tokenizer.eos]) == ["⟨e4⟩", "⟨b8⟩", EOS]


# Byte-pair merges may cross characters: tokens that end one character and begin the next.
CROSSING = Tokenizer({bytes([b]): b for b in range(256)} | {b"a\xe4": 256, b"\xb8\xad\xe4": 257, b"\xad b": 258})


def test_a_token_may_end_one_character_and_begin_the_next():
    ids = [256, 257, 0xB8, 258, ord("c")]  # a中中 bc
    assert CROSSING.texts_of(ids) == ["a⟨e4⟩", "中⟨e4⟩", "⟨b8⟩", "中 b", "c"]
    assert CROSSING.spans(ids) == [(0, 4, "a中中 b"), (4, 5, "c")]


@given(any_text)
def test_spans_of_a_text_are_the_text(text):
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(text)
    spans = tokenizer.spans(ids)
    assert "".join(span.text for span in spans) == text
    for span in spans:  # no smaller group would do: to cut a span anywhere cuts a character
        for middle in range(span.start + 1, span.stop):
            assert "�" in tokenizer.decode(ids[span.start : middle])


@pytest.mark.parametrize("crossing", [False, True])
@given(data=st.data())
def test_spans_and_texts_of_any_ids_lose_nothing(tokenizer, crossing, data):
    """Read back by hand: characters are themselves, and a number in ⟨⟩ is its byte."""
    tokenizer = CROSSING if crossing else tokenizer
    tricky = st.sampled_from([0xE4, 0xB8, 0xAD, 0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82, 0xED, 0xA0, 256, 257, 258])
    ids = data.draw(st.lists(st.one_of(tricky, st.integers(0, tokenizer.n_vocab - 1)), max_size=40))
    whole = b"".join(map(tokenizer.encoding.decode_single_token_bytes, ids))
    spans, texts = tokenizer.spans(ids), tokenizer.texts_of(ids)
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(len(ids)))
    assert len(texts) == len(ids)
    number = re.compile("⟨([0-9a-f]{2})⟩")
    assert b"".join(_bytes_of(span.text) for span in spans) == whole
    assert not any("�" in text for text in texts)
    for span in spans:
        shown = "".join(texts[span.start : span.stop])
        assert number.sub("", shown) == number.sub("", span.text)  # the same characters, in the same order
        if span.stop - span.start == 1:
            assert shown == span.text == _shown(tokenizer, ids[span.start])


def _bytes_of(shown: str) -> bytes:
    return b"".join(
        bytes([int(piece[1:3], 16)]) if len(piece) == 4 else piece.encode()
        for piece in re.findall("⟨[0-9a-f]{2}⟩|.", shown, re.S)
    )


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """A token alone, by Python's own way with bytes that are no text."""
    code = tokenizer.encoding.decode_single_token_bytes(token)
    return re.sub(r"\\x([0-9a-f]{2})", r"⟨\1⟩", code.decode("utf-8", "backslashreplace"))


@pytest.mark.parametrize("text", [" " * 2_000_000, "\n" * 1_500_000, "a" * 300_000, " " * 300 + "x", "\t" * 257 + "x"])
def test_endless_runs_are_encoded(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
