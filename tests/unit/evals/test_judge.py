"""The judge, against a server of our own: what is sent, what is made of it, and what happens when it fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from luthier.errors import CallError, JudgeError
from luthier.evals.judge import KEY, Judge, Pair, build_judge, judge_pair, judge_pairs, read_judgement

HI = [{"role": "user", "content": "hi"}]


class Endpoint(ThreadingHTTPServer):
    """Replies by a function of the request's body; statuses that stand in `failing` come first."""

    def __init__(self, reply: Callable[[dict[str, Any]], Any]) -> None:
        self.reply, self.failing = reply, list[int]()
        self.seen: list[tuple[str, str, dict[str, Any]]] = []
        super().__init__(("127.0.0.1", 0), Request)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Request(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization", ""), body))
        status = self.server.failing.pop(0) if self.server.failing else 200
        said = self.server.reply(body) if status == 200 else {"error": "key sk-abcdefghijklmnop1234 is busy"}
        self.send_response(status)
        self.send_header("Location", f"{self.server.url}/elsewhere")
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def log_message(self, *_: Any) -> None:
        pass


def chat(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint(lambda body: chat("They differ.\nA"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_sent(endpoint: Endpoint) -> None:
    judge = Judge(endpoint.url, "mine", key="abc")
    assert judge.ask(HI) == "They differ.\nA"
    (path, key, body) = endpoint.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer abc")
    assert body == {"model": "mine", "messages": HI, "temperature": 0}
    Judge(f"{endpoint.url}/chat/completions", "mine").ask(HI)
    assert endpoint.seen[1][:2] == ("/v1/chat/completions", "")


def test_a_busy_judge_is_asked_again(endpoint: Endpoint) -> None:
    waits: list[float] = []
    endpoint.failing = [429, 503]
    assert Judge(endpoint.url, "mine", pause=waits.append).ask(HI).endswith("A")
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize("status", [302, 401, 404])
def test_a_refusal_is_final_and_shows_no_key(endpoint: Endpoint, status: int) -> None:
    endpoint.failing = [status]
    with pytest.raises(JudgeError, match=f"it answered {status}") as caught:
        Judge(endpoint.url, "mine", key="busy").ask(HI)
    assert "sk-abc" not in caught.value.message
    assert "busy" not in caught.value.message
    assert len(endpoint.seen) == 1


def test_nobody_there(endpoint: Endpoint) -> None:
    waits: list[float] = []
    free = Endpoint(lambda body: {})
    free.server_close()
    with pytest.raises(JudgeError, match="gave no judgement"):
        Judge(free.url, "mine", pause=waits.append).ask(HI)
    assert len(waits) == 3


@pytest.mark.parametrize("reply", [{}, [], {"choices": []}, {"choices": [{"message": {"content": None}}]}])
def test_a_reply_of_another_shape(endpoint: Endpoint, reply: Any) -> None:
    endpoint.reply = lambda body: reply
    with pytest.raises(JudgeError, match="not one of a chat endpoint"):
        Judge(endpoint.url, "mine").ask(HI)


@pytest.mark.parametrize(
    ("reply", "found"), [("A", "A"), ("A is good, but\nB", "B"), ("TIE.", "TIE"), ("neither", ""), ("**A**", "A")]
)
def test_reading_a_judgement(reply: str, found: str) -> None:
    assert read_judgement(reply) == found


def by_content(word: str) -> Callable[[Any], str]:
    """A judge that prefers the answer that holds a word, wherever it stands."""

    def ask(messages: Any) -> str:
        first = messages[-1]["content"].split("=== ANSWER A ===")[1].split("=== ANSWER B ===")[0]
        return "A" if word in first else "B"

    return ask


def test_both_orders_are_asked_and_a_favourite_place_gains_nothing() -> None:
    pair = Pair(HI, base="bad", tuned="good", reference="fine")
    assert judge_pair(by_content("good"), pair) == 1.0
    assert judge_pair(by_content("bad"), pair) == 0.0
    assert judge_pair(lambda _: "A", pair) == 0.5
    assert judge_pair(lambda _: "hm", pair) is None
    assert judge_pair(lambda _: pytest.fail("asked"), Pair(HI, "same", "same")) == 0.5
    shown = pair.render(is_tuned_first=True)[1]["content"]
    assert "=== A GOOD ANSWER ===\nfine" in shown
    assert shown.index("good") < shown.index("bad")


def test_many_are_judged_at_once_and_stay_in_order(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: chat(by_content("7")(body["messages"]))
    judge = Judge(endpoint.url, "mine")
    heard: list[tuple[int, int]] = []
    pairs = [Pair(HI, "x", str(number)) for number in range(10)]
    found = judge_pairs(judge.ask, pairs, lambda done, count: heard.append((done, count)))
    assert found == [1.0 if number == 7 else 0.5 for number in range(10)]
    assert heard[-1] == (10, 10)


@pytest.mark.parametrize(
    "url", ["localhost:80/v1", "ftp://host/v1", "http://", "https://" + "me:pw@localhost/v1", "http://localhost/v1?k=1"]
)
def test_no_address(url: str) -> None:
    with pytest.raises(CallError, match="no address of a judge"):
        build_judge(url, "mine")


def test_a_key_never_travels_unencrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_judge("http://judge.example.com/v1", "m").key == ""
    monkeypatch.setenv(KEY, "abc")
    with pytest.raises(CallError, match="would travel unencrypted"):
        build_judge("http://judge.example.com/v1", "m")
    assert build_judge("https://judge.example.com/v1", "m").key == "abc"
    assert build_judge("http://localhost:8000/v1", "m").key == "abc"
