"""A comparison as table, markdown, csv and json."""

import csv
import html
import io
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from test_comparison import arithmetic, dialogues, prompts

from llama2tut.console import visible
from llama2tut.errors import UsageError
from llama2tut.reports import exports, markdown, page, table, wording
from llama2tut.tasks.metrics import METRICS

HOSTILE = ["<script>alert(1)</script>", "a | b || c", "**bold** _it_ ~~s~~ `code`",
           "[x](javascript:alert(1)) ![i](//t)", "&lt;b&gt; &#124;", "ends in \\", "\\| \\\\|", "# h\n- item\n| --- |",
           "$x$ \x1b[31mred\x1b[0m \u202egnp.exe\r"]


def with_texts(comparison, *texts):
    """The comparison with one row a text, which stands in all of its cells."""
    row = comparison.rows[0]
    return replace(comparison, rows=tuple(
        replace(row, prompt=text, reference=text, answers=(text,) * len(row.answers)) for text in texts))


def test_the_table_at_80_columns():
    assert table.table(arithmetic(), show="1") == """\
task       arithmetic
base       smollm2-135m
finetuned  outputs/finetuned

┌───┬───────────────────────────────┬───────────┬──────────────┬───────────────┐
│   │ prompt                        │ reference │ base         │ finetuned     │
├───┼───────────────────────────────┼───────────┼──────────────┼───────────────┤
│ 1 │ Calculate the following       │ -40       │ 19 - 59 = 40 │ 19 - 59 = -40 │
│   │ expression:                   │           │ ✗ wrong      │ ✓ right       │
│   │ What is 19-59?                │           │              │               │
│   │ ---                           │           │              │               │
│   │ Answer:                       │           │              │               │
└───┴───────────────────────────────┴───────────┴──────────────┴───────────────┘

                     exact match  rows  tokens/s
base        33.3 % (6.1 to 79.2)     3   1,234.5
finetuned  66.7 % (20.8 to 93.9)     3      99.0

finetuned against base: exact match +33.3 points (-31.6 to +71.8), too few rows
to tell
1 of 3 rows shown; in brackets 95 % intervals; split test, max_new_tokens 24,
path data
"""


def test_a_narrow_terminal_gets_one_field_under_the_other():
    text = table.table(dialogues(2), show="1", width=40)
    assert """
── 1 ──
prompt
  Summarize this dialog:
  Ana: Lunch? 🍜
""" in text
    assert "finetuned_2\n  Ana and Ben have lunch.\n  ROUGE-L 72.7, better\n" in text
    assert "base\n  ROUGE-1 75.0\n" in text


@pytest.mark.parametrize("width", [60, 80, 140])
def test_wide_characters_and_long_answers_are_aligned(width):
    comparison = with_texts(dialogues(), "小红：火锅吧，老地方，七点见 👨\u200d👩\u200d👧",
                            " ".join(f"word{n}" for n in range(300)))
    lines = table.table(comparison, show="all", width=width).splitlines()
    assert max(map(cell_len, lines)) <= width
    boxed = [line for line in lines if line[:1] in "┌│├└" and line]
    assert bool(boxed) == (width >= 80)
    assert len(set(map(cell_len, boxed))) <= 1
    assert any("👨\u200d👩\u200d👧" in line for line in lines)
    assert any(re.search(r"… \(\d+ more", line) for line in lines)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=200), width=st.integers(20, 140), tuned=st.integers(1, 3), ascii=st.booleans())
def test_no_text_breaks_the_table(text, width, tuned, ascii):
    drawn = table.table(with_texts(arithmetic(tuned), text), width=width, ascii=ascii)
    for line in drawn.split("\n"):
        assert cell_len(line) <= width
        assert line.isascii() or not ascii
    boxed = [cell_len(line) for line in drawn.split("\n") if line[:1] == ("|" if ascii else "│")]
    assert len(set(boxed)) <= 1


def test_marks_of_rich_are_plain_text():
    text = table.table(with_texts(arithmetic(), "[red]x[/red] :smile: [link=file:///]y[/link]"), width=300, color=True)
    assert "[red]x[/red] :smile: [link=file:///]y[/link]" in text


def test_long_cells_are_cut_and_say_by_how_much():
    text = table.table(with_texts(arithmetic(), "\n".join(f"this is line {n:02}" for n in range(1, 32))), width=200)
    assert "│ this is line 15 " in text
    assert "│ this is line 16 " not in text
    assert "│ … (16 more " in text


def test_terminal_escapes_are_spelled_out():
    text = table.table(with_texts(arithmetic(), "\x1b]0;owned\x07\x1b[2Jhi\u202e\u200b\x9b1m\ttab"), width=200)
    assert r"\x1b]0;owned\x07\x1b[2Jhi\u202e\u200b\x9b1m" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u200b]", text)


def test_colour_adds_nothing_but_colour():
    plain, colored = (table.table(dialogues(), width=120, color=color) for color in (False, True))
    assert re.search(r"\x1b\[32mROUGE-L 72.7, better *\x1b\[0m", colored)
    assert re.search(r"\x1b\[31mROUGE-L 44.4, worse *\x1b\[0m", colored)
    assert [line.rstrip() for line in re.sub(r"\x1b\[\d+m", "", colored).split("\n")] == plain.split("\n")


def test_prompts_without_references_have_no_such_column():
    text = table.table(prompts(), show="all")
    assert "reference" not in text
    assert "│ 2+2    │ (empty) │ 4         │" in text
    assert "base          2   1,234.5" in text


@pytest.mark.parametrize(("show", "places"), [
    ("0", []), ("2", [1, 2]), ("9", [1, 2, 3]), ("all", [1, 2, 3]), ("wrong", [3]), ("right", [1, 2]),
    ("changed", [1, 3])])
