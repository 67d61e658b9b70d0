"""The sample dialogues keep the promises of data/dialogues/README.md."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "data" / "dialogues"
SIZES = {"train": 90, "val": 22, "test": 22}
MESSAGE = re.compile(r"([^:\n]{2,20}): \S.*")
Dialogue = dict[str, str]


def read(split: str) -> list[Dialogue]:
    rows: list[Dialogue] = json.loads((FOLDER / f"{split}.json").read_text(encoding="utf-8"))
    return rows


def speakers(row: Dialogue) -> set[str]:
    return {line.split(": ", 1)[0] for line in row["dialogue"].split("\n")}


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


@pytest.fixture(scope="module")
def rows() -> list[Dialogue]:
    return [row for split in SIZES for row in read(split)]


@pytest.mark.parametrize("split", SIZES)
def test_each_split_has_the_promised_rows_and_keys(split: str) -> None:
    rows = read(split)
    assert len(rows) == SIZES[split]
    assert {tuple(row) for row in rows} == {("id", "dialogue", "summary")}
    assert all(isinstance(cell, str) and cell == cell.strip() and cell for row in rows for cell in row.values())


def test_ids_are_unique_and_complete(rows: list[Dialogue]) -> None:
    assert [row["id"] for row in rows] == [f"l2t-{number:04d}" for number in range(1, 135)]


def test_every_line_is_a_message_with_a_speaker(rows: list[Dialogue]) -> None:
    lines = [(row["id"], line) for row in rows for line in row["dialogue"].split("\n")]
    assert [pair for pair in lines if not MESSAGE.fullmatch(pair[1])] == []


def test_two_to_five_people_talk_in_four_to_25_messages(rows: list[Dialogue]) -> None:
    assert Counter(len(speakers(row)) for row in rows) == {2: 102, 3: 20, 4: 9, 5: 3}
    assert {row["id"] for row in rows if not 4 <= len(row["dialogue"].split("\n")) <= 25} == set()


def test_every_summary_names_a_speaker_of_its_dialogue(rows: list[Dialogue]) -> None:
    def named(row: Dialogue) -> bool:
        return any(re.search(rf"\b{re.escape(name)}\b", row["summary"]) for name in speakers(row))

    assert [row["id"] for row in rows if not named(row)] == []


def test_summaries_are_10_to_40_words_and_shorter_than_their_dialogues(rows: list[Dialogue]) -> None:
    lengths = {row["id"]: (len(row["summary"].split()), len(row["dialogue"].split())) for row in rows}
    assert {id_: pair for id_, pair in lengths.items() if not 10 <= pair[0] <= 40 or pair[0] >= pair[1]} == {}
    assert [row["id"] for row in rows if len(row["summary"]) >= len(row["dialogue"])] == []


def test_no_dialogue_summary_or_opening_stands_twice(rows: list[Dialogue]) -> None:
    openings = {row["dialogue"].split("\n")[0].split(": ", 1)[1].lower() for row in rows}
    assert len(openings) == len({row["dialogue"] for row in rows}) == len({row["summary"] for row in rows}) == 134


def test_no_two_dialogues_share_more_than_an_eighth_of_their_phrases(rows: list[Dialogue]) -> None:
    phrases = [(row["id"], trigrams(row["dialogue"])) for row in rows]
    pairs = [
        (one, other)
        for index, (one, left) in enumerate(phrases)
        for other, right in phrases[:index]
        if len(left & right) > min(len(left), len(right)) / 8
    ]
    assert pairs == []
