"""Data: files of every format that are not what they should be, and prompts."""

import io
import json

from world import Preparation, Row, World, cut, folder, remove, rows, toy, tuned, write

RUN = "finetune --task arithmetic --model toy --data"
HEAD = "instruction,input,output,answer\n"
TRAIN = "data/arithmetic/arithmetic_train.csv"
LINES = "".join(f"What is {n}+1?,{n} + 1,{n} + 1 = {n + 1},{n + 1}\n" for n in range(30))
OBJECTS = [{"instruction": f"{n}?", "input": "x", "output": f"= {n}", "answer": str(n)} for n in range(30)]


def data(content: str | bytes, name: str = "mine.csv"):
    """One file of rows, in the test's folder."""
    return (toy, write(name, content))


def parquet(size: int) -> Preparation:
    """The first `size` bytes of a parquet file."""
    def prepare(world: World) -> None:
        import pyarrow
        from pyarrow import parquet as writer

        whole = io.BytesIO()
        writer.write_table(pyarrow.Table.from_pylist(OBJECTS), whole)
        (world.folder / "mine.parquet").write_bytes(whole.getvalue()[:size])
    return prepare


def archive(member: str, content: bytes) -> Preparation:
    """A 7z archive with one member, whatever its name: py7zr's own guards are off while it is made."""
    def prepare(world: World) -> None:
        import py7zr

        with world.monkeypatch.context() as unguarded:
            unguarded.setattr(py7zr.SevenZipFile, "_sanitize_archive_arcname", staticmethod(str))
            unguarded.setattr(py7zr.py7zr, "check_archive_path", lambda name: True)
            with py7zr.SevenZipFile(world.folder / "corpus.7z", "w") as file:
                file.writestr(content, member)
    return prepare


SAMSUM = json.dumps([{"id": str(n), "dialogue": f"A: {n}", "summary": f"{n}."} for n in range(40)]).encode()

