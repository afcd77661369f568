"""The page in which the token MDP is walked, in a real browser; and the same page over a pair of models."""

import json
import re
import shutil
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import command
from hypothesis import given
from hypothesis import strategies as st
from test_borrowed import folders  # noqa: F401 (a fixture)
from test_pair import pair  # noqa: F401 (a fixture)

import minqstar
from minqstar.errors import UserError
from minqstar.lab.explore.__main__ import page_of
from minqstar.lab.explore.export import KINDS, Watched, answers_in, in_html, page_data, prefixes, searches_of
from minqstar.lab.explore.serve import MOST, server_of
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.theory.mdp import implicit_rewards, solve, tree
from minqstar.world.grammar import payments
from minqstar.world.posts import read_post
from minqstar.world.tldr import World

BROWSERS = [
    path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))
]
ODD = "</script><script>alert(1)</script> \"'&\u2028\u202e\x1b[31m<b>𝒜</b>\t中\n\nHuman: 🤖"


@pytest.fixture(scope="module")
def q(trained):
    return minqstar.load(trained / "runs/dpo")


@pytest.fixture(scope="module")
def row(trained):
    rows = minqstar.read_pairs(trained / "runs/dpo/held_out.jsonl")
    return next(row for row in rows if row["facts"]["scenario"] == "job")  # whose numbers have several tokens


@pytest.fixture(scope="module")
def world(q):
    return World(q.tokenizer)


@pytest.fixture(scope="module")
def data(q, row, world):
    return page_data(q, row["prompt"], answers_in(q, row, world), world) | {"live": False}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: the page is not opened")
    if not BROWSERS:
        pytest.skip("no Chromium on this machine: the page is not opened")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-background-networking"]
        opened = driver.chromium.launch(executable_path=BROWSERS[0], args=flags)
        yield opened
        opened.close()


