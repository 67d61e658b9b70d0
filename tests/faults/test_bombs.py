"""Input that has no end, unpacks without measure, or takes a library down: refused by name, and soon."""

import http.server
import io
import json
import os
import shutil
import sys
import threading
import zlib

import pytest
from world import World, edit_json, tuned, write

ASK = "infer --model toy --prompt a --max-new-tokens 1"


@pytest.fixture
def ready(world, monkeypatch) -> World:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tuned(world)
    return world


def refused(world: World, line: str, *words: str) -> None:
    before = world.snapshot()
    done = world.main(line.split(), terminal=False)
    assert (done.code, done.out) == (2, ""), done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err
    assert world.snapshot() == before


@pytest.mark.parametrize(("name", "line"), [
    ("toy/model.safetensors", ASK), ("toy/tokenizer.json", ASK), ("toy/generation_config.json", ASK),
    ("toy/config.json", ASK), ("tuned/adapter_model.safetensors", "merge --adapter tuned --output-dir m"),
    ("tuned/adapter_config.json", "compare --adapter tuned"), ("tuned/llama2tut.yaml", "compare --adapter tuned"),
    ("data/arithmetic/arithmetic_train.csv", "finetune --task arithmetic --model toy"),
    ("recipe.yaml", "finetune --task arithmetic --model toy --config recipe.yaml"),
    ("task.yaml", "finetune --task task.yaml --model toy"), ("task.py", "finetune --task task.py --model toy")])
def test_a_pipe_in_the_place_of_a_file_hangs_nobody(ready, name, line):
    (ready.folder / name).unlink(missing_ok=True)
    os.mkfifo(ready.folder / name)
    refused(ready, line, name.rpartition("/")[2].partition(".")[0])


@pytest.mark.parametrize("line", [
    "infer --model toy --prompt-file /dev/zero", "gen-arithmetic --output-dir d --templates /dev/zero",
    "finetune --task arithmetic --model toy --config /dev/zero.yaml", "compare --adapter tuned --prompt-file /dev/zero",
    "finetune --task arithmetic --model toy --data /dev/zero"])
def test_devices_are_no_input(ready, line):
    refused(ready, line, "/dev/zero")


def test_a_pipe_of_prompts_is_read(ready):
    done = ready.shell(f"CUDA_VISIBLE_DEVICES= {{llama2tut}} {ASK.replace('--prompt a', '--prompt-file <(echo a)')}")
    assert done.code == 0, done.err


def test_prompts_without_an_end_are_refused(ready, monkeypatch):
    monkeypatch.setattr("llama2tut.commands.infer._LARGEST", 1000)
    ready.stdin = b"a" * 2000
    refused(ready, "infer --model toy", "standard input", "1,000 bytes")


def parquet(world: World, table, **options) -> None:
    from pyarrow import parquet as writer

    whole = io.BytesIO()
    writer.write_table(table, whole, compression="zstd", **options)
    assert whole.tell() < 600_000
    (world.folder / "x.parquet").write_bytes(whole.getvalue())


def test_parquet_that_unpacks_without_measure(ready):
    import pyarrow

    cells = pyarrow.DictionaryArray.from_arrays([0] * 5_000, ["a" * 1_000_000])
    parquet(ready, pyarrow.table(dict.fromkeys(("instruction", "output", "answer"), cells)))
    refused(ready, "finetune --task arithmetic --model toy --data x.parquet", "x.parquet", "MiB")


def test_parquet_of_nothing_but_rows(ready):
    import pyarrow

    parquet(ready, pyarrow.table({"answer": pyarrow.nulls(10_000_000, pyarrow.string())}))
    refused(ready, "finetune --task arithmetic --model toy --data x.parquet", "x.parquet", "MiB")


def test_a_date_that_python_has_not(ready):
    import pyarrow

    stamps = pyarrow.array([253_402_300_800] * 30, pyarrow.timestamp("s"))
    parquet(ready, pyarrow.table(dict.fromkeys(("instruction", "output", "answer"), stamps)))
    refused(ready, "finetune --task arithmetic --model toy --data x.parquet", "x.parquet")


