"""The pages and the coloured text against their definitions: read back, they say what the arrays hold."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import random_model, random_tree
from hypothesis import given
from hypothesis import strategies as st

from minqstar.errors import visible
from minqstar.lab.credit import page
from minqstar.lab.treeview import MOST, tree_page
from minqstar.lm.tokenizer import Span
from minqstar.score import Scored
from minqstar.search.evaluator import ImplicitReward, Network, Table
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.search.tree import NONE
from minqstar.show import coloured, ground, html_tokens, shade, token_table
from minqstar.theory.mdp import solve
from minqstar.world.tldr import Exact

NASTY = "中文 😀 </script><b>\"'& \x1b[31m \u2028 \u202eabc\x00\x7f שלום\nhttp://x.y/" + "long" * 30


def parse(text: str) -> ElementTree.Element:
    """A page that is well-formed and needs nothing but itself."""
    root = ElementTree.fromstring(text)
    assert not {e.tag for e in root.iter()} & {"script", "link", "img", "iframe", "object", "svg"}
    assert not {name for e in root.iter() for name in e.attrib} & {"src", "href", "onclick", "onload"}
    style = "".join(e.text for e in root.iter("style"))
    assert "url(" not in style and "@import" not in style
    assert root.find("head/meta[@name='viewport']").get("content") == "width=device-width, initial-scale=1"
    assert "color-scheme: light dark" in style
    return root


class Letters:
    """A vocabulary of one character a token."""

    def spans(self, ids: list[int]) -> list[Span]:
        return [Span(i, i + 1, chr(0x4E00 + token)) for i, token in enumerate(ids)]


def lines_of(ol: ElementTree.Element, prefixes: list[str]) -> dict[str, tuple[float, str, bool]]:
    """Each line's whole text, from the prompt on: its number, what is said of it, whether it is bold."""
    found = {}
    assert len(ol) == len(prefixes)
    for li, prefix in zip(ol, prefixes, strict=True):
        text, of, *nested = li
        whole, below = prefix, {}
        for element in text:
            if element.tag == "sup":
                below |= {int(number): whole for number in element.text.split()}
            else:
                whole += element.text
        number, said = of[0].text, of[0].tail
        assert whole not in found and sorted(below) == list(range(1, len(below) + 1))
        found[whole] = (float(number), said, li.get("class") == "best")
        if below:
            found |= lines_of(nested[0], [below[i] for i in sorted(below)])
    return found


def leaves_of(tree, by_likelihood: bool) -> dict[str, tuple[float, int, int]]:
    """The same from the arrays, path by path: the number, and the edge that ends there."""
    found = {}

    def walk(node: int, text: str, total: float):
        for a in range(tree.token.shape[-1]):
            child = int(tree.child[0, node, a])
            if child == NONE and not tree.edge_visits[0, node, a]:
                continue
            path = text + chr(0x4E00 + int(tree.token[0, node, a]))
            value = total + float((tree.logp if by_likelihood else tree.step)[0, node, a])
            more = child != NONE and bool(((tree.child[0, child] != NONE) | (tree.edge_visits[0, child] > 0)).any())
            if more:
                walk(child, path, value)
            else:
                found[path] = (value, node, a)

    walk(0, "", 0.0)
    return found


searches = st.sampled_from(
    [
        MCTSConfig(budget=400),
        MCTSConfig(budget=5),
        MCTSConfig(budget=25, leaf="value"),
        MCTSConfig(budget=60, leaves=4, actions=2),
        MCTSConfig(budget=4, advance=True, leaf="value"),
    ]
)


