"""The hub out of reach: asked once, for seconds, and then only the caches are read."""

import http.server
import threading

import huggingface_hub
import pytest

from llama2tut import hub


@pytest.fixture
def online(monkeypatch):
    """As without HF_HUB_OFFLINE, and with no hub asked yet; gives a function that sets the hub's address."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_silent", {})
    return lambda address: monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)


@pytest.fixture
def asked(online, monkeypatch):
    """What was asked of a hub that never answers, each with its patience in seconds."""
    questions = []

    def head(address, timeout):
        questions.append((address, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: type("Session", (), {"head": staticmethod(head)}))
    online("https://hub.example")
    return questions


def test_a_hub_that_answers_is_asked(online, reachable):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)  # any answer is one

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reachable.add(server.server_address)
        online(f"http://127.0.0.1:{server.server_port}")
        assert hub.out_of_reach() == ""
        server.shutdown()


def test_a_hub_that_does_not_is_asked_once_and_not_for_long(asked):
    for _ in range(3):
        assert hub.out_of_reach() == "the hub cannot be reached (timed out)"
    (question,) = asked
    assert question[1] <= 5
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "its own client would try on and on"


@pytest.mark.parametrize("address", ["file:///etc", "http://[::1", "", "http://127.0.0.1:9"])
def test_an_address_that_is_none_is_named(online, monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    online(address)
    assert hub.out_of_reach().startswith(f"HF_ENDPOINT {address} cannot be reached (")


@pytest.mark.parametrize(("line", "way"), [
    ("infer --model org/name --prompt a", "smollm2-135m"), ("finetune --task samsum --dry-run", "--data dialogues")])
def test_one_line_says_how_to_go_on(asked, run_cli, tmp_path, monkeypatch, line, way):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    done = run_cli(*line.split())
    assert (done.code, done.out) == (2, "")
    assert "the hub cannot be reached (timed out)" in done.err
    assert way in done.err
    assert done.err.count("\n") == 1
    assert len(asked) == 1
    assert not any(tmp_path.iterdir())


def test_a_model_in_the_cache_is_taken_from_there(asked, monkeypatch, toy_model_dir):
    from llama2tut.models.base_models import resolve

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(toy_model_dir / file))
    (note,) = resolve("org/name").notes
    assert "cannot be reached" in note
    assert "cache" in note


def test_switched_off_it_is_not_asked(asked, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.out_of_reach() == hub.SWITCHED_OFF
    assert asked == []
