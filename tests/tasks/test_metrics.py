"""Scores against values worked out here, apart from the code that is tested."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from llama2tut.errors import DataError
from llama2tut.tasks.metrics import METRICS, check_references, contains, f1, metric_of, plain, rouge, score
from llama2tut.tasks.task import ARITHMETIC, SAMSUM

REPOSITORY = Path(__file__).parents[2]
# Words that Porter's stemmer leaves as they are, so that the definitions below need none.
WORDS = ["cat", "dog", "sat", "mat", "on", "red", "sun", "map"]


def pattern(text):
    return lambda answer: found[1] if (found := re.search(text, answer)) else None


def f_one(shared, answer_total, reference_total):
    if not shared:
        return 0.0
    precision, recall = shared / answer_total, shared / reference_total
    return 200 * precision * recall / (precision + recall)


def n_gram_f1(answer, reference, n):
    """ROUGE-n by its definition: n-grams in common, each as often as both have it."""
    grams = [Counter(zip(*(words[start:] for start in range(n)), strict=False)) for words in (answer, reference)]
    return f_one((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())


def longest_common(a, b):
    """Length of the longest common subsequence, by its recursive definition over a table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=12), st.lists(st.sampled_from(WORDS), min_size=1, max_size=12))
def test_rouge_is_what_its_definition_gives(answer, reference):
    found = rouge([" ".join(answer)], [" ".join(reference)])
    assert found["rouge1"] == pytest.approx((n_gram_f1(answer, reference, 1),))
    assert found["rouge2"] == pytest.approx((n_gram_f1(answer, reference, 2),))
    assert found["rougeL"] == pytest.approx((f_one(longest_common(answer, reference), len(answer), len(reference)),))


def test_rouge_by_hand():
    # answer: the cat sat on the mat (6 words); reference: the cat on the red mat (6 words)
    # words in common: the x 2, cat, on, mat = 5; pairs: "the cat", "on the" = 2 of 5; in order: the cat on the mat = 5
    found = rouge(["The cat sat on the mat."], ["the cat on the red mat"])
    assert found["rouge1"] == pytest.approx((100 * 5 / 6,))
    assert found["rouge2"] == pytest.approx((100 * 2 / 5,))
    assert found["rougeL"] == pytest.approx((100 * 5 / 6,))


def test_rouge_stems_and_ignores_case_and_punctuation():
    found = rouge(["Anna MEETS Ben, walking!"], ["anna meeting ben walks"])
    assert found["rouge1"] == pytest.approx((100.0,))
    assert found["rougeL"] == pytest.approx((100.0,))


def test_answers_are_read_as_the_task_does():
    completions = ["19 - 59 = -40\nand more", "-40", "= 40", "nothing", "1 + 1 = 2 = 3"]
    scores = score(ARITHMETIC, completions, ["-40", "-40", "-40", "-40", "3"])
    assert scores.per_row == {"exact_match": (1.0, 1.0, 0.0, 0.0, 1.0)}


def test_scores_of_arithmetic():
    scores = score(ARITHMETIC, ["1 + 1 = 2", "1 + 2 = 3", "0", "9"], ["2", "3", "4", "5"])
    assert (scores.metric, scores.rows, scores.headline) == ("exact_match", 4, "exact_match")
    assert scores.per_row == {"exact_match": (1.0, 1.0, 0.0, 0.0)}
    assert scores.means == {"exact_match": 0.5}


def test_scores_of_summaries_have_the_answers_length_in_words():
    scores = score(SAMSUM, ["  cat sat\n", "dog"], ["cat sat", "map"])
    assert (scores.metric, scores.rows, scores.headline) == ("rouge", 2, "rougeL")
    assert scores.per_row == {"rouge1": (100.0, 0.0), "rouge2": (100.0, 0.0), "rougeL": (100.0, 0.0)}
    assert scores.means == {"rouge1": 50.0, "rouge2": 50.0, "rougeL": 50.0, "words": 1.5}