@given(st.integers(0, 10**6), searches, st.sampled_from(["likelihood", "guided", "implicit"]), st.integers(1, 4))
def test_every_line_of_the_tree_page_says_what_the_arrays_hold(seed, config, step, limit):
    """Its text, what is compared of it, and finished, closed or open just where the search says so."""
    mdp, beta = random_tree(seed)
    evaluator, ends = Table(mdp, solve(mdp, beta), beta, 5, guided=step == "guided"), (3,)
    if step == "implicit":
        policy, reference = (random_model(seed + i, vocab_size=4) for i in range(2))
        evaluator = ImplicitReward(Network(policy), Network(reference), beta)
    (found,), tree = mcts(evaluator, [[1] if step == "implicit" else []], ends, limit, config)
    root = parse(tree_page(tree, 0, Letters(), "post", found))
    ol = root.find("body/ol")
    shown, truth = lines_of(ol, [""] * len(ol)), leaves_of(tree, step != "implicit")
    assert shown.keys() == truth.keys()
    for text, (number, said, best) in shown.items():
        value, node, a = truth[text]
        child, goal = tree.child[0, node, a], tree.best_goal[0]
        assert number == pytest.approx(value, abs=6e-4)
        assert ("● finished" in said) == (child == NONE)
        assert ("✕ closed" in said) == (child != NONE and tree.closed[0, node, a])
        assert ("○ open" in said) == (child != NONE and not tree.closed[0, node, a])
        is_best = text == "".join(chr(0x4E00 + t) for t in found.response.tokens) and not found.response.truncated
        assert ("the best" in said) == best == is_best
        if at_most := re.search(r"(\S+) at most", said):  # above the best response, and yet nothing behind it can be
            assert float(at_most[1]) == pytest.approx(value + tree.logp[0, child].max(), abs=6e-4)
            assert value > goal >= float(at_most[1]) - 6e-4
        if "✕ closed" in said and "length limit" not in said:
            assert value + tree.logp[0, child].max() <= goal + 1e-8
    title = root.find("body/h1").text
    assert ("No response ended" in title) == found.response.truncated
    assert ("is proved" in title) == found.proved


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 4))
def test_what_an_unproved_search_has_left_is_bounded(seed, budget, actions):
    """No response that it has not seen is likelier than the page says."""
    mdp, beta = random_tree(seed)
    table = Table(mdp, solve(mdp, beta), beta, 5)
    (best,), _ = mcts(table, [[]], (3,), 4, MCTSConfig(budget=1000))
    (found,), tree = mcts(table, [[]], (3,), 4, MCTSConfig(budget=budget, actions=actions))
    words = "".join(parse(tree_page(tree, 0, Letters(), "post", found)).itertext())
    bound = re.search(r"could still lead to a response of (\S+)\.", words)
    assert best.proved and (bound is None) == found.proved
    if bound:
        assert max(found.response.score, float(bound[1])) >= best.response.score - 6e-4
    else:
        assert found.response.score == pytest.approx(best.response.score)


def test_a_large_tree_is_drawn_in_part():
    unbounded = ImplicitReward(Network(random_model(1)), Network(random_model(2)), 1.0)  # nothing closes early
    (found,), tree = mcts(unbounded, [[3]], (21,), 9, MCTSConfig(budget=MOST + 100, leaf="value", leaves=100))
    text = tree_page(tree, 0, Letters(), "post", found)
    ol = parse(text).find("body/ol")
    said = [words for _, words, _ in lines_of(ol, [""] * len(ol)).values()]
    assert found.nodes > MOST and f"the {MOST:,} most visited are drawn" in text
    assert 0 < sum("goes on, not drawn" in words for words in said) < len(said)


def test_the_text_of_a_tree_is_escaped(tokenizer):
    """Characters that several tokens make are whole on a line, and what would act in a browser is only shown."""
    ids = [token for token in tokenizer.encode(NASTY) if token not in (tokenizer.eos, tokenizer.pad)][:60]
    mdp, beta = random_tree(0)
    (found,), tree = mcts(Table(mdp, solve(mdp, beta), beta, 5), [[]], (3,), 4, MCTSConfig(budget=1))
    spell = type("Spell", (), {"spans": lambda self, _: tokenizer.spans(ids[: len(_)])})
    text = tree_page(tree, 0, spell(), NASTY, found)
    root = parse(text)
    assert visible(NASTY.replace("\n", "↵\n"), keep="\n") in "".join(root.itertext())
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u2028\u202e]", text)


# ---- characters, colours, credit


def scored(tokenizer, text: str, exact: bool = False) -> Scored:
    ids = tokenizer.encode_response(text)
    generator = torch.Generator().manual_seed(len(ids))
    rewards, logps, ref_logps, r, advantage = torch.randn(5, len(ids), generator=generator, dtype=torch.float64)
    value = torch.cat((torch.randn(1, generator=generator, dtype=torch.float64), torch.zeros(len(ids))))
    known = Exact(r, value, r, advantage, ["fact"] * len(ids)) if exact else None
    return Scored(ids, tokenizer.texts_of(ids), tokenizer.spans(ids), rewards, logps, ref_logps, known)