ROWS = (
    Row(what="one file of rows", argv=f"{RUN} mine.csv --dry-run", given=data(HEAD + LINES), code=0,
        says=(": 30 rows: 18 train, 6 validation, 6 test, held out by seed 42; ", "18 train / 6 validation")),
    Row(what="no data yet", argv="finetune --task arithmetic --model toy", given=(toy,),
        says=("--data: data/arithmetic: no such folder in ", "; make it with llama2tut gen-arithmetic",)),
    Row(what="a file that is not there", argv=f"{RUN} nowhere.csv", given=(toy,),
        says=("--data: nowhere.csv: no such file or folder in ", "; mend it, or name a hub id",)),
    Row(what="a device for data", argv=f"{RUN} /dev/null", given=(toy,), says=("--data: /dev/null: no such file",)),
    Row(what="faults of data, model and folder together", argv=f"{RUN} nowhere.csv --model gone --output-dir taken",
        says=("--model stands twice",)),
    Row(what="faults of data and model together", argv="finetune --task arithmetic --data nowhere.csv --model gone",
        says=("--data: nowhere.csv: no such file", "--model gone: there is no such folder or model")),
    Row(what="an empty file", argv=f"{RUN} mine.csv", given=data(""), says=("file is empty; put rows into it",)),
    Row(what="a header alone", argv=f"{RUN} mine.csv", given=data(HEAD), says=("no train rows (there: none)",)),
    Row(what="a NUL byte", argv=f"{RUN} mine.csv", given=data(HEAD + "a,b,\0,d\n"),
        says=("mine.csv: line 2: a NUL byte (0x00 at offset 36); save the file as UTF-8",)),
    Row(what="a byte that is not UTF-8", argv=f"{RUN} mine.csv",
        given=data((HEAD + "x,y,z,1\n").encode() + b"caf\xe9,,,\n"),
        says=("mine.csv: line 3: a byte that is not UTF-8 (0xe9",)),
    Row(what="a quote that never ends", argv=f"{RUN} mine.csv", given=data(HEAD + 'a,"b,c,d\n'),
        says=("mine.csv: row 1, from line 2: unexpected end of data; mend its quotes",)),
    Row(what="a row with a cell too many", argv=f"{RUN} mine.csv", given=data(f"{HEAD}{LINES}a,b,c,d,e\n"),
        says=("mine.csv: row 31: 5 cells under 4 columns; quote cells that hold commas",)),
    Row(what="two columns of one name", argv=f"{RUN} mine.csv",
        given=data("instruction,output,answer,answer\na,b,c,d\n"),
        says=("mine.csv: two columns are called 'answer'; rename one",)),
    Row(what="a column too few", argv=f"{RUN} mine.csv", given=data("instruction,output\na,b\n"),
        says=("mine.csv: no column 'answer' (there: 'instruction', 'output'; task arithmetic needs",)),
    Row(what="a row without its answer", argv=f"{RUN} mine.csv", given=data(f"{HEAD}{LINES}a,b,c, \n"),
        says=("mine.csv: column 'answer': empty in row 31; mend or delete them",)),
    Row(what="a folder without rows", argv=f"{RUN} empty", given=(toy, folder("empty")),
        says=("folder empty: no csv, json, jsonl or parquet file with train, validation (val, dev) or test",)),
    Row(what="a folder with two training files", argv=f"{RUN} data/arithmetic",
        given=(toy, rows, write("data/arithmetic/my_train.csv", HEAD + LINES)),
        says=("folder data/arithmetic: several train files",)),
    Row(what="training rows that stand in the test", argv=f"{RUN} data/arithmetic",
        given=(toy, rows, lambda world: (world.folder / TRAIN).write_bytes(
            (world.folder / TRAIN.replace("train", "test")).read_bytes())),
        says=("20 of 20 train rows stand in test too", "delete them from one of the two")),
    Row(what="a file that ends in the middle of a row", argv=f"{RUN} mine.csv", given=data(f"{HEAD}{LINES}What is"),
        says=("mine.csv: row 31: 1 cells under 4 columns",)),
    Row(what="a cell of 10 MB beside the task's columns", argv=f"{RUN} mine.csv --dry-run", code=0,
        given=data(f"{HEAD}{LINES}a,{'9' * 10_000_000},c,d\n"), says=("19 train / 6 validation",), lacks=("9" * 100,)),
    Row(what="a cell that no context holds", argv=f"{RUN} mine.csv --dry-run", lacks=("9" * 100,),
        given=data(f"{HEAD}{LINES}{'9' * 100_000},b,c,d\n"),
        says=("the prompt takes 100050 tokens where 254 are left beside the answer; shorten the row",)),
    Row(what="broken json", argv=f"{RUN} mine.json", given=data('[{"a": 1},\n {"b" 2}]', "mine.json"),
        says=("mine.json: line 2, column 7: Expecting ':' delimiter; mend it: a list of objects, or one",)),
    Row(what="json without objects", argv=f"{RUN} mine.json", given=data("[1, 2]", "mine.json"),
        says=("mine.json: 2 rows (1, 2): no object; make each row an object",)),
    Row(what="json nested without an end", argv=f"{RUN} mine.json", given=data("[" * 100_000, "mine.json"),
        says=("mine.json: line 1: nested too deep",)),
    Row(what="a broken line of jsonl", argv=f"{RUN} mine.jsonl", given=data('{"a": 1}\n{"a": \n', "mine.jsonl"),
        says=("mine.jsonl: line 2, column 7: Expecting value",)),
    Row(what="a broken line of jsonl before a whole one", argv=f"{RUN} mine.jsonl",
        given=data('{"a": 1}\n{"a": \n{"a": 1}\n', "mine.jsonl"), says=("mine.jsonl: line 3", "begins on line 2")),
    Row(what="cells that are no text", argv=f"{RUN} mine.json",
        says=("mine.json: column 'answer': not text but list in",),
        given=data(json.dumps([row | {"answer": ["x"]} for row in OBJECTS]), "mine.json")),
    Row(what="half of a surrogate pair", argv=f"{RUN} mine.json",
        says=("it holds half of a surrogate pair in 30 rows",),
        given=data(json.dumps([row | {"output": "\ud800"} for row in OBJECTS]), "mine.json")),
    Row(what="rows in parquet", argv=f"{RUN} mine.parquet --dry-run", given=(toy, parquet(1_000_000)), code=0,
        says=("18 train / 6 validation",)),
    Row(what="parquet that ends early", argv=f"{RUN} mine.parquet", given=(toy, parquet(300)),
        says=("mine.parquet: not a readable parquet file",)),
    Row(what="text in parquet's name", argv=f"{RUN} mine.parquet", given=data("a,b\n1,2\n", "mine.parquet"),
        says=("mine.parquet: not a readable parquet file",)),
    Row(what="rows in an archive", argv="finetune --task samsum --model toy --data corpus.7z --dry-run", code=0,
        given=(toy, archive("train.json", SAMSUM)), says=("24 train / 8 validation",)),
    Row(what="an archive that is none", argv="finetune --task samsum --model toy --data corpus.7z",
        given=data(b"PK\x03\x04", "corpus.7z"), says=("corpus.7z: not a readable 7z archive", "download it again")),
    Row(what="an archive that ends early", argv="finetune --task samsum --model toy --data corpus.7z",
        given=(toy, archive("train.json", SAMSUM), cut("corpus.7z", -40)),
        says=("corpus.7z: not a readable 7z archive",)),
    Row(what="an archive with a path that leaves it", argv="finetune --task samsum --model toy --data corpus.7z",
        given=(toy, archive("../../train.json", SAMSUM)),
        says=("corpus.7z: its member '../../train.json' leaves the archive",)),
    Row(what="an archive with a path from the root", argv="finetune --task samsum --model toy --data corpus.7z",
        given=(toy, archive("/tmp/train.json", SAMSUM)), says=("its member '/tmp/train.json' leaves the archive",)),
    Row(what="a saved data set that is spoilt", argv=f"{RUN} saved",
        given=(toy, write("saved/dataset_dict.json", '{"splits": ["train"]}')),
        says=("folder saved: datasets cannot load it", "save it again")),
    Row(what="a data set that the hub has, and no network", argv=f"{RUN} someone/rows", given=(toy,),
        says=("--data: someone/rows: not here, nor from the hub", "unset HF_HUB_OFFLINE, name a local copy, or")),
    Row(what="a data set with a script", argv="finetune --task samsum --model toy --data Samsung/samsum", given=(toy,),
        says=("Samsung/samsum is a script data set, which can no longer be loaded; use --data knkarthick/samsum",)),
    Row(what="a prompt file that is not there", argv="infer --model toy --prompt-file gone.txt", given=(toy,),
        says=("--prompt-file gone.txt cannot be read (No such file or directory)",)),
    Row(what="an empty prompt file", argv="infer --model toy --prompt-file p.txt", given=(toy, write("p.txt", " \n")),
        says=("--prompt-file p.txt is empty; write a prompt into it",)),
    Row(what="a prompt file that is not UTF-8", argv="infer --model toy --prompt-file p.txt",
        given=(toy, write("p.txt", b"caf\xe9")), says=("--prompt-file p.txt: byte 3 is not UTF-8",)),
    Row(what="a prompt that is no object", argv="infer --model toy --prompt-file p.jsonl",
        given=(toy, write("p.jsonl", '{"prompt": "a"}\n["b"]\n')),
        says=("--prompt-file p.jsonl, line 2: not an object",)),
    Row(what="a prompt longer than the model reads", argv="infer --model toy --prompt-file p.txt",
        given=(toy, write("p.txt", "9" * 600)), says=("prompt 1 has 601 tokens where 256 fit beside the answer",)),
    Row(what="answers of other prompts in the output", argv="infer --model toy --prompt-file p.jsonl --output a.jsonl",
        given=(toy, write("p.jsonl", '{"prompt": "a"}\n'), write("a.jsonl", '{"prompt": "b", "completion": "x"}\n')),
        says=("--output a.jsonl holds other rows than these prompts; give another file, or remove it",)),
    Row(what="half a line in the output", argv="infer --model toy --prompt-file p.jsonl --output a.jsonl",
        given=(toy, write("p.jsonl", '{"prompt": "a"}\n'), write("a.jsonl", '{"prompt": "a", "compl')),
        says=("--output a.jsonl ends in half a line; remove that line",)),
    Row(what="a folder for an output", argv="infer --model toy --prompt-file p.jsonl --output d",
        given=(toy, folder("d"), write("p.jsonl", '{"prompt": "a"}\n')), says=("--output d is a folder",)),
    Row(what="rows of a split that is not there", argv="compare --adapter tuned --split validation",
        given=(tuned, remove("data/arithmetic/arithmetic_validation.csv"),
               remove("data/arithmetic/arithmetic_train.csv")), says=("no validation rows (there: test)",)),
    Row(what="a chat for a task with several columns", argv="infer --model toy --task two.yaml --prompt hi",
        given=(toy, write("two.yaml", "prompt: '{a} {b}'\ntarget: c\n")),
        says=("--task two.yaml fills a, b into its prompt, which one text cannot",)),
)
