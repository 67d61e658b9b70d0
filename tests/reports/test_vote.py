"""The blind vote of the html page, played through in a browser, and what compare makes of its file."""

import json
import re
import shutil
import socket
import subprocess
import urllib.request
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from test_comparison import SCHEMA, arithmetic, prompts
from test_page import CHROMIUM

from llama2tut.config.votes import digest, read_votes
from llama2tut.errors import DataError
from llama2tut.reports import exports, markdown, page, table

DRIVER = shutil.which("chromedriver")
CONNECT = socket.socket.connect
SPACE = " "


def asked(rows=10):
    """So many rows with two answers each, and one on which both say the same."""
    kept = arithmetic().rows[1]
    differing = [replace(kept, prompt=f"Row {n}", answers=(f"plain {n}", f"tuned <b>{n}</b>")) for n in range(rows)]
    return replace(arithmetic(), rows=(*differing, kept))


def saved(path, comparison, choices, **changes):
    """A file of votes as the page saves it."""
    path.write_text(json.dumps({"llama2tut": "votes", "digests": comparison.to_dict()["digests"], "votes": choices}
                               | changes), "utf-8")
    return path


def test_votes_stand_in_every_form_with_the_sign_test(tmp_path):
    choices = {str(row): "finetuned" for row in range(1, 9)} | {"9": "base", "10": "tie"}
    comparison = asked().with_votes(read_votes(saved(tmp_path / "votes.json", asked(), choices)))
    found = json.loads(exports.json(comparison))
    jsonschema.validate(found, SCHEMA)
    it = found["preference"]
    assert (it["column"], it["against"], it["wins"], it["losses"], it["ties"]) == ("finetuned", "base", 8, 1, 1)
    assert it["p"] == 2 * (1 + 9) / 2**9
    assert it["share"] == 8 / 9
    assert it["interval"] == pytest.approx([0.565, 0.980], abs=5e-4)
    assert it["verdict"] == "better"
    for text in (table.table(comparison, width=400), markdown.markdown(comparison), page.page(comparison)):
        assert re.search(r"chosen on 8 rows, base on 1, neither on 1, 88\.9 % \(56\.5 to 98\.0\), "
                         r"sign test p = 0\.039, better beyond chance", text)
    assert "chosen on" not in table.table(asked(), width=400)
    assert json.loads(exports.json(asked()))["preference"] is None


@pytest.mark.parametrize(("choices", "p", "share"), [
    ({"1": "finetuned", "2": "finetuned", "3": "finetuned", "4": "finetuned", "5": "finetuned"}, 2 / 32, 1.0),
    ({"1": "finetuned", "2": "base"}, 1.0, 0.5), ({"1": "tie"}, 1.0, None)])
def test_few_votes_tell_nothing_yet(tmp_path, choices, p, share):
    comparison = asked().with_votes(read_votes(saved(tmp_path / "votes.json", asked(), choices)))
    found = json.loads(exports.json(comparison))
    jsonschema.validate(found, SCHEMA)
    it = found["preference"]
    assert (it["p"], it["share"], it["verdict"]) == (p, share, "can't tell yet")
    low, high = it["interval"]
    assert low is None or low <= 0.5 <= high
    assert "can't tell yet" in markdown.markdown(comparison)


def test_prompts_without_references_can_be_voted_on(tmp_path):
    comparison = prompts()
    votes = read_votes(saved(tmp_path / "votes.json", comparison, {"2": "finetuned"}))
    assert json.loads(exports.json(comparison.with_votes(votes)))["preference"]["wins"] == 1


@pytest.mark.parametrize("changes", [
    {"llama2tut": "run"}, {"digests": {"prompts": "x"}}, {"digests": 3}, {"votes": {}}, {"votes": ["base"]},
    {"votes": {"0": "base"}}, {"votes": {"x": "base"}}, {"votes": {"1": "other"}}, {"votes": {"1": None}},
    {"votes": {"1": ["base"]}}, {"digests": {"prompts": "x", "answers": "y"}},
    {"digests": {"prompts": "x", "answers": {"base": "y"}}},
    {"digests": {"prompts": "x", "answers": {"base": 1, "finetuned": 2}}}])
def test_a_file_that_is_no_votes_is_refused(tmp_path, changes):
    with pytest.raises(DataError, match="--votes "):
        read_votes(saved(tmp_path / "votes.json", asked(), {"1": "base"}, **changes))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"NaN",
                                  b'{"llama2tut": "votes", "votes": {"1": "base", "1": "tie"}}'])