def test_columns_without_measure(ready):
    write("x.csv", ",".join(f"c{number}" for number in range(100_000)) + "\n" + "," * 99_999 + "\n")(ready)
    refused(ready, "finetune --task arithmetic --model toy --data x.csv", "x.csv", "columns")


@pytest.mark.parametrize(("key", "value"), [
    ("num_labels", 1_000_000_000), ("head_dim", "16"), ("head_dim", [16]), ("num_key_value_heads", "2"),
    ("num_key_value_heads", {}), ("return_dict", False), ("return_dict", "x"), ("sliding_window", "x"),
    ("sliding_window", 4), ("layer_types", 7), ("layer_types", ["sliding_attention"] * 2), ("rms_norm_eps", "x"),
    ("rope_theta", []), ("max_position_embeddings", "512"), ("num_hidden_layers", 10**9), ("hidden_act", 3),
    ("tie_word_embeddings", "no"), ("num_key_value_heads", 0)])
def test_a_field_of_the_wrong_kind(ready, key, value):
    edit_json("toy/config.json", **{key: value})(ready)
    refused(ready, ASK, key)


@pytest.mark.parametrize("normalizer", [
    {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 1_000_000},
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 20},
    {"type": "Prepend", "prepend": "a" * 1_000_000}], ids=["at once", "doubled", "in front"])
def test_a_tokenizer_that_makes_a_megabyte_of_a_letter(ready, normalizer):
    edit_json("toy/tokenizer.json", normalizer=normalizer)(ready)
    refused(ready, ASK, "tokenizer.json")


@pytest.mark.parametrize(("key", "value"), [("model_max_length", ""), ("model_max_length", []), ("padding_side", 7)])
def test_a_tokenizer_with_settings_of_the_wrong_kind(ready, key, value):
    edit_json("toy/tokenizer_config.json", **{key: value})(ready)
    refused(ready, ASK, "tokenizer")


def test_a_library_that_panics_over_a_file(ready, monkeypatch):
    class PanicException(BaseException):
        """As pyo3 raises it: past every `except Exception`."""

    def panic(*_, **__):
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    refused(ready, ASK, "tokenizer")


@pytest.mark.parametrize("line", [
    f"infer --model {'n' * 300} --prompt a", f"infer --adapter {'n' * 300} --prompt a",
    f"infer --prompt-file {'n' * 300}", f"finetune --task arithmetic --model toy --data {'n' * 300}",
    f"finetune --task {'n' * 300}.yaml", f"finetune --task arithmetic --config {'n' * 300}.yaml",
    f"gen-arithmetic --templates {'n' * 300}", "infer --model ~nosuch --prompt a", "infer --model loop --prompt a",
    "infer --adapter loop --prompt a", "compare --adapter loop --adapter tuned", "infer --prompt-file loop",
    "finetune --task arithmetic --model toy --data loop", "finetune --task arithmetic --model toy --output-dir loop",
    "merge --adapter tuned --output-dir loop", "compare --adapter tuned --output loop"])
def test_names_that_no_disk_takes(ready, line):
    (ready.folder / "loop").symlink_to("loop")
    refused(ready, line)


def test_yaml_with_a_character_beyond_all(ready):
    write("x.yaml", 'data: "\\UFFFFFFFF"\nlr: 2024-01-01\nseed: 10000-01-01 00:00:00\n')(ready)
    refused(ready, "finetune --task arithmetic --model toy --config x.yaml", "x.yaml")


@pytest.mark.parametrize("settings", ["HF_HUB_DOWNLOAD_TIMEOUT=abc", "PYTHONOPTIMIZE=2"])
def test_a_variable_that_keeps_packages_from_starting(ready, settings):
    done = ready.shell(f"{settings} CUDA_VISIBLE_DEVICES= {{llama2tut}} {ASK}")
    assert (done.code, done.out) == (2, ""), done.err
    assert "Traceback" not in done.err
    assert settings[:3] in done.err


