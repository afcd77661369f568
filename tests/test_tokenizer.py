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
    assert [tokenizer.text_of(t) for t in tokenizer.encode(" pay $62k in 2024")] == [
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
        (b"\xff\xfe", "ASCII"),
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


@pytest.mark.parametrize("text", [" " * 2_000_000, "\n" * 1_500_000, "a" * 300_000, " " * 300 + "x", "\t" * 257 + "x"])
def test_endless_runs_are_encoded(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