@contextmanager
def opened(browser, where: str, width: int = 1280):
    """A page in the browser. Nothing else may be asked for, and nothing may go wrong in it."""
    page, asked, wrong = browser.new_page(viewport={"width": width, "height": 800}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.goto(where)
    yield page
    host = where.split("/")[2]
    assert wrong == [] and all(url.split("/")[2] == host for url in asked if not url.startswith("data:"))
    page.close()


@pytest.fixture
def file(tmp_path, data):
    (tmp_path / "explore.html").write_text(page_of(data), encoding="utf-8")
    return f"file://{tmp_path / 'explore.html'}"


def test_the_solver_of_the_page_is_that_of_the_theory(browser, file, row, world):
    """V*, Q*, A* in every state, at three betas, two settings of the rewards and two of the reference."""
    post = read_post(row["prompt"])
    automaton = world.automata[post.scenario]
    other = {"right": 1.1, "wrong": -2.3, "clause": -0.4, "filler": 0.7, "": 0.0}
    with opened(browser, file) as page:
        for beta in (0.01, 0.5, 20.0):
            for eps, paid in ((0.25, payments()), (0.6, other)):
                mdp = automaton.mdp([post], eps, paid)
                exact = solve(mdp, beta)
                script = """([eps, paid, beta]) => {
                    const found = solve(tableOf(world, { eps, paid }), beta);
                    return { V: [...found.V], Q: found.Q, A: found.advantage };
                }"""
                found = page.evaluate(script, [eps, paid, beta])
                assert torch.allclose(
                    torch.tensor(found["V"], dtype=torch.float64), exact.V[0], rtol=0, atol=1e-9 * scale(exact.V)
                )
                real = mdp.token >= 0
                for name, table in (("Q", exact.Q), ("A", implicit_rewards(mdp, exact, beta))):
                    flat = torch.tensor([v for line in found[name] for v in line], dtype=torch.float64)
                    assert torch.allclose(flat, table[0][real], rtol=0, atol=1e-9 * scale(flat)), name


def scale(values: torch.Tensor) -> float:
    return max(1.0, values.abs().max().item())


def test_a_wrong_fact_is_charged_where_it_is_decided(browser, file, row, world):
    """The tour walks into a wrong value: r is 0 there and A* is what the theory says; the sums close; back again."""
    post = read_post(row["prompt"])
    with opened(browser, file) as page:
        page.get_by_text("2. Take").click()
        said = page.inner_text("#here")
        assert "was paid r = 0.00" in said and "charges the token that decides" in said
        ids = page.evaluate("route.map((arc, t) => world.token[statesOf(route)[t]][arc])")
        exact = world.exact_all([post], [[*ids, *rest_of(world, post, ids)]])[0]
        t = len(ids) - 1
        assert exact.reward[t] == 0 and f"= {exact.advantage[t]:.2f}.".replace("-", "−") in said
        page.get_by_text("3. Go on").click()
        assert "this was charged already" in page.inner_text("#here")
        for line in page.locator("#sums tbody tr").all():
            left, right = line.locator("td").last.inner_text().replace("−", "-").replace(" ", "").split("=")
            assert eval(left) == pytest.approx(eval(right), abs=0.021), "rounded to two decimals"
        depth = page.locator("#path button").count()
        page.locator("#path button").nth(2).click()
        assert page.locator("#path button").count() == 2 < depth
        page.locator("#step button").first.focus()
        page.keyboard.press("Enter")  # a token is taken by the keyboard, and the next one is ready
        assert page.locator("#path button").count() == 3
        assert page.evaluate("document.activeElement.closest('#step') !== null")


def rest_of(world: World, post, ids: list[int]) -> list[int]:
    """Any way from a prefix to the end."""
    automaton = world.automata[post.scenario]
    states, arcs = automaton.walk(ids)
    s, rest = int(automaton.next[states[-1], arcs[-1]]), []
    while s < len(automaton.token):
        rest.append(int(automaton.token[s, 0]))
        s = int(automaton.next[s, 0])
    return rest


def test_knobs_move_what_is_exact_and_leave_what_was_learned(browser, file):
    with opened(browser, file) as page:
        page.get_by_text("1. Stand before it").click()
        before = page.locator("#step tbody tr").first.locator("td").all_inner_texts()
        page.evaluate("turn('wrong', -3)")
        A = "exact.advantage[statesOf(route).pop()]"
        assert page.evaluate(f"Math.min(...{A})") < -2
        assert "2. Take" in page.inner_text("#tour")
        page.evaluate("turn('wrong', 1)")  # nothing is charged, so nothing is told of a charge
        assert "2. Take" not in page.inner_text("#tour")
        page.evaluate("turn('beta', 100)")
        assert page.evaluate("Math.max(...exact.logPi[0].map((v, a) => Math.abs(v - exact.table.logRef[0][a])))") < 0.05
        page.get_by_role("button", name="reset the knobs").click()
        after = page.locator("#step tbody tr").first.locator("td").all_inner_texts()
        assert after == before and page.evaluate("alpha") == 1
        script = "Math.max(...learnedAt([], 0).mixed.map((v, a) => Math.abs(v - learnedAt([], 0)[name][a])))"
        for alpha, name in ((0, "ref"), (1, "pi")):  # Eq. 14: the reference alone, the policy itself
            page.evaluate(f"turn('alpha', {alpha})")
            assert page.evaluate(script.replace("[name]", f".{name}")) < 1e-3


def test_what_was_learned_is_what_the_networks_say(q, row, world, data):
    """At every prefix of the page the rewards are those of a plain scoring of some response that goes there."""
    learned, table = data["world"]["learned"], data["world"]["token"]
    ways = [[]]
    for parent, arc in list(zip(learned["parent"], learned["arc"], strict=True))[1:]:
        ways.append([*ways[parent], table[learned["state"][parent]][arc]])
    assert len(ways) == len(set(map(tuple, ways))) and set(learned["state"]) == set(range(len(table)))
    for n in range(1, len(ways), len(ways) // 12):
        (one,) = q.score(row["prompt"], q.tokenizer.decode(ways[n]))
        assert one.ids[:-1] == ways[n]
        logps = [learned[name][learned["parent"][n]][learned["arc"][n]] for name in ("pi", "ref")]
        assert logps == pytest.approx([one.logps[-2].item(), one.ref_logps[-2].item()], abs=2e-3)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 60))
