"""The general texts keep the promises of data/general/README.md."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "data" / "general" / "general.jsonl"
SIZES = {("en", "prose"): 130, ("en", "qa"): 70, ("zh", "prose"): 81, ("zh", "qa"): 45}
LENGTHS = {"en": (11, 44), "zh": (22, 56)}  # words; characters without white space
FORMS = {("en", "prose"): r"[A-Z][^\n]+\.", ("en", "qa"): r"Question: [^\n]+\?\nAnswer: [A-Z][^\n]+\.",
         ("zh", "prose"): r"[^\nA-Z]+。", ("zh", "qa"): r"问：[^\n]+？\n答：[^\n]+。"}
UNIT = re.compile(r"[一-鿿]|[^\W一-鿿]+")  # a Chinese character, or a word of any other script
Text = dict[str, str]


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def test_there_are_as_many_texts_of_each_kind_as_promised(texts: list[Text]) -> None:
    assert {tuple(text) for text in texts} == {("language", "kind", "text")}
    assert Counter((text["language"], text["kind"]) for text in texts) == SIZES


def test_every_text_has_the_form_of_its_kind(texts: list[Text]) -> None:
    assert [text for text in texts if not re.fullmatch(FORMS[text["language"], text["kind"]], text["text"])] == []
    assert [text for text in texts if text["language"] == "en" and not text["text"].isascii()] == []


def test_every_text_is_as_long_as_promised(texts: list[Text]) -> None:
    for language, promised in LENGTHS.items():
        found = [text["text"] for text in texts if text["language"] == language]
        lengths = [len(text.split()) if language == "en" else len("".join(text.split())) for text in found]
        assert (min(lengths), max(lengths)) == promised


def test_no_text_holds_arithmetic_or_a_dialogue(texts: list[Text]) -> None:
    sums = re.compile(r"\d\s*[-+*/=×÷]\s*\d|\b(plus|minus|times \d|divided by)\b|[加减乘除]以?\d")
    speaker = re.compile(r"^(?!Question: |Answer: )\w+: ", re.MULTILINE)
    assert [text["text"] for text in texts if sums.search(text["text"]) or speaker.search(text["text"])] == []


def test_no_two_texts_share_more_than_a_fifth_of_their_phrases(texts: list[Text]) -> None:
    def phrases(text: Text) -> set[tuple[str, ...]]:
        units = UNIT.findall(text["text"].lower().removeprefix("question: ").replace("\nanswer: ", "\n"))
        return set(zip(units, units[1:], units[2:], strict=False))

    pairs = [
        (one["text"], other["text"])
        for (one, left), (other, right) in combinations([(text, phrases(text)) for text in texts], 2)
        if len(left & right) > min(len(left), len(right)) / 5
    ]
    assert pairs == []
