"""Other people's data: rows of every shape come out as prompt and answers, cut where the answers begin."""

import copy
import json
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minqstar.errors import UserError
from minqstar.training.formats import FORMATS, ROW_FIELDS, Rows, answers_of, as_pairs, detect, read_pairs

PAIR = ("chosen", "rejected")


def turn(role: str, content: str | None, **more) -> dict:
    return {"role": role, "content": content, **more}


def user(text: str) -> dict:
    return turn("user", text)


def says(text: str | None) -> dict:
    return turn("assistant", text)


def made(raw: dict) -> dict:
    """The row of one raw row."""
    return FORMATS[detect(raw, "f:1")](copy.deepcopy(raw), "f:1")


def written(path, *rows: dict):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


HI, SYSTEM = user("Hi"), turn("system", "Be kind.")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = turn("assistant", "", tool_calls=[CALL])
HUMAN, AI = "\n\nHuman: ", "\n\nAssistant: "


def hh(*texts: str) -> str:
    return "".join((HUMAN, AI)[i % 2] + text for i, text in enumerate(texts))


TRAPS = {  # raw row: the format, and prompt, chosen and rejected; or prompt and completion
    "answers that share words": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        ("implicit", "The sky is", " blue.", " black."),
    ),
    "one answer the prefix of the other": (
        {"chosen": "The sky is", "rejected": "The sky is blue"},
        ("implicit", "The sky", " is", " is blue"),
    ),
    "a column that would be part of the prompt when it is read again": (
        {"system": "Be kind.", "chosen": "The sky is blue.", "rejected": "The sky is black."},
        ("implicit", "The sky is", " blue.", " black."),
    ),
    "a space against a letter": ({"chosen": "It is a b", "rejected": "It is ab"}, ("implicit", "It is", " a b", " ab")),
    "answers that share words behind a mark": (
        {
            "chosen": "### Instruction:\nQ\n\n### Response:\nIt is 1",
            "rejected": "### Instruction:\nQ\n\n### Response:\nIt is",
        },
        ("implicit", "### Instruction:\nQ\n\n### Response:\n", "It is 1", "It is"),
    ),
    "a mark without a user's, again in the answers": (
        {"chosen": "Q\n\nAssistant: a\n\nAssistant: b", "rejected": "Q\n\nAssistant: a\n\nAssistant: c"},
        ("implicit", "Q\n\nAssistant:", " a\n\nAssistant: b", " a\n\nAssistant: c"),
    ),
    "an empty answer behind a mark": (
        {"chosen": "[INST] Q a [/INST]", "rejected": "[INST] Q a [/INST] x"},
        ("implicit", "[INST] Q a [/INST]", "", " x"),
    ),
    "dialogues with more or fewer lines before them": (
        {"chosen": hh("Hi", "Hello").lstrip("\n"), "rejected": "\n" + hh("Hi", "No")},
        ("hh", [HI], [says("Hello")], [says("No")]),
    ),
    "a mark of the assistant inside an answer": (
        {"chosen": hh("Hi", "A\n\nAssistant: B"), "rejected": hh("Hi", "A\n\nAssistant: C")},
        ("hh", [HI], [says("A\n\nAssistant: B")], [says("A\n\nAssistant: C")]),
    ),
    "dialogues of several turns, one space a turn, an empty answer": (
        {"chosen": hh("Hi", " A", "B", "C"), "rejected": hh("Hi", " A", "B", "").removesuffix(" ")},
        ("hh", [HI, says(" A"), user("B")], [says("C")], [says("")]),
    ),
    "dialogues that differ at the human's turn, and end in one": (
        {"chosen": hh("Hi", "A", "B", "C"), "rejected": hh("Hi", "A", "D", "E", "F").replace("\n", "\r\n")},
        ("hh", [HI], [says("A"), user("B"), says("C")], [says("A"), user("D"), says("E")]),
    ),
    "one conversation the prefix of the other": (
        {"chosen": [HI, says("A")], "rejected": [HI, says("A"), user("B"), says("C")]},
        ("implicit", [HI], [says("A")], [says("A"), user("B"), says("C")]),
    ),
    "shared turns, a tool's too, stay in the prompt": (
        {
            "system": "Be kind.",
            "chosen": [HI, CALLS, turn("tool", "2"), says("A")],
            "rejected": [HI, {"role": "assistant", "tool_calls": [CALL]}, turn("tool", "2"), says(None)],
        },
        ("implicit", [SYSTEM, HI, CALLS, turn("tool", "2")], [says("A")], [says("")]),
    ),
    "two turns of the assistant in a row are one response": (
        {"chosen": [HI, says("A"), says("B")], "rejected": [HI, says("A"), says("C"), user("D")]},
        ("implicit", [HI], [says("A"), says("B")], [says("A"), says("C")]),
    ),
    "messages that differ in what is no part of them": (
        {"chosen": [{**HI, "id": 1}, says("A")], "rejected": [{**HI, "id": 2}, says("B")]},
        ("implicit", [HI], [says("A")], [says("B")]),
    ),
    "strings": ({"prompt": "P A", "chosen": " A", "rejected": " A B"}, ("prompt", "P A", " A", " A B")),
    "strings under other names, from parquet": (
        {"prompt": None, "question": "P", "completion": None, "response": "", "chosen": None},
        ("prompt", "P", ""),
    ),
    "messages": (
        {"prompt": [SYSTEM, HI], "chosen": [says("A"), HI, says("B"), HI], "rejected": says("A")},
        ("prompt", [SYSTEM, HI], [says("A"), HI, says("B")], [says("A")]),
    ),
    "a tool call, from parquet, which fills in nulls": (
        {
            "prompt": [{**HI, "tool_calls": None}],
            "completion": [
                turn("assistant", None, name=None, tool_calls=[{**CALL, "id": None}]),
                turn("tool", "2", name="add"),
                says("3"),
            ],
        },
        ("prompt", [HI], [CALLS, turn("tool", "2", name="add"), says("3")]),
    ),
    "parts": (
        {"messages": [turn("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), says("A")]},
        ("messages", [HI], [says("A")]),
    ),
    "the prompt is repeated": (
        {
            "prompt": "Hi\n",
            "chosen": [SYSTEM, HI, says("A")],
            "rejected": [SYSTEM, HI, says("B")],
            "messages": [HI, says("A")],
        },
        ("prompt", [SYSTEM, HI], [says("A")], [says("B")]),
    ),
    "the prompt is repeated and goes on": (
        {
            "prompt": "Hi",
            "system": "Be kind.",
            "chosen": [HI, says("A"), HI, says("B")],
            "rejected": [HI, says("A"), HI, says("C")],
        },
        ("prompt", [SYSTEM, HI, says("A"), HI], [says("B")], [says("C")]),
    ),
    "the prompt of several turns is repeated by the only answer": (
        {"prompt": [HI, says("A"), user("B")], "completion": [HI, says("A"), user("B"), says("C")]},
        ("prompt", [HI, says("A"), user("B")], [says("C")]),
    ),
    "a system's message apart": (
        {"system": "Be kind.", "question": "Hi", "chosen": "A", "rejected": "B"},
        ("prompt", [SYSTEM, HI], [says("A")], [says("B")]),
    ),
    "an empty system's message": (
        {"system": "", "question": "Hi", "chosen": "A", "rejected": "B"},
        ("prompt", [HI], [says("A")], [says("B")]),
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "system": "Be kind.",
            "chosen": {"from": "gpt", "value": ""},
            "rejected": {"from": "gpt", "value": "No"},
        },
        ("sharegpt", [SYSTEM, HI], [says("")], [says("No")]),
    ),
    "ShareGPT with a tool": (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "3"},
                {"from": "human", "value": "Bye"},
            ],
            "system": "Be rude.",
        },
        ("sharegpt", [SYSTEM, HI], [CALLS, turn("tool", "2"), says("3")]),
    ),
    "a tool call that is none": (
        {"conversations": [HI, turn("function_call", '{"a": 1}'), turn("function_call", "[1]"), turn("gpt", "{")]},
        ("sharegpt", [HI], [says('{"a": 1}'), says("[1]"), says("{")]),
    ),
    "messages under the name conversations": (
        {"conversations": [HI, says("A")], "system": None},
        ("sharegpt", [HI], [says("A")]),
    ),
    "all turns behind the first": (
        {"prompt": "x", "messages": [says("Hello!"), HI, says("A"), HI, says("B"), HI]},
        ("messages", [says("Hello!"), HI], [says("A"), HI, says("B")]),
    ),
    "messages as the prompt of two": (
        {"messages": [HI], "chosen": says("A"), "rejected": says("B")},
        ("messages", [HI], [says("A")], [says("B")]),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is …"},
        ("alpaca", [user("Add.\n\n1 2")], [says("3")]),
    ),
    "alpaca without input": (
        {"instruction": "Hi", "input": "", "system": "Be kind.", "chosen": "A", "rejected": "A B"},
        ("alpaca", [SYSTEM, HI], [says("A")], [says("A B")]),
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_row_that_a_naive_splitter_gets_wrong(tmp_path, name):
    raw, (form, prompt, *answers) = TRAPS[name]
    rows = Rows(written(tmp_path / "f.jsonl", {**raw, "id": 7}, raw))
    first, second = rows
    assert rows.form == form
    kept = {"messages": raw["messages"]} if form == "prompt" and "messages" in raw else {}
    names = PAIR if len(answers) == 2 else ["completion"]
    assert second == {"prompt": prompt, **dict(zip(names, answers, strict=True)), **kept}
    assert first == {**second, "id": 7}
    assert list(Rows(tmp_path / "f.jsonl", form))[1] == second
    again = list(Rows(written(tmp_path / "again.jsonl", first, second)))
    assert again == [first, second], "what was written out is read as the same"


PAIRED = [name for name, (_, (_, _, *answers)) in TRAPS.items() if len(answers) == 2]


@pytest.mark.parametrize("name", PAIRED)
def test_a_ranking_is_cut_as_its_pairs_are(tmp_path, name):
    raw, (form, prompt, *answers) = TRAPS[name]
    rest = {key: value for key, value in raw.items() if key not in PAIR}
    for order in ((0, 1), (1, 0, 1), (0, 0, 1, 1)):
        ranking = {**rest, "ranked": [raw[PAIR[place]] for place in order]}
        rows = Rows(written(tmp_path / "f.jsonl", ranking))
        (row,) = rows
        kept = {"messages": raw["messages"]} if form == "prompt" and "messages" in raw else {}
        assert row == {"prompt": prompt, "ranked": [answers[place] for place in order], **kept} and rows.form == form
        assert list(Rows(written(tmp_path / "again.jsonl", row))) == [row]
        assert list(answers_of(row)) == [f"ranked {place + 1}" for place in range(len(order))]
        pairs = [
            {"prompt": prompt, **dict(zip(PAIR, two, strict=True)), **kept} for two in combinations(row["ranked"], 2)
        ]
        assert as_pairs([row]) == read_pairs(tmp_path / "f.jsonl") == pairs


BAD_RANKINGS = {
    "no list": ({"ranked": "a"}, "'ranked' must be a list of two responses or more, the best first, got str"),
    "one response": ({"ranked": ["a"]}, "'ranked' must be a list of two responses or more, the best first, got 1"),
    "a number": ({"ranked": 5}, "must be a list of two responses or more, the best first, got int"),
    "none": ({"ranked": []}, "must be a list of two responses or more, the best first, got 0"),
    "a tie": ({"ranked": [["a", "b"], "c"]}, "'ranked 1' is no response; of responses that tie leave out all but one"),
    "no response": ({"ranked": ["a", None]}, "'ranked 2' must be a string or a list of messages, got null"),
    "a pair too": ({"ranked": ["a", "b"], "rejected": "c"}, "both 'ranked' and 'rejected'; want one of them"),
}


@pytest.mark.parametrize("prompt", [{"prompt": "Q"}, {"instruction": "Q"}, {"messages": [HI]}, {}])
@pytest.mark.parametrize("name", BAD_RANKINGS)
def test_a_bad_ranking_is_one_clear_line(tmp_path, name, prompt):
    raw, words = BAD_RANKINGS[name]
    with pytest.raises(UserError) as error:
        list(Rows(written(tmp_path / "f.jsonl", prompt | {"ranked": ["a", "b"]} if prompt else raw, prompt | raw)))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_plain_text_and_what_is_known_of_a_file(tmp_path):
    rows = Rows(written(tmp_path / "f", {"text": "\ufeffa\r\n", "n": 1}, {"text": "b", "m": 2}, {"text": ""}))
    assert rows.form == "auto" and rows.used == rows.unused == set()
    assert list(rows) == [{"text": "a\n", "n": 1}, {"text": "b", "m": 2}, {"text": ""}]
    assert (rows.form, rows.used, rows.unused, rows.place) == ("text", {"text"}, {"n", "m"}, f"{tmp_path / 'f'}:3")
    assert next(iter(rows)) == {"text": "a\n", "n": 1} and rows.place.endswith("f:1"), "read again, row by row"
    nulls = dict.fromkeys(
        ["prompt", "conversations", "messages", "instruction"]
    )  # a table has every column in each row
    assert made(nulls | {"text": "t"}) == {"text": "t"} and detect(nulls | {"output": "o"}, "") == "prompt"
    pairs = {"system": "S", "question": "Q", "chosen": "a", "rejected": "b", "messages": 0}
    rows = Rows(written(tmp_path / "f", pairs))
    assert read_pairs(tmp_path / "f") == list(rows) and rows.unused == {"messages"}


words = st.text("abcdef", min_size=1, max_size=4)
texts = st.text("ab .\n:", max_size=8)
middle = st.lists(st.tuples(texts, texts), max_size=3)


@given(texts, middle, texts, texts, st.booleans())
def test_conversations_are_cut_where_trl_cuts_them(first, turns, chosen, rejected, system):
    trl = pytest.importorskip("trl.data_utils")
    prompt = [SYSTEM] * system + [m for a, b in turns for m in (user(a), says(b))] + [user(first)]
    raw = {"chosen": [*prompt, says(chosen)], "rejected": [*prompt, says(rejected)]}
    assert made(raw) == trl.extract_prompt(raw) == trl.maybe_extract_prompt({**raw, "prompt": "x"})
    assert made({**raw, "prompt": prompt[-1]["content"]}) == made(raw) | {"prompt": prompt}
    named = {name: [{"from": m["role"], "value": m["content"]} for m in raw[name]] for name in PAIR}
    assert made(named) == made(raw) and trl.maybe_convert_to_chatml(copy.deepcopy(named)) == raw
    for conversation in named.values():
        messages = trl.maybe_convert_to_chatml({"conversations": copy.deepcopy(conversation)})
        assert made({"conversations": conversation}) == made(messages)


@given(st.lists(words, min_size=1), words, words, texts, texts)
def test_strings_are_cut_where_trl_cuts_them(prompt, one, other, more, rest):
    trl = pytest.importorskip("trl.data_utils")
    assume(one[0] != other[0])
    raw = {"chosen": " ".join([*prompt, one]) + more, "rejected": " ".join([*prompt, other]) + rest}
    assert made(raw) == trl.extract_prompt(raw)


def test_where_trl_is_wrong():
    """Its common prefix ends at the first difference, and `- 1` reads a character that may be another string's end."""
    trl = pytest.importorskip("trl.data_utils")

    def both(raw: dict) -> tuple:
        return tuple(tuple(row.values()) for row in (trl.maybe_extract_prompt(copy.deepcopy(raw)), made(raw)))

    # an answer that is cut inside of a word is not tokenised as the model will write it
    theirs, ours = both({"chosen": "Is it blue", "rejected": "Is it black"})
    assert theirs == ("Is it bl", "ue", "ack") and ours == ("Is it", " blue", " black")
    # where one answer ends, the prompt ends in the middle of its last word
    theirs, ours = both({"chosen": "It is", "rejected": "It is so"})
    assert theirs == ("It i", "s", "s so") and ours == ("It", " is", " is so")
    # an answer that begins with the user's turn has the model trained on what the user says
    theirs, ours = both(
        {"chosen": [HI, says("A"), user("B"), says("C")], "rejected": [HI, says("A"), user("D"), says("E")]}
    )
    assert [m["role"] for m in theirs[1]] == ["user", "assistant"] and ours[0] == [HI]
    # a prompt that the answers repeat is seen twice
    theirs, ours = both({"prompt": [HI], "chosen": [HI, says("A")], "rejected": [HI, says("B")]})
    assert theirs[0] + theirs[1] == [HI, HI, says("A")] and ours == ([HI], [says("A")], [says("B")])
    # two strings that differ at once: the prompt is all but the last character, which is a space, of the first
    raw = {"chosen": "ab ", "rejected": "cd"}
    assert trl.extract_prompt(raw)["prompt"] == "ab"
    with pytest.raises(UserError, match="'prompt' is missing, and 'chosen' and 'rejected' do not begin alike"):
        made(raw)


TEMPLATES = {  # how turns of user and assistant are written, and how a turn ends
    "hh": (HUMAN, AI, ""),
    "user": ("\n\nUser:", "\n\nAssistant:", ""),
    "vicuna": ("USER: ", " ASSISTANT:", "</s>"),
    "chatml": ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
    "llama": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma": ("<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n"),
    "zephyr": ("<|user|>\n", "<|assistant|>\n", "</s>\n"),
    "mistral": ("[INST] ", " [/INST]", "</s>"),
    "alpaca": ("### Instruction:\n", "### Response:\n", "\n\n"),
}


@pytest.mark.parametrize("name", TEMPLATES)
@given(middle, texts, texts, texts, texts, st.booleans())
def test_prompts_inside_of_strings_are_found_again(name, turns, last, share, chosen, rejected, again):
    """Rendered turns are taken apart again, whatever the answers share, and though they hold the assistant's mark."""
    ask, answer, end = TEMPLATES[name]
    share += answer * again
    prompt = "".join(f"{ask}{a}{end}{answer}{b}{end}" for a, b in turns) + ask + last + end + answer
    row = made({"chosen": prompt + share + chosen, "rejected": prompt + share + rejected})
    if name == "hh":
        assert row["prompt"] == [m for a, b in turns for m in (user(a), says(b))] + [user(last)]
        assert [row[n][0]["content"] for n in PAIR] == [share + chosen, share + rejected]
    else:
        cut = len(prompt.rstrip(" ")) if name == "user" else len(prompt)
        assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt[:cut], share + chosen, share + rejected)