def test_prefixes_are_the_likeliest(tokens, horizon, most):
    token, next = tree(tokens, horizon)
    logits = torch.randn(1, *token.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(most))
    log_ref = logits.masked_fill(token < 0, -torch.inf).log_softmax(-1)
    mdp = minqstar.TokenMDP(token, next, log_ref, torch.zeros_like(log_ref))
    nodes = prefixes(mdp, [], most)
    assert {state for _, _, state in nodes} == set(range(len(token)))  # a tree: one way to each state
    assert all(parent < n for n, (parent, _, _) in enumerate(nodes)) and len(nodes) == len(token)


def test_what_does_not_fit_the_context_is_said(tmp_path, trained, q, row, world, monkeypatch):
    """A prompt, a response, and the grammar's other summaries of a post whose own ones fit."""
    for prompt, chosen in (("a b " * 3000, " c"), ("a", " b" * 9000)):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": " d"}))
        done = command(tmp_path, "-m", "minqstar.lab.explore", str(trained / "runs/dpo"), "--data", "rows.jsonl")
        assert done.returncode == 1 and "tokens; the run's context" in done.stderr.splitlines()[-1]
    answers = answers_in(q, row, world)
    most = max(len(ids) for ids in q.group(row["prompt"], list(answers.values())).responses)
    small = replace(q.run.model.config, block_size=len(q.tokenizer.encode_prompt(row["prompt"])) + most)
    monkeypatch.setattr(q.run.model, "config", small)
    with pytest.raises(UserError, match=r"the page looks at summaries of .* tokens; the run's context"):
        page_data(q, row["prompt"], answers, world)


def test_searches_are_replayed_as_they_were(q, row):
    """The last frames hold what the searches found, and every prefix that they met, in the order of their calls."""
    found, given = searches_of(q, row["prompt"]), q.tokenizer.encode_prompt(row["prompt"])
    width = BeamConfig(width=5)
    best = beam_search(Watched(q.run.model), [given], q.tokenizer.ends, 64, width)[0][0]
    (tree_best,), tree_ = mcts(Watched(q.run.model), [given], q.tokenizer.ends, 64, MCTSConfig(budget=96))
    for name, answer in (("beam, five wide", best), ("tree search (MCTS)", tree_best.response)):
        last, path = found["runs"][name][-1], []
        n = last["best"]
        assert found["logp"][n] == pytest.approx(answer.score, abs=1e-3)
        while n > 0:
            path.insert(0, found["text"][n])
            n = found["parent"][n]
        assert len(path) == len(answer.tokens)
    frames = found["runs"]["tree search (MCTS)"]
    assert sum(len(frame["on"]) for frame in frames) == tree_best.nodes - 1 and frames[-1]["proved"] == tree_best.proved
    shut = [n for frame in frames for n in frame["shut"]]
    assert len(shut) == len(set(shut)) == int(tree_.closed[0, : tree_.made].all(-1).sum())
    assert all(len(frame["on"]) <= 5 for frame in found["runs"]["beam, five wide"])


def test_credit_of_whole_responses_in_every_channel(browser, file, q, row):
    with opened(browser, file) as page:
        scored = q.score(row["prompt"], [row["chosen"], row["rejected"]])
        margin = scored[0].total - scored[1].total
        total = page.evaluate("[0, 1].map((i) => learnedReward(data.responses[i]).reduce((a, b) => a + b, 0))")
        assert total == pytest.approx([one.total for one in scored], abs=5e-3)
        assert f"{margin:+.2f}.".replace("-", "−") in page.inner_text("#running")
        assert page.locator("#curve polyline").count() == 2
        for channel in page.locator("#choices select").first.locator("option").all_inner_texts():
            page.locator("#choices select").first.select_option(channel)
            for by in ("token", "word", "sentence"):
                page.locator("#choices select").nth(1).select_option(by)
                joined = "".join(page.locator("#texts .line").all_inner_texts())
                assert "".join(joined.split()) != ""
        page.locator("#choices select").first.select_option("exact A*")
        sums = "data.responses.map((of) => exactOf(of, (s, a) => exact.advantage[s][a]).reduce((a, b) => a + b, 0))"
        A = [one.exact.advantage.sum().item() for one in scored]
        assert page.evaluate(sums)[:2] == pytest.approx(A, abs=1e-9)
        page.locator("#texts .line button").first.click()
        assert "(taken)" in page.inner_text("#contrast")


