"""gen-arithmetic: the files, their bytes, and what is refused."""

import csv
import hashlib
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from llama2tut.commands import gen_arithmetic
from llama2tut.config.requests import GenArithmeticRequest
from llama2tut.console import Console
from llama2tut.errors import DataError, MachineError, UsageError


def run(request: GenArithmeticRequest) -> list[Path]:
    """The files, as the result names them with their rows."""
    *files, _ = gen_arithmetic.run(request, Console()).text.splitlines()
    return [Path(line.partition("  ")[0]) for line in files]

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["arithmetic_train.csv", "arithmetic_validation.csv", "arithmetic_test.csv"]
COUNTS = {"train": 9500, "validation": 500, "test": 500}
SMALL = {"train": 20, "validation": 5, "test": 5}


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def expression(row):
    a, sign, b = row["input"].split(" ")
    return (sign, *sorted((int(a), int(b)))) if sign in "+*" else (sign, int(a), int(b))


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    return run(GenArithmeticRequest(output_dir=tmp_path_factory.mktemp("default") / "data" / "arithmetic"))


def test_default_files(default):
    assert [path.name for path in default] == NAMES
    assert [len(rows_of(path)) for path in default] == [*COUNTS.values()]
    assert sorted(path.name for path in default[0].parent.iterdir()) == sorted(NAMES)


def test_default_bytes_never_change(default):
    # The promise "same arguments and seed: the same bytes". A change of our templates changes them too.
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in default] == [
        "390e7845a55581caac26b57d291a665865c4c269de9413bf2cffdfa9406953d1",
        "cb7f6d34d834b86b9a369fb7eb1e95c57d32bd34a546f72230146e2f028e454c",
        "4ce24b6f77b461b1748830301a0ec1697e9d5f857fd6f03cf932339b99478618",
    ]


def test_bytes_with_all_operations_and_large_numbers(tmp_path):
    request = GenArithmeticRequest(
        output_dir=tmp_path, ops=("add", "sub", "mul", "div"), max_number=10**9, seed=7, train=2000)
    digests = hashlib.sha256(b"".join(path.read_bytes() for path in run(request))).hexdigest()
    assert digests == "ae7dee4e0f8f3efe0fee1eec1f572b95245cad41a119766853d4647d66ccf2ce"


def test_default_text(default):
    data = default[0].read_bytes()
    assert data.startswith(b"instruction,input,output,answer\n")
    assert b"\r" not in data
    for row in rows_of(default[0]):
        a, sign, b = row["input"].split(" ")
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert row["output"] == f"{row['input']} = {row['answer']}"
        assert a in row["instruction"]
        assert b in row["instruction"]


def test_default_uses_200_wordings(default):
    wordings = {re.sub(r"\d+", "#", row["instruction"]) for row in rows_of(default[0])}
    assert len(wordings) >= 200


def test_default_expressions_stand_in_one_split_once(default):
    expressions = [expression(row) for path in default for row in rows_of(path)]
    assert len(set(expressions)) == len(expressions) == 10_500


def test_exhaustion_gives_every_expression_once(tmp_path):
    result = run(GenArithmeticRequest(output_dir=tmp_path, train=14_000, validation=852, test=500))
    expressions = {expression(row) for path in result for row in rows_of(path)}
    numbers = range(101)
    assert expressions == {("+", a, b) for a in numbers for b in numbers if a <= b} | {
        ("-", a, b) for a in numbers for b in numbers}


def test_fewer_training_rows_leave_the_rest_as_it_is(tmp_path, default):
    fewer = run(GenArithmeticRequest(output_dir=tmp_path, train=1000))
    assert [path.read_bytes() for path in fewer[1:]] == [path.read_bytes() for path in default[1:]]
    assert rows_of(fewer[0]) == rows_of(default[0])[:1000]


def test_another_seed_gives_other_rows(tmp_path, default):
    other = run(GenArithmeticRequest(output_dir=tmp_path, seed=43))
    assert other[2].read_bytes() != default[2].read_bytes()


def test_order_and_repetition_of_ops_do_not_matter(tmp_path):
    first = run(GenArithmeticRequest(output_dir=tmp_path / "1", ops=("add", "div"), max_number=4, **SMALL))
    second = run(GenArithmeticRequest(output_dir=tmp_path / "2", ops=("div", "add", "div"), max_number=4, **SMALL))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_division_rows(tmp_path):
    request = GenArithmeticRequest(output_dir=tmp_path, ops=("div",), max_number=20, train=441, validation=0, test=0)
    result = run(request)
    outputs = {row["output"]: row["answer"] for row in rows_of(result[0])}
    assert outputs["19 / 4 = 4 R 3"] == "4 R 3"
    assert outputs["20 / 4 = 5"] == "5"
    assert outputs["7 / 0 = undefined"] == "undefined"


def test_a_split_of_no_rows_is_its_header(tmp_path):
    result = run(GenArithmeticRequest(output_dir=tmp_path, train=3, validation=0, test=0))
    assert result[2].read_bytes() == b"instruction,input,output,answer\n"


