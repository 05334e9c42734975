"""The parts of the server that need no server: strict JSON, forms, limits, settings, logs and feeds."""

from __future__ import annotations

import logging
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as some

from luthier.errors import (
    CallError,
    ConflictError,
    DatabaseError,
    DiskFullError,
    LuthierError,
    NotFoundError,
    SpecError,
)
from luthier.jobs.job import JobEvent
from luthier.jobs.keys import Key
from luthier.server.bodies import _Form, clean_filename
from luthier.server.json_text import MOST_DEPTH, read_json
from luthier.server.limits import Traffic
from luthier.server.logs import JsonLines, redact
from luthier.server.problems import describe_problem, dialect_of, problem, render_problem, status_of
from luthier.server.settings import Limits, Settings, read_limits, read_offers, read_settings
from luthier.server.stream import _Feed, sse

_PLAIN = some.text(some.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
_JSON = some.recursive(
    some.none() | some.booleans() | some.integers(-(2**63), 2**63 - 1) | _PLAIN,
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(_PLAIN, inner, max_size=4),
    max_leaves=20,
)


@given(_JSON)
def test_any_plain_document_is_read_as_it_is(document: object) -> None:
    assert read_json(orjson.dumps(document)) == document


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"NaN", "not JSON"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'[{"a": {"b": 1, "b": 2}}]', "stands twice"),
        (b'"\\u0000"', "NUL"),
        (b'{"\\u0000": 1}', "NUL"),
        (b'"\\ud800"', "not JSON"),
        (b"9223372036854775808", "64 bits"),
        (b"[" * (MOST_DEPTH + 1) + b"]" * (MOST_DEPTH + 1), "deep"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_what_two_readers_could_read_differently_is_refused(body: bytes, told: str) -> None:
    with pytest.raises(LuthierError, match=told) as raised:
        read_json(body)
    assert status_of(raised.value) == 400


def _form_body(content: bytes) -> bytes:
    return (
        b'--b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'
        b'fine-tune\r\n--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        + content
        + b"\r\n--b--\r\n"
    )


@given(content=some.binary(max_size=300), cuts=some.lists(some.integers(0, 500), max_size=8))
def test_a_form_is_the_same_however_it_is_cut_on_the_way(content: bytes, cuts: list[int]) -> None:
    body = _form_body(content)
    places = sorted({0, len(body), *(cut % len(body) for cut in cuts)})
    form = _Form(b"b", "file")
    got = [piece for start, end in pairwise(places) for piece in form.feed(body[start:end])]
    form.end()
    assert form.fields == {"purpose": "fine-tune"}
    assert {name for name, _ in got} == {"a.jsonl"}
    assert b"".join(data for _, data in got) == content


@given(some.text(max_size=400))
def test_a_clean_filename_is_one_printable_name(name: str) -> None:
    shown = clean_filename(name)
    assert 0 < len(shown) <= 255
    assert shown.isprintable()
    assert not set(shown) & set("/\\\0")


def _key(name: str = "k") -> Key:
    return Key(name, "default", frozenset({"read"}))


def test_requests_come_back_with_time() -> None:
    now = 0.0
    traffic = Traffic(Limits(requests_per_second=2, requests_at_once=3), clock=lambda: now)
    for _ in range(3):
        traffic.admit(_key())
    with pytest.raises(LuthierError) as raised:
        traffic.admit(_key())
    assert status_of(raised.value) == 429
    assert render_problem("/v1/files", raised.value).headers["retry-after"] == "1"
    traffic.admit(_key("other"))
    now = 0.5
    traffic.admit(_key())
    with pytest.raises(LuthierError):
        traffic.admit(_key())
    now = 1000.0
    for _ in range(3):
        traffic.admit(_key())
    with pytest.raises(LuthierError):
        traffic.admit(_key())


def test_what_is_counted_is_let_go_also_after_an_error() -> None:
    traffic = Traffic(Limits(uploads=1, streams=1))
    with suppress(KeyError), traffic.uploading(_key()):
        with pytest.raises(LuthierError), traffic.uploading(_key()):
            pass
        raise KeyError
    with traffic.uploading(_key()), traffic.streaming(_key()), pytest.raises(LuthierError):
        traffic.check_stream(_key())
    traffic.check_stream(_key())


def test_settings_reach_another_process_as_they_are(tmp_path: Path) -> None:
    settings = Settings(
        tmp_path,
        "sqlite:///x",
        models=tmp_path,
        allowed_models=("a/*",),
        offers={"H100": "cpu"},
        limits=Limits(uploads=3),
    )
    assert read_settings(settings.as_json()) == settings
    assert read_limits(("uploads=3", "requests_per_second=0.5")) == Limits(uploads=3, requests_per_second=0.5)
    assert read_offers(("H100=cpu", "A100=cuda")) == {"H100": "cpu", "A100": "cuda"}
    for wrong in ("none=1", "uploads=x", "uploads=-1", "uploads"):
        with pytest.raises(CallError):
            read_limits((wrong,))
    with pytest.raises(CallError):
        read_offers(("H100",))


@pytest.mark.parametrize(
    ("base", "is_allowed"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("practice", True),
        ("/etc", False),
        ("..", False),
        ("../..", False),
        ("ft:a:b", False),
    ],
)
def test_without_a_list_every_name_is_given_and_no_place(base: str, is_allowed: bool) -> None:
    assert Settings(Path("home"), "sqlite:///x").allows(base) is is_allowed
    assert not Settings(Path("home"), "sqlite:///x", allowed_models=("meta/*",)).allows(base)


SECRETS = ["ftk_abcdefghijkl_" + "S" * 43, "tml-ftk_abcdefghijkl_" + "S" * 43, "hf_SSSSSSSSSSSS", "sk-SSSSSSSSSSSS"]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_log_line_has_no_secret_wherever_it_stands(secret: str) -> None:
    try:
        raise ValueError(f"with {secret}")
    except ValueError as error:
        facts = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "key %s", (secret,), facts)
    record.request = f"req {secret}"
    line = JsonLines().format(record)
    assert "SSSS" not in line
    assert orjson.loads(line)["level"] == "error"
    assert redact("postgresql://me:SSSS@host/db") == "postgresql://[redacted]@host/db"
    assert redact("Authorization: Bearer SSSS") == "Authorization: [redacted]"


