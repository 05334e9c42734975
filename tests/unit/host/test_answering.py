"""What is told of an answer: all before a stop, nothing that may become one, and every word of the rest."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from luthier.data.tokens import ModelText
from luthier.host.answering import Answer
from luthier.host.ask import Ask, Said, TokenSaid, read_ask, read_said
from luthier.runs.resolve import practice_folder

TEXT = ModelText(practice_folder())
# Letters of which some stand together in one token.
LETTERS = st.text("the", min_size=1, max_size=4)
PIECES = st.lists(LETTERS, max_size=12)


@given(PIECES, st.lists(LETTERS, max_size=3))
@example(["t", "h", "e"], ["h", "the"])
@example(["the"], ["h", "the"])
def test_stops_are_found_wherever_tokens_end(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    answer = Answer(Ask([], stop=tuple(stops)), lambda _: None, TEXT)
    ids = [number for piece in pieces for number in TEXT.tokenizer.encode(piece, add_special_tokens=False).ids]
    told = ""
    for place, token in enumerate(ids):
        answer.add(token)
        told += answer.take(is_last=place == len(ids) - 1)
        whole = [(found + len(stop), found) for stop in stops if (found := text.find(stop)) >= 0]
        assert text.startswith(told)
        assert not any(stop in told for stop in stops)
        if answer.is_stopped:
            assert told == text[: min(whole)[1]]
            return
    assert told == text
    assert not any(stop in text for stop in stops)


def test_both_ends_of_the_socket_read_what_the_other_writes() -> None:
    ask = Ask([{"role": "user", "content": "hi"}], None, "folder", 5, 0.5, 0.9, 3, 7, ("x", "y"), 2)
    assert read_ask(ask.encode()) == ask
    said = Said("text", (TokenSaid("a", -0.5, (("a", -0.5), ("b", -1.0))),), 3, 2, "stop", None)
    assert read_said(said.encode()) == said