def test_hugging_face_datasets_reads_the_files(tmp_path, default):
    import datasets

    files = {split: str(path) for split, path in zip(COUNTS, default, strict=True)}
    loaded = datasets.load_dataset("csv", data_files=files, cache_dir=str(tmp_path))
    assert loaded.num_rows == COUNTS
    types = {name: feature.dtype for name, feature in loaded["train"].features.items()}
    assert types.pop("answer") == "int64"
    assert set(types) == {"instruction", "input", "output"}
    assert all("string" in dtype for dtype in types.values())
    assert loaded["test"][0]["input"] == rows_of(default[2])[0]["input"]


def test_more_rows_than_exist_are_refused_with_the_most_there_are(tmp_path):
    with pytest.raises(UsageError, match="has 15352 distinct expressions: ask for at most 15352 rows in all"):
        run(GenArithmeticRequest(output_dir=tmp_path / "new", train=14_353))
    assert not (tmp_path / "new").exists()


def test_no_operation_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--ops is empty"):
        run(GenArithmeticRequest(output_dir=tmp_path, ops=()))


def test_existing_files_are_refused_and_named_unless_forced(tmp_path):
    there = tmp_path / "arithmetic_test.csv"
    there.write_text("mine")
    request = {"output_dir": tmp_path, **SMALL}
    with pytest.raises(UsageError, match=r"already there: .*arithmetic_test\.csv: give --force"):
        run(GenArithmeticRequest(**request))
    assert [path.name for path in tmp_path.iterdir()] == ["arithmetic_test.csv"]
    assert there.read_text() == "mine"
    run(GenArithmeticRequest(force=True, **request))
    assert len(rows_of(there)) == 5


def test_a_folder_in_a_files_place_is_refused_even_if_forced(tmp_path):
    (tmp_path / "arithmetic_train.csv").mkdir()
    with pytest.raises(UsageError, match=r"arithmetic_train\.csv: a folder stands where a file goes"):
        run(GenArithmeticRequest(output_dir=tmp_path, force=True))


def test_all_faults_are_told_together(tmp_path):
    (tmp_path / "arithmetic_train.csv").touch()
    (tmp_path / "mine.txt").write_text("{a}\n")
    with pytest.raises(UsageError) as caught:
        run(GenArithmeticRequest(output_dir=tmp_path, train=10**6, templates=tmp_path / "mine.txt"))
    assert len(caught.value.faults) == 3


def test_own_templates(tmp_path):
    (tmp_path / "mine.txt").write_text("Rechne {a} {op} {b} für mich\n[sub]\nZieh {b} von {a} ab, bitte\n", "utf-8")
    result = run(GenArithmeticRequest(output_dir=tmp_path, templates=tmp_path / "mine.txt", **SMALL))
    beginnings = set()
    for row in rows_of(result[0]):
        a, sign, b = row["input"].split(" ")
        general = f"Rechne {row['input']} für mich"
        assert row["instruction"] in ((general, f"Zieh {b} von {a} ab, bitte") if sign == "-" else (general,))
        beginnings.add(row["instruction"].split(" ")[0])
    assert beginnings == {"Rechne", "Zieh"}


@pytest.mark.parametrize(("content", "fault"), [
    (None, "--templates .*could not be read"),
    (b"", "no template for add, sub"),
    (b"What is {a}{op}{b}?\n\xff\xfe {a}{op}{b}\n", "line 2: not UTF-8 text"),
    (b"What is {a}{op}{b}?\nWhat is {a}{op}?\n", "line 2: {b} missing"),
    (b"What is {a}{op}{b} {base}?\n", "line 1: a brace"),
    (b"[sub]\n{a}-{b}\n", "no template for add"),
])
def test_templates_that_cannot_be_used(tmp_path, content, fault):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=fault) as caught:
        run(GenArithmeticRequest(output_dir=tmp_path / "new", templates=path))
    assert all(str(path) in message for message in caught.value.faults)
    assert not (tmp_path / "new").exists()


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=f"--output-dir {folder} cannot be made"):
            run(GenArithmeticRequest(output_dir=folder))


def test_a_full_disk_leaves_old_files_and_nothing_else(tmp_path):
    request = {"output_dir": tmp_path, **SMALL}
    before = {path: path.read_bytes() for path in run(GenArithmeticRequest(**request))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(MachineError, match="could not be written"):
            run(GenArithmeticRequest(output_dir=tmp_path, force=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_script_passes_its_flags_to_the_venv_beside_it(tmp_path):
    script = tmp_path / "scripts" / "create_arithmetic_data.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / "scripts" / "create_arithmetic_data.sh", script)
    bare = {"PATH": "/usr/bin:/bin"}
    absent = subprocess.run([script], env=bare, capture_output=True, text=True, check=False)
    assert absent.returncode == 2
    assert "scripts/setup.sh" in absent.stderr
    program = tmp_path / ".venv" / "bin" / "llama2tut"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    program.chmod(0o755)
    found = subprocess.run([script, "--ops", "add sub"], env=bare, capture_output=True, text=True, check=True)
    assert found.stdout == "gen-arithmetic|--ops|add sub|"