def test_each_kind_of_error_has_its_status_and_each_path_its_shape() -> None:
    errors = (
        (SpecError("x"), 400),
        (NotFoundError("x"), 404),
        (ConflictError("x"), 409),
        (DatabaseError("x"), 503),
        (DiskFullError("x"), 507),
        (problem(415, "x"), 415),
    )
    for error, status in errors:
        assert status_of(error) == status
    assert [dialect_of(path) for path in ("/v1", "/v1/x", "/v1x", "/api", "/api/v1/y", "/", "/luthier/v1/z")] == [
        *("openai", "openai", "own", "synth", "synth", "own", "own"),
    ]
    shown = describe_problem("/api/x", ConflictError("so", hint="do"), 409)
    assert shown["detail"] == "so; do"
    assert render_problem("/v1/x", ConflictError("so")).headers["x-should-retry"] == "false"
    assert int(render_problem("/x", DatabaseError("so")).headers["retry-after"]) >= 1


def _event(seq: int) -> JobEvent:
    return JobEvent(seq, 0.0, "info", "note", str(seq))


@given(
    batches=some.lists(some.integers(1, 7), max_size=12),
    start=some.integers(0, 5),
    asked=some.integers(0, 60),
)
def test_a_feed_gives_what_follows_or_says_that_it_does_not_know(batches: list[int], start: int, asked: int) -> None:
    import asyncio

    async def scenario() -> None:
        feed = _Feed()
        assert feed.after(asked) is None
        feed.newest = start
        last = start
        for size in batches:
            feed.add([_event(last + 1 + index) for index in range(size)])
            feed.add([_event(last + 1)])  # told twice
            last += size
        found = feed.after(asked)
        if asked < start:
            assert found is None or [each.seq for each in found] == list(range(asked + 1, last + 1))
        else:
            assert found == [_event(seq) for seq in range(asked + 1, last + 1)]

    asyncio.run(scenario())


def test_an_event_is_one_line_of_data() -> None:
    raw = sse({"text": "a\nb\r\n\ndata: x"}, seq=7)
    assert raw.startswith(b"id: 7\ndata: ")
    assert raw.count(b"\n") == 3
    assert raw.endswith(b"\n\n")