@given(texts, texts, texts)
def test_strings_are_cut_at_the_last_space_that_leaves_two_answers(prompt, chosen, rejected):
    """All places are tried: white space behind a word in both strings, and something else behind it."""
    both = prompt + chosen, prompt + rejected
    good = [
        k
        for k in range(1, min(map(len, both)))
        if both[0][:k] == both[1][:k] and not both[0][k - 1].isspace()
        if all(text[k].isspace() and text[k:].strip() for text in both)
    ]
    raw = dict(zip(PAIR, both, strict=True))
    if good:
        assert made(raw) == {"prompt": both[0][: good[-1]], **{name: raw[name][good[-1] :] for name in PAIR}}
    else:
        with pytest.raises(UserError, match="do not begin alike"):
            made(raw)


roles = st.sampled_from(["user", "assistant", "tool"])
talks = st.lists(st.builds(turn, roles, st.sampled_from("ab")), min_size=1, max_size=6)


def test_marks_that_an_answer_quotes_are_not_turns(tmp_path):
    """The first mark tells which marks are turns; others are text."""
    prompt, start = "User: write a prompt\n\nAssistant:", " Here:\n### Instruction:\nSay hi\n### Response:\nHi. "
    row = {"chosen": prompt + start + "Done A", "rejected": prompt + start + "Done B"}
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    (found,) = Rows(tmp_path / "f.jsonl")
    assert found == {"prompt": prompt, "chosen": start + "Done A", "rejected": start + "Done B"}