def test_rouge_scores_the_part_that_the_task_extracts():
    def after_colon(text):
        found = re.search(r": (.*)", text)
        return found[1] if found else None

    task = replace(SAMSUM, extract=after_colon)
    scores = score(task, ["Summary: cat sat", "cat sat"], ["cat sat", "cat sat"])
    assert scores.per_row["rougeL"] == (100.0, 0.0)
    assert scores.means["words"] == 1.0


def test_a_task_without_a_metric_is_not_scored():
    assert metric_of(None) is metric_of(replace(SAMSUM, metric="none")) is None
    with pytest.raises(ValueError, match="none"):
        score(replace(SAMSUM, metric="none"), ["a", "b"], ["a", "c"])


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_metric_gives_a_text_itself_the_best_value_and_names_its_scores(metric):
    texts = ["Anna meets Ben.", "-40", "今天去公园，7点", "été", "👍", "?", "the", "C++"]
    found = metric.values(texts, texts)
    assert list(found) == list(metric.labels)
    assert metric.headline in metric.labels
    assert found[metric.headline] == (metric.top,) * len(texts)
    assert metric.values(["x"], ["y"])[metric.headline] == (0,)
    assert metric.values([""], ["y"])[metric.headline] == (0,)


def test_a_graded_score_is_held_against_the_base_and_a_share_against_the_reference():
    assert [METRICS["rouge"].outcome(value, 40.0) for value in (40.5, 40.0, 39.0)] == ["better", "same", "worse"]
    assert [METRICS["exact_match"].outcome(value, 1.0) for value in (1.0, 0.0)] == ["right", "wrong"]


@pytest.mark.parametrize(("ignore", "answers", "lenient", "gain"), [
    ((), ("happy", "Happy", "sad"), ("case",), 1),
    ((), ("happy", "happy", "sad"), (), 0),
    (("case",), ("Happy", "HAPPY", "sad"), (), 0),
    ((), ("Happy!", "Happy", "ｈａｐｐｙ"), ("case", "punctuation", "width"), 3),
    (("case",), ("Happy.", "Happy", "sad"), ("case", "punctuation"), 1),
    ((), ("hap py", " happy\n", "very  happy"), (), 0),
])
def test_what_scoring_is_strict_on_is_found(ignore, answers, lenient, gain):
    scores = score(replace(SAMSUM, metric="exact_match", ignore=ignore), answers, ["happy"] * 3)
    assert (scores.lenient, scores.lenient_gain) == (lenient, gain)


def test_leniency_goes_by_what_the_task_extracts_and_finds_nothing_in_grades():
    task = replace(SAMSUM, metric="exact_match", extract=lambda text: text.removeprefix("- "))
    assert score(task, ["- Happy", "sad"], ["happy", "?"]).lenient == ("case",)
    assert score(task, ["!", "..."], ["?", "?"]).lenient == ()
    assert score(SAMSUM, ["Cat Sat", "map"], ["cat sat", "dog"]).lenient == ()


def test_english_scores_are_those_of_rouge_score():
    texts = [text for path in (REPOSITORY / "data/dialogues").glob("*.json") for row in json.loads(path.read_text())
             for text in row.values() if not re.search(r"[^\W\d_a-zA-Z]", text)]
    assert len(texts) > 300
    others = texts[7:] + texts[:7]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    wanted = [scorer.score(reference, answer) for answer, reference in zip(texts, others, strict=True)]
    for name, values in rouge(texts, others).items():
        assert values == tuple(100 * row[name].fmeasure for row in wanted)