def test_what_several_tokens_write_together_is_shown_with_the_sum_of_their_rewards(tokenizer):
    """A return is a sum, so nothing of it is lost; the table has every token."""
    credit = scored(tokenizer, "你好 😀 ok")
    plain = coloured(credit.spans, credit.rewards, colour=False).plain
    numbers = [float(number) for number in re.findall(r"\[([+-]\d\.\d\d)\]", plain)]
    assert re.sub(r"\[[+-]\d\.\d\d\]", "", plain) == "你好 😀 ok<|eos|>" and len(credit.ids) > len(credit.spans)
    assert sum(numbers) == pytest.approx(
        credit.rewards.sum().item(), abs=0.005 * len(numbers) + 0.05 * len(credit.spans)
    )
    (first, *_) = credit.spans
    assert (first.text, first.stop) == ("你", 3) and numbers[0] == pytest.approx(
        credit.rewards[:3].sum().item(), abs=0.006
    )
    assert f"'你': reward {credit.rewards[:3].sum():+.3f}, log pi {credit.logps[:3].sum():+.3f}" in credit.titles[0]
    table = token_table(credit.tokens, credit.rewards, None)
    assert table.row_count == len(credit.ids) and table.columns[1].footer == f"{credit.rewards.sum():+.2f}"


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


@given(st.floats(-20, 20))
def test_text_is_readable_on_every_colour(value):
    """WCAG's contrast of 4.5: black on a white page and in the terminal, white on a dark page."""
    *hue, depth = map(float, re.findall(r"[\d.]+", ground(value)))
    for page_colour, ink in ((255, 0), (18, 255)):
        over = tuple(c * depth + page_colour * (1 - depth) for c in hue)
        light, dark = sorted((luminance(over), luminance((ink,) * 3)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    terminal = tuple(bytes.fromhex(shade(value)[1:]))
    assert (luminance(terminal) + 0.05) / 0.05 >= 4.5
    assert terminal == pytest.approx([c * depth + 255 * (1 - depth) for c in hue], abs=1.5)


def test_the_credit_page_holds_every_token_and_its_sums(tokenizer):
    versions = {"right": scored(tokenizer, NASTY, exact=True), "<wrong>": scored(tokenizer, " two facts", exact=True)}
    text = page(NASTY, versions, {"right": set(), "<wrong>": {1}})
    root = parse(text)
    lines = [p for p in root.iter("p") if "strips" in p.get("class", "")]
    words = ["".join(p.itertext()) for p in root.iter("p")]
    tables = ["".join(pre.itertext()) for pre in root.iter("pre")]
    for name, line, table, credit in zip(versions, lines, tables, versions.values(), strict=True):
        assert name in [h2.text for h2 in root.iter("h2")]
        assert [s.text.replace("↵\n", "\n") if s.text else "".join(s.itertext()) for s in line] == [
            visible(span.text, keep="\n") for span in credit.spans
        ]
        for element, span in zip(line, credit.spans, strict=True):
            learned, exact = (
                of[span.start : span.stop].sum().item() for of in (credit.rewards, credit.exact.advantage)
            )
            assert f"background-color:{ground(learned)};border-bottom:.4em solid {ground(exact)}" in element.get(
                "style"
            )
            assert f"reward {learned:+.3f}" in element.get("title") and f"exact A* {exact:+.3f}" in element.get("title")
        R, V, A = credit.exact.reward.sum(), credit.exact.value[0], credit.exact.advantage.sum()
        sums = f"sum of r {R:+.2f} = V*(s_0) {V:+.2f} + sum of A* {A:+.2f}"
        assert any(f"learned rewards {credit.rewards.sum():+.2f}; {sums}" in said for said in words)
        assert len(table.strip().splitlines()) == len(credit.ids) + 3  # head, sums, their equation
    assert ["".join(u.itertext()) for u in root.iter("u")] == [versions["<wrong>"].spans[1].text.strip()]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u2028\u202e]", text)
    worst = min(sum(c.rewards[s.start : s.stop].tolist()) for c in versions.values() for s in c.spans)
    assert f"most: {worst:+.2f} (exactly" in root.find("body/h1").text


def test_elements_of_html_take_what_they_are_given():
    spans = [Span(0, 2, "ab"), Span(2, 3, " c")]
    first, second = html_tokens(spans, [0.5, -0.5, 0.0], ["one", 'two "2"'], marked={2})
    assert 'title="one">ab<' in first and "/ 0.00)" in first and "border" not in first
    assert second.endswith('title="two &quot;2&quot;"> <u>c</u></span>')