@pytest.fixture
def impostor():
    """A hub that answers every question with a page of its own."""
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("ETag", '"x"')
            self.send_header("X-Repo-Commit", "../../../etc")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"<h1>" if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("endpoint", ["file:///etc", "gopher://x", "http://[::1", "''", "impostor"])
def test_a_hub_that_is_none(world, impostor, endpoint):
    address = impostor if endpoint == "impostor" else endpoint
    done = world.shell(f"HF_HOME=$PWD/hf HF_HUB_OFFLINE=0 HF_ENDPOINT={address} timeout 60 {{llama2tut}} "
                       "infer --model org/name --prompt a")
    assert (done.code, done.out) == (2, ""), done.err
    assert "Traceback" not in done.err
    assert {path.name for path in world.folder.iterdir()} <= {"hf"}


def test_a_folder_that_is_gone(ready):
    done = ready.shell("mkdir gone; cd gone; rmdir ../gone; {llama2tut} gen-arithmetic; a=$?; {llama2tut} merge "
                       "--adapter a --output-dir b; exit $((a + $?))")
    assert done.code == 4, done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("std::bad_alloc"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
@pytest.mark.parametrize(("line", "where"), [
    ("gen-arithmetic --output-dir d", "llama2tut.commands.gen_arithmetic.generate"),
    ("finetune --task arithmetic --model toy", "llama2tut.training.engine.train"),
    (ASK, "llama2tut.inference.generate.Generator.stream"),
    ("compare --adapter tuned", "llama2tut.inference.generate.Generator._decode"),
    ("merge --adapter tuned --output-dir m", "llama2tut.commands.merge._merged")])
def test_a_full_memory_is_no_defect(ready, monkeypatch, line, where, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(where, full)
    done = ready.main(line.split(), terminal=False)
    assert (done.code, done.out) == (2, ""), done.err
    assert "memory" in done.err


def test_a_defect_of_ours_stays_one(ready, monkeypatch):
    def broken(*_, **__):
        return {}["a"]

    monkeypatch.setattr("llama2tut.commands.merge._refuse_taken", broken)
    done = ready.main(["merge", "--adapter", "tuned", "--output-dir", "m"], terminal=False)
    assert done.code == 1
    assert "this is a defect in llama2tut" in done.err


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_rows_beyond_the_memory(world):
    done = world.shell("ulimit -v 400000; {llama2tut} gen-arithmetic --train 3000000 --max-number 100000")
    assert done.code == 2, done.err
    assert "memory" in done.err
    assert not (world.folder / "data").exists()


@pytest.mark.parametrize("space", ["\u00a0", "\ufeff", "\u200b", "\x01", "\x1f", "\u2060", "\u3000", "\v", "\u202a"])
def test_no_space_of_any_kind_lets_a_formula_run(space):
    from llama2tut.reports.exports import _FORMULA

    assert _FORMULA.match(f"{space}=1+1")
    assert not _FORMULA.match(f"{space}a=1")


@pytest.mark.skipif(shutil.which("bash") is None, reason="limits are set by the shell")
@pytest.mark.parametrize("line", [ASK, "compare --adapter tuned --limit 1",
                                  "merge --adapter tuned --output-dir m"])
def test_a_process_that_may_not_have_more_memory(ready, line):
    """Whatever is refused first, a library's import or a tensor: never a traceback, never half a result."""
    done = ready.shell(f"ulimit -v 900000; CUDA_VISIBLE_DEVICES= {{llama2tut}} {line}")
    assert done.code in (0, 2), done.err[-3000:]
    assert not (ready.folder / "m").exists() or done.code == 0


def test_losses_of_nothing_but_zeros_make_a_page(ready):
    write("tuned/metrics.jsonl", "".join(json.dumps({"step": step, "loss": 0.0, "lr": 0.0}) + "\n"
                                         for step in range(1, 5)))(ready)
    line = ["compare", "--adapter", "tuned", "--limit", "2", "--max-new-tokens", "1", "--format", "html"]
    done = ready.main(line, terminal=False)
    assert done.code == 0, done.err


def test_an_archive_that_unpacks_without_measure(ready, monkeypatch):
    import py7zr

    with py7zr.SevenZipFile(ready.folder / "corpus.7z", "w") as file:
        file.writestr(b" " * 3_000_000, "train.json")
    assert (ready.folder / "corpus.7z").stat().st_size < 10_000
    monkeypatch.setattr("llama2tut.tables.archives.ARCHIVE_LIMIT", 2**20)
    refused(ready, "finetune --task samsum --model toy --data corpus.7z", "corpus.7z", "MiB")


def test_an_archive_of_nothing_but_names(ready):
    import py7zr

    with py7zr.SevenZipFile(ready.folder / "corpus.7z", "w") as file:
        for number in range(1_001):
            file.writestr(b"", f"{number}/train.json")
    refused(ready, "finetune --task samsum --model toy --data corpus.7z", "corpus.7z", "1,001 files")


def test_an_archive_that_lies_about_its_sizes(ready):
    """What its directory says bounds what is unpacked."""
    import py7zr
    from py7zr.archiveinfo import write_uint64

    def number(value):
        buffer = io.BytesIO()
        write_uint64(buffer, value)
        return buffer.getvalue()

    size, whole = 20_000_000, io.BytesIO()
    with py7zr.SevenZipFile(whole, "w") as file:
        file.set_encoded_header_mode(False)
        file.writestr(b" " * size, "train.json")
    data = whole.getvalue()
    start = 32 + int.from_bytes(data[12:20], "little")
    directory = data[start:].replace(number(size), number(size // 8))
    head = data[12:20] + len(directory).to_bytes(8, "little") + zlib.crc32(directory).to_bytes(4, "little")
    lying = data[:8] + zlib.crc32(head).to_bytes(4, "little") + head + data[32:start] + directory
    write("corpus.7z", lying)(ready)
    refused(ready, "finetune --task samsum --model toy --data corpus.7z", "corpus.7z", "not a readable 7z archive")


@pytest.mark.parametrize("nest", ["[", '{"a":', "- "])
@pytest.mark.parametrize(("name", "line"), [
    ("x.jsonl", "infer --model toy --prompt-file x.jsonl"), ("x.jsonl", "compare --adapter tuned --answers x.jsonl"),
    ("x.jsonl", "infer --model toy --prompt-file p.jsonl --output x.jsonl"),
    ("x.json", "compare --adapter tuned --votes x.json"),
    ("x.yaml", "finetune --task x.yaml --model toy --data p.jsonl"),
    ("x.jsonl", "finetune --task chat --model toy --data x.jsonl")])
def test_nesting_without_end(ready, name, line, nest):
    write("p.jsonl", '{"prompt": "a"}\n')(ready)
    write(name, nest * 20_000 + "\n")(ready)
    refused(ready, line, name)


def test_a_clock_that_jumps(ready, monkeypatch):
    """Wall time is for people only: a run and its files do not care, nor which adapter is the newest one."""
    import random
    import time

    now, jumps = time.time, random.Random(1)
    monkeypatch.setattr(time, "time", lambda: now() + jumps.uniform(-1e9, 1e9))
    line = "finetune --task arithmetic --model toy --max-steps 3 --limit 8 --save-steps 1"
    done = ready.main(line.split(), terminal=False)
    assert done.code == 0, done.err
    for path in (ready.folder / "outputs/arithmetic").rglob("*"):
        os.utime(path, (4e9, 4e9))
    line = "compare --limit 1 --max-new-tokens 1"
    done = ready.main(line.split(), terminal=False)
    assert done.code == 0, done.err
