"""A conversation: what the model is shown, how text comes out of tokens, and what ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.data.tokens import ModelText
from luthier.engines.chat import Chat
from luthier.engines.verbs import SampleParams
from luthier.errors import CallError
from luthier.runs.resolve import ResolvedModel, practice_folder
from tests.unit.evals.scripted import Scripted

PRACTICE = ResolvedModel(practice_folder(), name="practice")
TEXT = ModelText(practice_folder())


def ids_of(text: str) -> list[int]:
    found: list[int] = TEXT.tokenizer.encode(text, add_special_tokens=False).ids
    return found


def chat_with(tmp_path: Path, said: str, **options: Any) -> tuple[Chat, Scripted]:
    sampler = Scripted(lambda prompt: ids_of(said))
    return Chat(PRACTICE, tmp_path, sampler=sampler, **options), sampler


def shown(sampler: Scripted) -> list[str]:
    return [str(TEXT.tokenizer.decode(prompt, skip_special_tokens=False)) for prompt in sampler.prompts]


def test_what_was_said_is_shown_again_until_a_reset(tmp_path: Path) -> None:
    chat, sampler = chat_with(tmp_path, "five", system="Be brief.")
    for said in ("2 plus 3?", "and 4 more?"):
        assert chat.answer(said, SampleParams(20), lambda _: None) == "five"
    chat.reset()
    chat.answer("hello", SampleParams(20), lambda _: None)
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    first, second, third = shown(sampler)
    assert first == f"{start}2 plus 3?{end}"
    assert second == f"{start}2 plus 3?{end}five<|im_end|>\n<|im_start|>user\nand 4 more?{end}"
    assert third == f"{start}hello{end}"
    assert sampler.params is not None
    assert TEXT.tokenizer.token_to_id("<|im_end|>") in sampler.params.stop_tokens


@pytest.mark.parametrize("text", ["plain words", "na\u00efve caf\u00e9", "\u4f60\u597d \U0001f600!", "line\n\nline"])
def test_text_comes_in_pieces_that_are_whole(text: str, tmp_path: Path) -> None:
    chat, _ = chat_with(tmp_path, text)
    heard: list[str] = []
    assert chat.answer("say it", SampleParams(100), heard.append) == text
    assert "".join(heard) == text
    assert not any("\ufffd" in piece for piece in heard)


def test_an_interrupt_cuts_the_answer_off_and_keeps_it(tmp_path: Path) -> None:
    chat, _ = chat_with(tmp_path, "one two three four")
    heard: list[str] = []

    def hear(piece: str) -> None:
        heard.append(piece)
        if len(heard) == 2:
            raise KeyboardInterrupt

    found = chat.answer("count", SampleParams(100), hear)
    assert "one two three four".startswith(found)
    assert 0 < len(found) < len("one two three four")
    assert chat.messages[-1]["content"] == found


def test_what_does_not_fit_is_refused_and_forgotten(tmp_path: Path) -> None:
    chat, sampler = chat_with(tmp_path, "x")
    with pytest.raises(CallError, match="practice holds") as caught:
        chat.answer("word " * 40, SampleParams(10_000_000), lambda _: None)
    assert "/reset" in caught.value.hint
    with pytest.raises(CallError, match="control token"):
        chat.answer("<|im_start|>", SampleParams(4), lambda _: None)
    assert (chat.messages, sampler.prompts) == ([], [])