def test_rouge_reads_every_script():
    # 今天去公园 against 今天去学校: 3 of 5 characters, pairs 今天 天去 of 4, in order 3 of 5
    found = rouge(["今天去公园"], ["今天去学校。"])
    assert {name: values[0] for name, values in found.items()} == pytest.approx(
        {"rouge1": 60.0, "rouge2": 50.0, "rougeL": 60.0})
    assert rouge(["去公园 no 7"], ["no 7"])["rouge1"] == pytest.approx((200 * (2 / 5) * 1 / (2 / 5 + 1),))
    assert rouge(["été"], ["étê"])["rouge1"] == (0.0,)
    assert rouge(["e\u0301te\u0301 ＡＢ１"], ["\u00e9t\u00e9 ab1"])["rouge1"] == pytest.approx((100.0,))
    assert rouge(["한국어 문장"], ["한국어 글"])["rouge1"] == pytest.approx((50.0,))


@pytest.mark.parametrize(("answer", "reference", "shared", "pairs", "in_order"), [
    # Tokens in common, pairs of them in common, the longest common subsequence; each beside the counts of both texts.
    ("小李明天去北京。", "小李后天去北京", (6, 7, 7), (4, 6, 6), (6, 7, 7)),  # pairs: 小李 天去 去北 北京
    ("老师让学生交作业", "学生把作业交给老师", (7, 8, 9), (3, 7, 8), (4, 8, 9)),  # pairs: 学生 作业 老师; then 学生作业
    # One token each: iphone, 2000, 3. Pairs: 3个 个iphone 2000元; then 他 买 3 个 iphone.
    ("他买了3个iPhone，花了２０００元", "他花2000元买3个iPhone", (8, 10, 8), (3, 9, 7), (5, 10, 8)),
    ("猫猫猫", "猫狗", (1, 3, 2), (0, 2, 1), (1, 3, 2))])
def test_chinese_by_hand(answer, reference, shared, pairs, in_order):
    found = rouge([answer], [reference])
    assert {name: values[0] for name, values in found.items()} == pytest.approx(
        {"rouge1": f_one(*shared), "rouge2": f_one(*pairs), "rougeL": f_one(*in_order)})