def test_rows_to_show(show, places):
    assert [place for place, _ in wording.select(arithmetic(), show)] == places


def test_no_row_of_a_kind_is_said():
    comparison = arithmetic()
    text = table.table(replace(comparison, rows=comparison.rows[:2]), show="wrong")
    assert "\nno row is wrong\n" in text
    assert "0 of 2 rows shown" in text


@pytest.mark.parametrize("show", ["", "-1", "1.5", "wrongs", "٣", "1_0"])
def test_an_unknown_show_is_refused(show):
    with pytest.raises(UsageError, match=r"--show .*use a number, all, changed, right or wrong"):
        wording.check_show(show, METRICS["exact_match"])


def test_a_row_cannot_be_what_its_metric_does_not_know():
    assert [place for place, _ in wording.select(dialogues(), "worse")] == [2]
    with pytest.raises(UsageError, match=r"--show wrong does not go with ROUGE-L; .*better, same or worse"):
        wording.select(dialogues(), "wrong")


def test_wrong_rows_need_scores():
    with pytest.raises(UsageError, match="--show wrong needs scores"):
        table.table(prompts(), show="wrong")


def test_markdown_is_the_tutorials_table():
    lines = markdown.markdown(arithmetic(), "1").splitlines()
    at = lines.index("| prompt | reference | base | finetuned |")
    assert lines[at + 1:at + 4] == [
        "| --- | --- | --- | --- |",
        "| Calculate the following expression:<br>What is 19-59?<br>---<br>Answer: | -40 "
        "| 19 - 59 = 40<br>✗ wrong | 19 - 59 = -40<br>✓ right |",
        ""]
    assert "| finetuned | 66.7 % (20.8 to 93.9) | 3 | 99.0 |" in lines
    assert lines[-1].startswith("- finetuned against base: exact match +33.3 points")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_becomes_markup(text):
    comparison = with_texts(arithmetic(), text)
    row = markdown.markdown(comparison).splitlines()[8]
    cells = re.split(r"(?<!\\)\|", row)[1:-1]
    assert len(cells) == 4
    assert not re.search(r"(?<!\\)(?:\\\\)*[*_`~\[\]$]", row)
    assert "<" not in row.replace("<br>", "")
    shown = html.unescape(re.sub(r"\\(.)", r"\1", cells[0].strip()).replace("<br>", "\n"))
    assert shown == visible(text).rstrip()


def test_csv_gives_back_every_cell():
    comparison = with_texts(arithmetic(), *HOSTILE, 'a "quoted", cell\n', "\r", "")
    rows = list(csv.reader(io.StringIO(exports.csv(comparison), newline="")))
    assert rows[0] == ["prompt", "reference", "base", "finetuned", "base_exact_match", "finetuned_exact_match",
                       "cut"]
    assert [row[0] for row in rows[1:]] == [row.prompt for row in comparison.rows]
    assert rows[1][4:] == ["0.0", "1.0", ""]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n=1", "＝1"])
def test_a_spreadsheet_gets_no_formula(text):
    rows = list(csv.reader(io.StringIO(exports.csv(with_texts(arithmetic(), text), spreadsheet_safe=True), newline="")))
    assert rows[1][:4] == [f"'{text}"] * 4
    assert text in exports.csv(with_texts(arithmetic(), text))


def test_csv_of_rows_to_show():
    assert exports.csv(arithmetic(), show="wrong").count("Compute") == 1
    assert exports.csv(prompts()).startswith('prompt,reference,base,finetuned,cut\n"Say hi","","Hi!","Hi!\n",""\n')


def test_every_form_says_what_was_taken_for_a_word():
    how = "words, and characters where there are no spaces"
    comparison = replace(arithmetic(), settings={**arithmetic().settings, "scored_on": how})
    head, *rows = csv.reader(io.StringIO(exports.csv(comparison), newline=""))
    assert head[-1] == "scored_on"
    assert {row[-1] for row in rows} == {how}
    assert json.loads(exports.json(comparison))["settings"]["scored_on"] == how
    for form in (table.table(comparison, width=400), markdown.markdown(comparison), page.page(comparison)):
        assert how in form


def test_json_has_all_rows_and_is_always_valid():
    comparison = with_texts(arithmetic(), "老地方 \ud83d", "\x00\x1b")
    text = exports.json(replace(comparison, tokens_per_second=(float("nan"), 1.0)))
    assert "老地方" in text.encode("utf-8").decode()
    value = json.loads(text, parse_constant=pytest.fail)
    assert [row["prompt"] for row in value["rows"]] == ["老地方 \ud83d", "\x00\x1b"]
    assert value["tokens_per_s"] == {"base": None, "finetuned": 1.0}


@pytest.mark.parametrize(("line", "width", "lines"), [
    ("凯文: 周末去你家，带什么？", 10, ["凯文: 周末", "去你家，带", "什么？"]),  # the name is not alone
    ("水果就好，进门", 8, ["水果就", "好，进门"]), ("我用iPhone 15拍", 9, ["我用", "iPhone 15", "拍"]),
    ("one two three", 8, ["one two", "three"]), ("wordwithoutend", 6, ["wordwi", "thoute", "nd"]),
    ("가나다 라마바", 8, ["가나다", "라마바"]), ("👩‍🚀👩‍🚀 ok", 4, ["👩‍🚀👩‍🚀", "ok"])])
def test_lines_are_broken_where_their_script_allows(line, width, lines):
    from llama2tut.reports.table import _wrapped

    assert [*_wrapped(line, width)] == lines