@given(talks, talks, talks)
def test_conversations_are_cut_at_the_last_place_where_both_answer(prompt, chosen, rejected):
    """All places are tried: the same messages before it, the last not the assistant's, and then the assistant's."""
    both = [list(talk) for talk in (prompt + chosen, prompt + rejected)]
    for talk in both:
        while talk and talk[-1]["role"] != "assistant":
            talk.pop()
    shortest = min(map(len, both))
    good = [
        k
        for k in range(1, shortest)
        if both[0][:k] == both[1][:k] and both[0][k - 1]["role"] != "assistant"
        if all(talk[k]["role"] == "assistant" for talk in both)
    ]
    raw = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    if good:
        assert made(raw) == {
            "prompt": both[0][: good[-1]],
            **{n: t[good[-1] :] for n, t in zip(PAIR, both, strict=True)},
        }
    else:
        with pytest.raises(UserError, match="share no turn before" if shortest else "no turn of the assistant"):
            made(raw)


odd = st.none() | st.integers(0, 1) | st.text("a \n:", max_size=3) | st.just([]) | st.just({})
names = st.sampled_from(["role", "from", "content", "value", "tool_calls", "name"])
said = st.sampled_from(["user", "human", "assistant", "gpt", "system", "tool", "function_call"])
spoken = st.builds(turn, said, st.text("ab", max_size=2))
asked = spoken.filter(lambda m: m["role"] != "assistant")
talk = st.tuples(st.lists(asked, max_size=2), st.lists(spoken, max_size=3)).map(lambda of: [*of[0], *of[1], says("c")])
messages = spoken | st.dictionaries(names, said | odd, max_size=3)
text = st.text("a \n:", min_size=1)
values = st.sampled_from([*[talk] * 8, *[text] * 4, st.lists(messages), messages, odd]).flatmap(lambda kind: kind)
columns = st.sampled_from(
    [
        PAIR,
        ("prompt", *PAIR),
        ("question", *PAIR, "system"),
        ("conversations", *PAIR),
        ("prompt", "completion", "text"),
        ("messages", "system"),
        ("conversations",),
        ("instruction", "input", "output"),
        ROW_FIELDS,
    ]
)
raws = columns.flatmap(lambda some: st.fixed_dictionaries(dict.fromkeys(some, values)))