@pytest.mark.parametrize(("completions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_rows_that_are_missing_are_not_scored(completions, references):
    with pytest.raises(ValueError, match="cannot be scored"):
        score(ARITHMETIC, completions, references)


def test_a_pattern_reads_the_reference_too():
    task = replace(SAMSUM, metric="exact_match", extract=pattern("#### (-?[0-9.,]+)"))
    scores = score(task, ["so 3 + 4 #### 7", "7", "#### 8"], ["3 + 4 = 7 #### 7"] * 3)
    assert scores.per_row["exact_match"] == (1.0, 0.0, 0.0)


def test_references_that_no_answer_could_match_are_refused():
    task = replace(SAMSUM, target="gold", reference="gold", metric="exact_match", extract=pattern("#### ([0-9]+)"))
    check_references(task, [{"gold": "#### 7"}], "rows.csv")
    with pytest.raises(DataError, match=r"rows\.csv: column 'gold': in 2 rows \(2, 3\) of 3 .*'seven'.*extract"):
        check_references(task, [{"gold": "#### 7"}, {"gold": "seven"}, {"gold": ""}], "rows.csv")
    check_references(replace(task, metric="none"), [{"gold": "seven"}], "rows.csv")
    quoted = replace(task, target="answer", extract=pattern('"(.*)"'))
    check_references(quoted, [{"gold": "oui", "answer": '"oui"'}], "rows.csv")
    assert score(quoted, ['it is "oui"', "oui"], ["oui", "oui"]).per_row["exact_match"] == (1.0, 0.0)


@pytest.mark.parametrize(("answer", "reference", "value"), [
    ("The cat sat on the mat", "a cat on mat", 200 * 3 / (4 + 3)),  # cat sat on mat, cat on mat
    ("Denver Broncos!", "denver broncos", 100.0), ("", "x", 0.0), ("the", "the", 100.0), ("the", "cat", 0.0),
    ("don't", "dont", 100.0), ("今天去公园", "明天去", 200 * 2 / (5 + 3)), ("été", "étê", 0.0), ("ＡＢ", "ab", 100.0)])
def test_f1_by_hand(answer, reference, value):
    assert f1([answer], [reference])["f1"] == pytest.approx((value,))


@pytest.mark.parametrize(("answer", "reference", "there"), [
    ("It goes to billing.", "billing", True), ("prebilling", "billing", False), ("17 and 7", "7", True),
    ("17", "7", False), ("7.5", "7", False), ("-7", "7", False), ("3-7", "7", True), ("1,700", "700", False),
    ("我住在北京。", "北京", True), ("有3个", "3", True), ("13个", "3", False), ("New York City", "York City", True),
    ("York, City", "York City", False), ("Billing", "billing", False), ("", "x", False), ("C++ and C", "C++", True)])
def test_an_answer_contains_whole_words_and_numbers(answer, reference, there):
    assert contains([answer], [reference])["contains"] == (float(there),)


@pytest.mark.parametrize(("ignore", "text", "left"), [
    ((), "e\u0301 A.", "\u00e9 A."), (("case",), "Straße ÉTÉ", "strasse été"), (("width",), "ＡＢ１２ ﬁ", "AB12 fi"),
    (("punctuation",), "Yes, “it's” 1,234.5; -40 – 3.", "Yes its 1234.5 -40  3"), (("punctuation",), "是的。", "是的"),
    (("punctuation",), "1,23", "1,23"), (("whitespace",), " a \n\t b\u3000c ", "a b c"),
    (("whitespace",), "我 在 Paris 住", "我在Paris住"),
    (("case", "punctuation", "width", "whitespace"), "Ｄelivery .", "delivery")])
def test_what_is_ignored_is_gone_and_nothing_else(ignore, text, left):
    assert plain(text, ignore) == left


def test_a_task_says_which_differences_do_not_count():
    answers, references = ["Delivery.", "delivery", "1,234"], ["delivery", "delivery", "1234"]
    strict = replace(SAMSUM, metric="exact_match")
    assert score(strict, answers, references).per_row["exact_match"] == (0.0, 1.0, 0.0)
    lax = replace(strict, ignore=("case", "punctuation"))
    assert score(lax, answers, references).per_row["exact_match"] == (1.0, 1.0, 1.0)
    with pytest.raises(DataError, match="nothing is found"):
        check_references(lax, [{"summary": "?!", "dialogue": ""}], "rows.csv")


def test_words_are_counted_in_every_script():
    assert score(SAMSUM, ["今天去公园 OK", "two words"], ["x", "y"]).means["words"] == (6 + 2) / 2


@pytest.mark.parametrize(("answer", "read"), [
    ("19 - 59 = -40", "-40"), ("-40", "-40"), ("\u221240", "-40"), ("－４０", "-40"), ("- 40.", "-40"), ("+7", "7"),
    ("-0", "0"), ("007", "7"), ("1,234", "1234"), ("1 + 1 = 1\u00a0234", "1234"), ("1'234'567", "1234567"),
    ("1 + 1 = 2 = 3", "3"), ("７＋１＝８", "8"), ("19 / 4 = 4 R 3", "4 R 3"), ("4 / 0 = undefined", "undefined"),
    ("-40\nand more", "-40"),
    ("42.5", None), ("5/2", None), ("5²", None), ("12,34", None), ("1,234 567", None), ("40 or 41", None),
    ("I have 2 ideas: 19", None), ("The answer is 1", None), ("not undefined at all", None), ("7 = ", None),
    ("", None)])
def test_an_arithmetic_answer_is_one_whole_number(answer, read):
    assert ARITHMETIC.extract(answer) == read


def test_a_number_is_right_in_any_of_its_forms_and_a_remainder_belongs_to_it():
    answers, references = ["1,234", "−5", "4", "4 R 3", "1,234"], ["1234", "-5", "4 R 3", "4 R 3", "1"]
    assert score(ARITHMETIC, answers, references).per_row["exact_match"] == (1.0, 1.0, 0.0, 1.0, 0.0)
