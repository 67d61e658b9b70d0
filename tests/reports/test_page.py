"""The comparison as an html page, as text and in a browser."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path

import pytest
from test_comparison import PICTURE, SAMSUM, arithmetic, compared, dialogues, prompts

from llama2tut.reports import exports
from llama2tut.reports.page import page
from llama2tut.tasks.task import ARITHMETIC

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
HOSTILE = ["<script>document.title = 'owned'</script>", "</script><script>document.title = 'owned'</script>",
           "<img src=http://tracker.invalid/a.png onerror=\"document.title = 'owned'\">", "]]> --> <!--",
           "{{data}} {{rows}}", "<style>@import url(http://tracker.invalid/b.css)</style>",
           "' onmouseover=alert(1) \" autofocus onfocus=alert(1)",
           "\u202egnp.exe \u2066\x1b[31mred\x1b[0m\x07\x00", "&lt;b&gt;", "<svg><a xlink:href=javascript:alert(1)>x"]


class Outline(HTMLParser):
    """What a page holds once parsed: its tags, their attributes, and the text of each article."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.articles = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "article":
            self.articles.append("")

    def handle_data(self, data):
        if self.articles:
            self.articles[-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def hostile():
    comparison = dialogues(2)
    rows = tuple(replace(comparison.rows[0], prompt=text, reference=f"the {text}", answers=(text, text[::-1], text))
                 for text in HOSTILE)
    columns = tuple(replace(column, source=text) for column, text in zip(comparison.columns, HOSTILE, strict=False))
    return replace(comparison, columns=columns, task=HOSTILE[1], rows=rows,
                   settings={HOSTILE[1]: HOSTILE[2]}, recipe={"set": {HOSTILE[0]: [HOSTILE[1]]}})


def test_scores_and_verdict_stand_at_the_top():
    text = page(arithmetic())
    assert "<b>66.7 %</b> <small> (20.8 to 93.9)</small>" in text
    assert "finetuned against base: exact match +33.3 points (" in text
    assert "too few rows to tell." in text
    assert "1,234.5 tokens/s" in text
    assert '<rect class="fill" y="5" width="66.67%"' in text


def luminance(color):
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = (int(digits[at:at + 2], 16) / 255 for at in (0, 2, 4))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_all_text_stands_out_as_WCAG_asks(scheme):
    colors = dict(re.findall(r"--(\w+): (#\w+)", re.findall(r":root \{(.*?)\}", page(arithmetic()), re.DOTALL)[scheme]))
    pairs = [*product(("ink", "soft", "faint", "right", "wrong", "tuned"), ("paper", "card")), ("ink", "mark"),
             ("paper", "ink")]
    for text, ground in pairs:
        dark, light = sorted(luminance(colors[name]) for name in (text, ground))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


def test_no_heading_skips_a_level():
    levels = [int(tag[1]) for tag, _ in Outline(page(dialogues(2))).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))


def test_every_row_reads_without_javascript():
    outline = Outline(page(arithmetic()))
    kinds = [attrs["data-is"] for attrs in outline.all("article")]
    assert kinds == ["all right changed", "all right", "all wrong changed"]
    for row, shown in zip(arithmetic().rows, outline.articles, strict=True):
        for text in (row.prompt.strip(), row.reference, *row.answers):
            assert text in shown
    assert "✗ wrong" in outline.articles[0]
    assert all("hidden" not in attrs for attrs in outline.all("article"))


def test_words_that_differ_from_the_reference_are_marked():
    marks = re.findall("<mark>(.*?)</mark>", page(dialogues()))
    assert marks == ["have", "Dee", "again"]


def test_characters_that_differ_are_marked_where_there_are_no_spaces():
    chat = [("小明：几点？", "小明七点去公园。", "小明八点去学校", "小明七点去公园")]
    assert re.findall("<mark>(.*?)</mark>", page(compared(SAMSUM, chat))) == ["八", "学校"]


def test_the_pages_language_is_that_of_its_rows():
    chat = [("小明：几点？", "小明七点去公园。", "Sure", "小明七点去公园")]
    assert '<html lang="zh">' in page(compared(SAMSUM, chat))
    assert '<html lang="en">' in page(dialogues())


def test_a_wrong_number_is_marked_and_its_working_is_not():
    assert re.findall("<mark>(.*?)</mark>", page(arithmetic()), re.DOTALL) == [
        "40", "The answer is 1.\n\nExplanation: subtract", "1"]


@pytest.mark.parametrize(("answer", "ignore", "marks"), [
    ("- Happy\n- Angry", (), ["Happy\n- Angry"]),
    ("- Happy", (), ["Happy"]),
    ("- Happy\n- Angry", ("case",), ["Angry"]),
    ("I am happy", (), ["I am"]),
    ("The customer is angry", (), ["The customer is angry"]),
    ("happy!", (), ["!"]),
])
def test_every_word_of_a_wrong_answer_that_the_reference_has_not_is_marked(answer, ignore, marks):
    task = replace(SAMSUM, metric="exact_match", ignore=ignore)
    comparison = compared(task, [("Great!", "happy", answer, "happy")])
    comparison = replace(comparison, settings={"ignored": ", ".join(ignore) or None})
    assert re.findall("<mark>(.*?)</mark>", page(comparison), re.DOTALL) == marks


def test_the_frame_that_all_prompts_share_recedes():
    text = page(arithmetic())
    assert text.count('<span class="frame">Calculate the following expression:</span>\nWhat is 19-59?') == 1
    assert text.count('\n<span class="frame">---\nAnswer:</span>') == 3