@settings(max_examples=max(400, settings.default.max_examples))
@given(raws, st.sampled_from([*[None] * 20, *FORMATS]))
def test_whatever_a_row_holds_it_is_of_our_shape_or_refused(raw, form):
    try:
        row = FORMATS[form or detect(raw, "f:1")](copy.deepcopy(raw), "f:1")
    except UserError as e:
        assert str(e).startswith("f:1: ") and "\n" not in str(e)
        return
    assert set(row) in ({"prompt", *PAIR}, {"prompt", "completion"}, {"text"})
    if any(isinstance(value, str) for value in row.values()):
        assert all(isinstance(value, str) for value in row.values())
        return
    for name, turns in row.items():
        assert turns and all(turn["role"] in {"system", "user", "assistant", "tool"} for turn in turns)
        assert all(isinstance(turn["content"], str) for turn in turns)
        assert name == "prompt" or turns[0]["role"] == turns[-1]["role"] == "assistant"
    assert FORMATS[detect(row, "f:1")](copy.deepcopy(row), "f:1") == row


GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
MESSAGES = {"prompt": [HI], "completion": [says("A")]}
BAD = {  # rows, and what is said of the last
    "pairs then text": (
        [GOOD, {"text": "t"}],
        r"mixed shapes: this row is of format text in strings, those before it are prompt in strings; split",
    ),
    "strings then messages": (
        [GOOD, MESSAGES],
        "mixed shapes: this row is of format prompt in messages, those before it are prompt in strings",
    ),
    "explicit then implicit": ([GOOD, {"chosen": "a b", "rejected": "a c"}], "mixed shapes: .*implicit in strings"),
    "no format": (
        [{"b": 1, "a": 2}],
        "no format fits the columns a, b; want prompt or messages with chosen and rejected",
    ),
    "no columns": ([{}], r"no format fits the columns \(none\); want"),
    "no answer": (
        [{"prompt": "p"}],
        "the field 'chosen' is missing; the response of a row that has only one is called 'completion'",
    ),
    "one answer": ([{"prompt": "p", "rejected": "r"}], "the field 'chosen' is missing$"),
    "one of two": ([{"conversations": [HI], "chosen": says("A")}], "the field 'rejected' is missing$"),
    "null": (
        [{"prompt": "p", "chosen": "c", "rejected": None}],
        "'rejected' must be a string or a list of messages, got null",
    ),
    "a number": ([{"prompt": "p", "completion": 3}], "'completion' must be a string or a list of messages, got int"),
    "no output": ([{"instruction": "i"}], "'chosen' is missing; .* is called 'output'"),
    "only an answer": ([{"completion": "c"}], "the field 'prompt' is missing"),
    "nothing in common": (
        [{"chosen": "a b", "rejected": "c d"}],
        "'prompt' is missing, and 'chosen' and 'rejected' do not begin alike",
    ),
    "no assistant": ([MESSAGES, {"messages": [HI]}], "no turn of the assistant$"),
    "no assistant in a pair": (
        [{"chosen": [HI, says("A")], "rejected": [HI]}],
        "no turn of the assistant in 'rejected'",
    ),
    "no assistant in an answer": ([{"prompt": [HI], "completion": [turn("tool", "A")]}], "no turn of the assistant"),
    "only the assistant": ([{"messages": [says("A")]}], "no prompt: the assistant speaks first"),
    "another user's turn": (
        [{"prompt": "Hi", "chosen": [user("x"), says("A")], "rejected": says("B")}],
        "'chosen' begins with a user's turn, but not with the one that the prompt ends in",
    ),
    "no messages": ([{"messages": []}], "'messages' is an empty list of messages"),
    "an empty prompt of messages": ([{"prompt": [], "completion": "c"}], "'prompt' is an empty list of messages"),
    "no message": ([{"messages": ["Hi"]}], "'messages', message 1: want an object with role and content, got str"),
    "unknown role": (
        [{"messages": [HI, turn("bot", "A")]}],
        "'messages', message 2: unknown role 'bot'; known are system, .*gpt",
    ),
    "no role": ([{"messages": [{"content": "A"}]}], "message 1: unknown role None"),
    "a role of lists": ([{"messages": [turn(["user"], "A")]}], r"message 1: unknown role \['user'\]"),
    "no content": ([{"messages": [HI, {"role": "assistant"}]}], "message 2: the field 'content' is missing"),
    "a picture": (
        [{"messages": [turn("user", [{"type": "image"}]), says("A")]}],
        "message 1: holds a part that is not text",
    ),
    "content of another type": (
        [{"messages": [HI, turn("assistant", 3)]}],
        "message 2: its content must be a string, got int",
    ),
    "half a character": (
        [{"messages": [HI, says("\ud800")]}],
        "'messages', message 2 is not UTF-8 text: it holds half",
    ),
    "half a character in a call": (
        [{"messages": [HI, {**says(""), "tool_calls": ["\ud800"]}]}],
        "message 2 is not UTF-8 text",
    ),
    "text of messages": ([{"instruction": [HI], "output": "o"}], "'instruction' must be a string, got messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_in_one_line(tmp_path, name):
    rows, message = BAD[name]
    file = written(tmp_path / "f.jsonl", *rows)
    for path, place in ((file, f"f.jsonl:{len(rows)}"), (tmp_path / "f.json", f"f.json, row {len(rows)}")):
        path.write_text(json.dumps(rows) if path.suffix == ".json" else path.read_text())
        with pytest.raises(UserError, match=f"{place}: .*{message}") as error:
            list(Rows(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("text", GOOD, r"f:1: the field 'text' is missing \(read as text\)"),
        ("hh", {"chosen": "a b", "rejected": "a c"}, r"f:1: a dialogue must begin with 'Human:' \(read as hh\)"),
        ("hh", GOOD | {"chosen": [HI]}, r"f:1: 'chosen' must be a string, got messages \(read as hh\)"),
        ("sharegpt", MESSAGES, r"f:1: the field 'conversations' is missing \(read as sharegpt\)"),
        ("alpaca", MESSAGES, r"f:1: the field 'instruction' is missing \(read as alpaca\)"),
    ],
)
def test_a_forced_format_that_does_not_fit(tmp_path, form, row, message):
    with pytest.raises(UserError, match=message):
        list(Rows(written(tmp_path / "f", row), form))


def test_a_forced_format_wins(tmp_path):
    file = written(tmp_path / "f", {"chosen": hh("Hi", "A"), "rejected": hh("Hi", "B"), "text": "t"})
    assert next(iter(Rows(file, "text"))) == {"text": "t"}, "columns named as parts of a row are not taken for parts"
    assert next(iter(Rows(file, "implicit"))) == {"prompt": hh("Hi", "").rstrip(" "), "chosen": " A", "rejected": " B"}
    with pytest.raises(
        UserError, match="the format 'csv' is not known; known are auto, prompt, implicit, hh, sharegpt"
    ):
        Rows(file, "csv")