def test_what_is_no_json_object_is_refused(tmp_path, data):
    (tmp_path / "votes.json").write_bytes(data)
    with pytest.raises(DataError, match="--votes "):
        read_votes(tmp_path / "votes.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_votes(tmp_path)


def test_votes_on_other_rows_or_answers_are_refused(tmp_path):
    comparison = asked()
    votes = read_votes(saved(tmp_path / "votes.json", comparison, {"1": "base"}))
    swapped = tuple(replace(row, answers=row.answers[::-1]) for row in comparison.rows)
    for other in (replace(comparison, rows=comparison.rows[:-1]), replace(comparison, rows=swapped)):
        with pytest.raises(DataError, match="--votes "):
            other.with_votes(votes)
    beyond = read_votes(saved(tmp_path / "votes.json", comparison, {"12": "base"}))
    with pytest.raises(DataError, match="--votes "):
        comparison.with_votes(beyond)
    assert digest(["a", "b"]) != digest(["a\nb"])


def three(rows=6):
    """The base model and two adapters, of which the second one answers otherwise than the first."""
    kept = arithmetic(2)
    return replace(kept, rows=tuple(replace(kept.rows[1], prompt=f"Row {n}", answers=(
        f"plain {n}", f"tuned {n}", f"other {n}" if n % 2 else f"tuned {n}")) for n in range(rows)))


def test_any_two_columns_can_be_voted_on(tmp_path):
    comparison = three()
    digests = comparison.to_dict()["digests"]
    jsonschema.validate(json.loads(exports.json(comparison)), SCHEMA)
    pair = {name: digests["answers"][name] for name in ("finetuned_2", "finetuned")}
    choices = {"2": "finetuned_2", "4": "finetuned_2", "6": "finetuned"}
    votes = read_votes(saved(tmp_path / "votes.json", comparison, choices, digests=digests | {"answers": pair}))
    it = comparison.with_votes(votes).preference
    assert (it.column, it.against, it.wins, it.losses, it.ties) == ("finetuned_2", "finetuned", 2, 1, 0)
    assert it.p == 1.0
    less = replace(comparison, columns=comparison.columns[:2])
    with pytest.raises(DataError, match="of other answers than finetuned_2 has"):
        less.with_votes(votes)
    with pytest.raises(DataError, match="is no vote"):
        read_votes(saved(tmp_path / "votes.json", comparison, {"2": "base"}, digests=digests | {"answers": pair}))


class Browser:
    """Chromium with real keys and clicks, by the WebDriver protocol."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(re.search(r"on port (\d+)", line)[1] for line in self.driver.stdout if "started succ" in line)
        self.url = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "prefs": {"download.default_directory": str(folder)},
                   "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                            "--disable-background-networking", f"--user-data-dir={folder / 'profile'}",
                            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", *flags]}
        self.url += "/" + self.ask("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})["sessionId"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ask("", method="DELETE")
        self.driver.terminate()
        self.driver.wait()

    def ask(self, path, body=None, method="POST"):
        request = urllib.request.Request(self.url + path, None if method == "GET" else json.dumps(body or {}).encode(),
                                         {"Content-Type": "application/json"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script, *args):
        return self.ask("/execute/sync", {"script": script, "args": args})

    def element(self, css):
        return f"/element/{next(iter(self.ask('/element', {'using': 'css selector', 'value': css}).values()))}"

    def click(self, css):
        self.ask(f"{self.element(css)}/click")

    def press(self, key):
        self.ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": [
            {"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]}]})

    def tap(self, css):
        x, y = self.run("const box = document.querySelector(arguments[0]).getBoundingClientRect();"
                        "return [Math.round(box.x + box.width / 2), Math.round(box.y + box.height / 2)]", css)
        self.ask("/actions", {"actions": [{"type": "pointer", "id": "finger", "parameters": {"pointerType": "touch"},
                                           "actions": [{"type": "pointerMove", "duration": 0, "x": x, "y": y},
                                                       {"type": "pointerDown", "button": 0},
                                                       {"type": "pointerUp", "button": 0}]}]})

    def text(self, css):
        return self.run("return document.querySelector(arguments[0]).textContent", css)

    def answers(self):
        return self.run("return [...document.querySelectorAll('.pair .text')].map((text) => text.textContent)")


def vote(browser, wanted, touch=False):
    """Choose the answer of one column, by a key or by a finger."""
    at = next(at for at, text in enumerate(browser.answers(), 1) if text.startswith(wanted))
    browser.tap(f".choices [value='{at}']") if touch else browser.press(str(at))


@pytest.fixture
def ballot(tmp_path, monkeypatch):
    """Opens a comparison's page in Chromium, at its vote: comparison -> browser."""
    if not DRIVER or not Path(CHROMIUM).exists():
        pytest.skip("needs Chromium and its driver")
    monkeypatch.setattr(socket.socket, "connect", CONNECT)  # to the driver, on loopback
    with Browser(tmp_path) as browser:
        def show(comparison):
            file = tmp_path / "page.html"
            file.write_text(page.page(comparison), "utf-8")
            browser.ask("/url", {"url": file.as_uri()})
            browser.click("#vote")
            return browser

        yield show


@pytest.mark.browser
def test_a_vote_is_played_through_saved_and_counted_alike(ballot, tmp_path):
    comparison = asked()
    browser = ballot(comparison)
    assert browser.text("#voted") == "0 of 10"
    sides, seen = set(), set()
    for n in range(8):
        first, second = browser.answers()
        assert {first[:5], second[:5]} == {"plain", "tuned"}
        sides.add(first[:5])
        seen.add(browser.text("#asked"))
        vote(browser, "tuned", touch=n % 2 == 1)
    browser.press(SPACE)  # a button was touched last: this must not be its click
    assert browser.text("#voted") == "9 of 10"
    browser.ask("/refresh")  # a phone that let go of the page
    browser.click("#vote")
    assert browser.text("#voted") == "9 of 10"
    browser.press("x")
    vote(browser, "tuned")
    browser.click("#take-back")
    vote(browser, "plain")
    assert len(seen) == 8
    said = browser.text("#result")
    browser.click("#save-votes")
    votes_file = tmp_path / "votes.json"
    browser.run("return new Promise((done) => setTimeout(done, 500))")
    counted = comparison.with_votes(read_votes(votes_file))
    it = counted.preference
    assert (it.wins, it.losses, it.ties) == (8, 1, 1)
    assert it.p == 2 * (1 + 9) / 2**9 == 0.0390625
    assert said.removesuffix(".") in markdown.markdown(counted)
    assert "p = 0.039, better beyond chance" in said

    browser.run("localStorage.clear()")
    browser.ask("/refresh")
    browser.click("#vote")
    assert browser.text("#voted") == "0 of 10"
    other = saved(tmp_path / "other.json", arithmetic(), {"1": "base"})
    browser.ask(f"{browser.element('#votes-file')}/value", {"text": str(other)})
    browser.run("return new Promise((done) => setTimeout(done, 300))")
    assert browser.text("#voted") == "0 of 10"
    assert browser.text("#vote-message").startswith("Nothing was loaded")
    browser.ask(f"{browser.element('#votes-file')}/value", {"text": str(votes_file)})
    browser.run("return new Promise((done) => setTimeout(done, 300))")
    assert browser.text("#voted") == "10 of 10"
    assert browser.text("#result") == said


@pytest.mark.browser
def test_the_page_lets_one_choose_who_stands_side_by_side(ballot, tmp_path):
    comparison = three()
    browser = ballot(comparison)
    vote(browser, "tuned")
    assert browser.text("#voted") == "1 of 6"
    browser.click("#pair option:last-child")
    assert browser.text("#voted") == "0 of 3"  # on the other rows both adapters say the same
    for _ in range(3):
        vote(browser, "other")
    said = browser.text("#result")
    browser.click("#save-votes")
    browser.run("return new Promise((done) => setTimeout(done, 500))")
    counted = comparison.with_votes(read_votes(tmp_path / "votes.json"))
    assert (counted.preference.column, counted.preference.against) == ("finetuned_2", "finetuned")
    assert counted.preference.p == 2 / 2**3
    assert said.removesuffix(".") in table.table(counted, width=400)
    browser.click("#pair option:first-child")
    assert browser.text("#voted") == "1 of 6"
    browser.ask(f"{browser.element('#votes-file')}/value", {"text": str(tmp_path / "votes.json")})
    browser.run("return new Promise((done) => setTimeout(done, 300))")
    assert browser.text("#voted") == "3 of 3"
    assert browser.run("return document.querySelector('#pair').value") == "finetuned_2 against finetuned"
