"""Answers of files and of a server on loopback: what is asked, what is tried again, and what no fault loses."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llama2tut.console import Console
from llama2tut.errors import DataError, MachineError, UsageError
from llama2tut.inference import outside
from llama2tut.inference.outside import find_server, read_answers, read_prompts

PROMPTS = ["one\n---\n", "two", "three", "two"]


@pytest.fixture
def server(reachable, monkeypatch):
    """A completions server: its address, the requests that it got, and (path, body) -> (status, reply) to be set."""
    monkeypatch.setattr(outside, "_PAUSES", (0, 0))
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            asked.append((self.path, body, self.headers.get("Authorization")))
            status, found = served.answer(self.path, body)
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/v1/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = reply

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url, served.asked, served.answer = f"http://127.0.0.1:{served.server_port}", asked, echo
    reachable.add(served.server_address)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def echo(path, body):
    if path == "/v1/models":
        return 200, {"data": [{"id": "tuned"}]}
    cut = "stop" if body["prompt"] != "three" else "length"
    return 200, {"choices": [{"text": f"<{body['prompt']}>", "finish_reason": cut}], "usage": {"completion_tokens": 3}}


def test_prompts_are_asked_as_they_are_greedily_and_each_once(server):
    answers = find_server(server.url, None).answers(PROMPTS, 24, None, Console())
    assert answers.texts == [f"<{prompt}>" for prompt in PROMPTS]
    assert answers.cut == [False, False, True, False]
    assert answers.new_tokens == 12
    bodies = [body for path, body, _ in server.asked if path == "/v1/completions"]
    assert sorted(body["prompt"] for body in bodies) == sorted(set(PROMPTS))
    assert all((body["model"], body["max_tokens"], body["temperature"]) == ("tuned", 24, 0) for body in bodies)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(server, monkeypatch):
    monkeypatch.setenv(outside.KEY, "secret")
    found = find_server(f"{server.url}/v1/", "tuned")
    assert server.asked == [("/v1/models", None, "Bearer secret")]
    server.answer = lambda path, body: (302, {})
    with pytest.raises(MachineError, match="302"):
        found.answers(["one"], 4, None, Console())
    assert all(path != "/v1/elsewhere" for path, _, _ in server.asked)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_is_tried_again(server, status):
    found, faults = find_server(server.url, None), iter([status, status])
    server.answer = lambda path, body: (next(faults, 200), echo(path, body)[1])
    assert found.answers(["one"], 4, None, Console()).texts == ["<one>"]


def test_a_fault_is_one_line_and_loses_no_answer_that_came(server, tmp_path):
    found = find_server(server.url, None)
    server.answer = lambda path, body: (400, b"no such\nslot") if body["prompt"] == "two" else echo(path, body)
    prompts = ["one", "three", "two"]
    with pytest.raises(MachineError, match="HTTP 400 no such"):
        found.answers(prompts, 4, tmp_path, Console())
    came = {json.loads(line)["text"] for file in tmp_path.iterdir() for line in file.read_text().splitlines()}
    assert came
    del server.asked[:]
    server.answer = echo
    assert found.answers(prompts, 4, tmp_path, Console()).texts == ["<one>", "<three>", "<two>"]
    assert {body["prompt"] for _, body, _ in server.asked}.isdisjoint(text[1:-1] for text in came)
    del server.asked[:]
    found.answers(prompts, 4, tmp_path, Console())
    assert len(server.asked) == 3  # a whole set is never taken for what the server says now


@pytest.mark.parametrize("reply", [b"<html>", b"[" * 20_000, {"choices": []}, {"error": "x"}, [],
                                   {"choices": [{"text": "a"}] * 2}])
def test_a_reply_that_is_no_completion_is_refused(server, reply):
    found = find_server(server.url, None)
    server.answer = lambda path, body: (200, reply)
    with pytest.raises(MachineError, match="--server"):
        found.answers(["one"], 4, None, Console())


def test_a_model_is_named_where_there_are_several(server):
    server.answer = lambda path, body: (200, {"data": [{"id": "a"}, {"id": "b"}]})
    assert find_server(server.url, "b").model == "b"
    for model in (None, "c"):
        with pytest.raises(UsageError, match="a, b"):
            find_server(server.url, model)


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://a", "http://", "http://user:key@host", "http://a?key=1"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(UsageError, match="--server"):
        find_server(url, None)


def test_nobody_there(monkeypatch):
    monkeypatch.setattr(outside, "_PAUSES", ())
    with pytest.raises(MachineError, match="--server"):
        find_server("http://127.0.0.1:9", None)


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_answers_of_a_file_are_found_by_their_prompts(tmp_path):
    file = write(tmp_path / "my run.jsonl", {"prompt": "b", "completion": "B", "cut": True},
                 {"prompt": "a", "completion": ""})
    name, source, answers = read_answers(str(file), ["a", "b", "a"])
    assert (name, source, answers.texts, answers.cut) == ("my_run", str(file), ["", "B", ""], [False, True, False])
    assert read_answers(f"{file}:mine", ["a"])[0] == "mine"


@pytest.mark.parametrize("name", ["base", "finetuned_2", "prompt", "x_exact_match", "1a", "a b", "server"])
def test_a_name_that_would_hide_another_column_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="--answers"):
        read_answers(f"{write(tmp_path / 'a.jsonl', {'prompt': 'a', 'completion': 'A'})}:{name}", ["a"])


def test_two_answers_to_one_prompt_are_refused(tmp_path):
    once, again = {"prompt": "a", "completion": "A"}, {"prompt": "a", "completion": "B"}
    assert read_answers(str(write(tmp_path / "a.jsonl", once, once)), ["a"])[2].texts == ["A"]
    with pytest.raises(DataError, match="two ways"):
        read_answers(str(write(tmp_path / "a.jsonl", once, again)), ["a"])


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.JSONL"])
def test_prompts_one_a_line(tmp_path, name):
    assert read_prompts(write(tmp_path / name, {"prompt": "a"}, {"prompt": "b"})) == ["a", "b"]


def test_prompts_without_an_answer_are_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "A"})
    with pytest.raises(DataError, match="2 of 3 prompts"):
        read_answers(str(file), ["a", "b", "c"])
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="line 1"):
        read_answers(str(tmp_path / "b.jsonl"), ["a"])