def test_the_runs_own_picture_and_the_recipe():
    text = page(arithmetic())
    shown = next(attrs for attrs in Outline(text).all("img"))
    assert base64.b64decode(shown["src"].removeprefix("data:image/png;base64,")) == PICTURE
    assert "loss" in shown["alt"]
    assert "<div><dt>set.gradient_clipping</dt><dd>True</dd></div>" in text
    assert "<dt>data</dt>" not in text
    assert "<figure" not in page(prompts())
    assert "Recipe" not in page(prompts())


def test_with_several_adapters_it_says_whose_the_filters_and_the_curve_are():
    said = "Filters, recipe and loss are of the first adapter."
    assert said in page(arithmetic(2))
    assert said not in page(arithmetic(1))


def test_graded_answers_are_filtered_by_how_they_compare_with_the_base():
    outline = Outline(page(dialogues()))
    assert [attrs["href"] for attrs in outline.all("a")[:5]] == ["#all", "#better", "#same", "#worse", "#changed"]
    assert [attrs["data-is"] for attrs in outline.all("article")] == ["all better changed", "all worse changed"]
    assert "ROUGE-L 72.7, better" in outline.articles[0]


def test_groups_too_small_to_tell_are_left_out_and_so_is_a_section_of_none():
    def grouped(*values):
        comparison = compared(ARITHMETIC, [(f"{n} + 0", str(n), "x", str(n)) for n in range(len(values))])
        return page(replace(comparison, rows=tuple(
            replace(row, groups={"length": value}) for row, value in zip(comparison.rows, values, strict=True))))

    assert "of 6 rows" in grouped(*["short"] * 6, *["long"] * 4)
    assert "of 4 rows" not in grouped(*["short"] * 6, *["long"] * 4)
    assert 'id="groups"' not in grouped("a", "b", "b", "c")


def test_prompts_from_a_file_have_no_right_and_wrong():
    outline = Outline(page(prompts()))
    assert [attrs["href"] for attrs in outline.all("a")[:2]] == ["#all", "#changed"]
    assert "reference" not in outline.articles[0]


def test_the_page_carries_the_json_form():
    comparison = hostile()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page(comparison), re.DOTALL)[1]
    assert json.loads(data) == json.loads(exports.json(comparison))


def test_hostile_text_adds_no_element_and_no_attribute():
    tame, wild = Outline(page(dialogues(2))), Outline(page(hostile()))
    assert {name for name, _ in wild.tags} <= {name for name, _ in tame.tags} | {"mark"}
    assert len(wild.all("script")) == 2
    assert not any(name.startswith("on") or name in ("style", "autofocus") for _, attrs in wild.tags for name in attrs)
    assert [attrs["src"] for _, attrs in wild.tags if "src" in attrs] == [
        attrs["src"] for _, attrs in tame.tags if "src" in attrs]
    assert all(attrs["href"].startswith("#") for attrs in wild.all("a"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", page(hostile()).partition('id="data"')[0])


def test_nothing_is_loaded_and_nothing_else_may_run():
    policy = next(attrs["content"] for attrs in Outline(page(hostile())).all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy


def in_chromium(test):
    """A test of a page in Chromium, where there is one."""
    return pytest.mark.browser(pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Chromium")(test))


def browse(folder: Path, comparison, anchor: str) -> tuple[str, str, str]:
    """A comparison's page as Chromium ends up with it, what it logged, and its log of the network."""
    path = folder / "page.html"
    path.write_text(page(comparison), "utf-8")
    network = path.with_suffix(".netlog")
    run = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={path.with_suffix('.profile')}", "--host-resolver-rules=MAP * ~NOTFOUND",
         "--enable-logging=stderr", "--v=0", f"--log-net-log={network}", "--virtual-time-budget=2000",
         "--dump-dom", f"{path.as_uri()}{anchor}"],
        capture_output=True, text=True, timeout=120, check=True)
    return run.stdout, run.stderr, network.read_text("utf-8")


@in_chromium
def test_a_browser_filters_rows_and_runs_nothing_of_theirs(tmp_path):
    dom, log, network = browse(tmp_path, hostile(), "#changed")
    assert "<title>owned" not in dom
    assert 'href="#changed" aria-current="true"' in dom
    shown = sum(map(hostile().changed, hostile().rows))
    assert f"{shown} of {len(HOSTILE)} rows</output>" in dom
    assert len(re.findall(r"<article [^>]*hidden", dom)) == len(HOSTILE) - shown
    assert "CONSOLE" not in log
    assert "tracker.invalid" not in network


@in_chromium
def test_the_filters_of_a_browser_are_those_of_the_table(tmp_path):
    dom, log, _ = browse(tmp_path, arithmetic(), "#wrong")
    assert re.findall(r'<article [^>]*id="row-(\d)"[^>]*hidden', dom) == ["1", "2"]
    assert "1 of 3 rows</output>" in dom
    assert "CONSOLE" not in log


def many():
    """Sixty rows that are right, then sixty that are wrong."""
    right, _, wrong = arithmetic().rows
    return replace(arithmetic(), rows=(right,) * 60 + (wrong,) * 60)


def test_many_rows_stand_in_blocks_and_few_do_not():
    outline = Outline(page(many()))
    assert len(outline.articles) == 120
    assert len([attrs for attrs in outline.all("div") if attrs.get("class") == "block"]) == 3
    assert not [attrs for attrs in Outline(page(arithmetic())).all("div") if attrs.get("class") == "block"]


@in_chromium
def test_a_block_without_a_row_to_show_goes(tmp_path):
    dom, log, _ = browse(tmp_path, many(), "#wrong")
    hidden = ["hidden" in attributes for attributes in re.findall(r'<div class="block"([^>]*)', dom)]
    assert hidden == [True, False, False]
    assert "60 of 120 rows</output>" in dom
    assert "CONSOLE" not in log  # sizes set by the script are none of the styles that the policy forbids
