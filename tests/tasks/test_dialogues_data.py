"""The sample dialogues keep the promises of data/dialogues/README.md and data/dialogues-zh/README.md."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data"
MESSAGE = re.compile(r"([^:\n]{2,20}): \S.*")
UNIT = re.compile(r"[一-鿿]|[^\W一-鿿]+")  # a Chinese character, or a word of any other script
Dialogue = dict[str, str]


@dataclass(frozen=True)
class Collection:
    """A folder and what its README promises; lengths are inclusive."""

    folder: str
    id_prefix: str
    sizes: dict[str, int]
    speakers: dict[int, int]
    """How many conversations have so many speakers."""
    messages: tuple[int, int]
    summary_units: tuple[int, int]
    rows: list[Dialogue] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", [row for split in self.sizes for row in self.read(split)])

    def read(self, split: str) -> list[Dialogue]:
        rows: list[Dialogue] = json.loads((DATA / self.folder / f"{split}.json").read_text(encoding="utf-8"))
        return rows


COLLECTIONS = [
    Collection("dialogues", "l2t-", {"train": 90, "val": 22, "test": 22}, {2: 102, 3: 20, 4: 9, 5: 3},
               messages=(4, 23), summary_units=(10, 40)),
    Collection("dialogues-zh", "l2t-zh-", {"train": 84, "val": 18, "test": 18}, {2: 98, 3: 19, 4: 3},
               messages=(4, 12), summary_units=(20, 50)),
]
every_collection = pytest.mark.parametrize("collection", COLLECTIONS, ids=lambda collection: collection.folder)


def units(text: str) -> list[str]:
    return UNIT.findall(text.lower())


def speakers(row: Dialogue) -> set[str]:
    return {line.split(": ", 1)[0] for line in row["dialogue"].split("\n")}


def trigrams(text: str) -> set[tuple[str, ...]]:
    found = units(text)
    return set(zip(found, found[1:], found[2:], strict=False))


@every_collection
def test_each_split_has_the_promised_rows_and_keys(collection: Collection) -> None:
    assert {split: len(collection.read(split)) for split in collection.sizes} == collection.sizes
    assert {tuple(row) for row in collection.rows} == {("id", "dialogue", "summary")}
    cells = [cell for row in collection.rows for cell in row.values()]
    assert all(isinstance(cell, str) and cell == cell.strip() and cell for cell in cells)


@every_collection
def test_ids_are_unique_and_complete(collection: Collection) -> None:
    expected = [f"{collection.id_prefix}{number:04d}" for number in range(1, len(collection.rows) + 1)]
    assert [row["id"] for row in collection.rows] == expected


@every_collection
def test_every_line_is_a_message_with_a_speaker(collection: Collection) -> None:
    lines = [(row["id"], line) for row in collection.rows for line in row["dialogue"].split("\n")]
    assert [pair for pair in lines if not MESSAGE.fullmatch(pair[1])] == []


@every_collection
def test_as_many_people_talk_in_as_many_messages_as_promised(collection: Collection) -> None:
    assert Counter(len(speakers(row)) for row in collection.rows) == collection.speakers
    messages = [len(row["dialogue"].split("\n")) for row in collection.rows]
    assert (min(messages), max(messages)) == collection.messages


@every_collection
def test_every_summary_names_a_speaker_of_its_dialogue(collection: Collection) -> None:
    def named(row: Dialogue) -> bool:
        summary = f" {' '.join(units(row['summary']))} "
        return any(f" {' '.join(units(name))} " in summary for name in speakers(row))

    assert [row["id"] for row in collection.rows if not named(row)] == []


@every_collection
def test_summaries_have_the_promised_length_and_are_shorter_than_their_dialogues(collection: Collection) -> None:
    shortest, longest = collection.summary_units
    lengths = {row["id"]: (len(units(row["summary"])), len(units(row["dialogue"]))) for row in collection.rows}
    assert {id_: pair for id_, pair in lengths.items() if not shortest <= pair[0] <= min(longest, pair[1] - 1)} == {}
    assert [row["id"] for row in collection.rows if len(row["summary"]) >= len(row["dialogue"])] == []


@every_collection
def test_no_dialogue_summary_or_opening_stands_twice(collection: Collection) -> None:
    dialogues, summaries = ({row[key] for row in collection.rows} for key in ("dialogue", "summary"))
    openings = {dialogue.split("\n")[0].split(": ", 1)[1].lower() for dialogue in dialogues}
    assert len(openings) == len(dialogues) == len(summaries) == len(collection.rows)


@every_collection
def test_no_two_dialogues_share_more_than_an_eighth_of_their_phrases(collection: Collection) -> None:
    phrases = [(row["id"], trigrams(row["dialogue"])) for row in collection.rows]
    pairs = [
        (one, other)
        for (one, left), (other, right) in combinations(phrases, 2)
        if len(left & right) > min(len(left), len(right)) / 8
    ]
    assert pairs == []