def test_a_search_plays_until_it_is_stopped(browser, file):
    with opened(browser, file) as page:
        page.get_by_role("button", name="play").click()
        page.wait_for_timeout(700)
        page.get_by_role("button", name="stop").click()
        frame = page.evaluate("search.frame")
        page.wait_for_timeout(400)
        assert page.evaluate("search.frame") == frame > 0


def test_a_phone_a_long_text_and_odd_characters(browser, tmp_path, q, row):
    """A thousand tokens stay quick; text is text; nothing is wider than the phone."""
    answers = {"odd": ODD, "long": "word " * 150 + ODD}
    data = page_data(q, ODD, answers, None) | {"live": False}
    many = data["responses"][1]
    for name in ("ids", "tokens", "logp", "ref", "entropy", "kl", "rivals"):
        many[name] = (many[name] * 6)[:1000]
    (tmp_path / "odd.html").write_text(page_of(data), encoding="utf-8")
    text = (tmp_path / "odd.html").read_text()
    assert text.count("</script>") == 3 and "\u2028" not in text and "\u202e" not in text
    for width in (390, 1280):
        with opened(browser, f"file://{tmp_path / 'odd.html'}", width) as page:
            shown = page.inner_text("#prompt")
            assert "</script><script>alert(1)</script>" in shown and "\\u202e" in shown and "<b>𝒜</b>" in shown
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("#walk").is_hidden() and page.locator("#own").is_hidden()
            took = page.evaluate(
                "(() => { const begun = performance.now(); showCredit(); return performance.now() - begun; })()"
            )
            assert took < 2000, "milliseconds"


def test_without_javascript_the_page_says_what_is_missing(browser, file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file)
    assert "needs JavaScript" in page.inner_text("body")
    context.close()


def test_json_cannot_leave_its_script():
    text = in_html({"a": ODD, "b": "<!--<script>"})
    assert "<" not in text and json.loads(text)["a"] == ODD


@pytest.fixture(scope="module")
def server(q, data):
    with server_of(q, page_of(data | {"live": True}), 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def ask(where: str, body=None, **headers) -> tuple[int, bytes]:
    request = urllib.request.Request(where, body, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def test_a_text_is_scored_as_it_is_typed(browser, server, q, row):
    status, body = ask(f"{server}/score", json.dumps({"prompt": row["prompt"], "response": " Hello."}).encode())
    (one,) = q.score(row["prompt"], " Hello.")
    found = json.loads(body)
    assert status == 200 and found["logp"] == pytest.approx(one.logps.tolist(), abs=1e-3)
    with opened(browser, f"{server}/") as page:
        page.fill("#own-response", " Offer from Acme")
        page.get_by_text("yours: ").wait_for()
        assert "Offer from Acme" in "".join(page.locator("#texts .line").all_inner_texts())
        here = "walked(data.responses.find((of) => of.name === 'yours')).states.length"
        assert page.evaluate(here) > 0
        page.fill("#own-prompt", "Another post. TL;DR:")  # of which this page knows no exact value
        page.locator("#choices select").first.select_option("exact A*")
        page.get_by_text("yours: 0.00").wait_for()
        assert page.evaluate(here) == 0


BAD = {
    "no JSON": (b"{", {}, 400, "this is no JSON"),
    "deep JSON": (b"[" * 60_000, {}, 400, "this is no JSON"),
    "not a text": (b'{"prompt": 1, "response": "a"}', {}, 400, "want prompt and response, two texts"),
    "a list": (b"[]", {}, 400, "want prompt and response, two texts"),
    "no prompt": (b'{"prompt": "", "response": "a"}', {}, 400, "the prompt is empty"),
    "half a character": (b'{"prompt": "\\ud800", "response": "a"}', {}, 400, ""),
    "too long for the context": (json.dumps({"prompt": "a b " * 9000, "response": "a"}).encode(), {}, 400, "context"),
    "too large": (b" " * (MOST + 1), {}, 400, f"want at most {MOST} bytes"),
    "a length of many digits": (b"{}", {"Content-Length": "9" * 5000}, 400, f"want at most {MOST} bytes"),
    "another kind": (b"{}", {"Content-Type": "text/plain"}, 400, "Content-Type: application/json"),
    "another host": (b"{}", {"Host": "evil.example"}, 403, "ask for 127.0.0.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_one_line_and_the_server_goes_on(server, row, name):
    body, headers, status, words = BAD[name]
    found, answer = ask(f"{server}/score", body, **headers)
    assert found == status and words in json.loads(answer)["error"] and "\n" not in json.loads(answer)["error"]
    assert ask(f"{server}/")[0] == 200


@pytest.mark.parametrize("sent", [b"", b"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\n", None])
def test_who_hangs_up_leaves_no_trace(server, row, capfd, sent):
    body = json.dumps({"prompt": row["prompt"], "response": " Hi."}).encode()
    head = "POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
    before = threading.active_count()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", int(server.rsplit(":", 1)[1]))) as line:
            line.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body if sent is None else sent)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed with a reset
    while threading.active_count() > before:
        time.sleep(0.01)
    assert ask(f"{server}/")[0] == 200 and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("path", ["/etc/passwd", "/../pyproject.toml", "/%2e%2e/x", "//etc/passwd", "/score"])
def test_there_is_no_way_to_the_file_system(server, path):
    assert ask(server + path)[0] == 404


def test_a_port_that_is_taken_is_said(server, q):
    with pytest.raises(UserError, match=r"cannot serve at port \d+: .*; give another --port"):
        server_of(q, "", int(server.rsplit(":", 1)[1]))


def test_the_command_writes_a_page_of_a_run_and_of_a_pair(tmp_path, trained, pair):  # noqa: F811
    done = command(tmp_path, "-m", "minqstar.lab.explore", str(trained / "runs/dpo"), "--index", "1")
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "explore.html").read_text()
    assert '"world":{' in written and len(written) < 1e6 and "Walk the token MDP" in written
    rows = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "a b", "rejected": "c"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows))
    two = ("--policy", str(pair[0]), "--ref", str(pair[1]), "--data", "rows.jsonl", "--out", "pair.html")
    done = command(tmp_path, "-m", "minqstar.lab.explore", *two)
    assert done.returncode == 0, done.stderr
    assert '"world":null' in (tmp_path / "pair.html").read_text()
    for line, words in (
        ((*two, "--index", "1"), "--index 1: there are 1 rows only"),
        ((*two, "--index", str(10**20)), f"--index {10**20}: there are 1 rows only"),
        ((*two, "--out", "rows.jsonl"), "rows.jsonl"),
        ((*two, "--serve", "--port", "1"), "--out does not go with --serve"),
    ):
        done = command(tmp_path, "-m", "minqstar.lab.explore", *line)
        assert done.returncode in (1, 2) and words in done.stderr and done.stderr.count("\n") == 1


def test_the_committed_page_is_small_and_of_todays_code():
    page = Path(__file__).parent.parent / "data/results/explore.html"
    assert page.stat().st_size < 1e6
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.S)[1]
    assert page.read_text() == page_of(json.loads(found)), "made by other code: write it anew"
    assert json.loads(found)["world"] and set(KINDS) < json.loads(found)["world"]["knobs"]["paid"].keys()
