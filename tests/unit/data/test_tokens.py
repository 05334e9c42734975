"""Token ids are the model's own, and the mask on them is exactly the spans, whichever way it was computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.spans import Span
from luthier.data.tokens import Encoder, FastTokenizerDiffers, ModelText
from luthier.errors import ModelError
from luthier.runs.resolve import practice_folder
from tests.shapes import list_shapes

PRACTICE = ModelText(practice_folder())


@st.composite
def texts_with_spans(draw: st.DrawFn) -> tuple[str, list[Span]]:
    """Any text, control tokens among it, and up to three ordered spans that are not empty."""
    piece = st.one_of(
        st.text(max_size=12), st.sampled_from(["<|im_start|>", "<|im_end|>", "<think>", "\n", " 12", "e\u0301"])
    )
    text = "".join(draw(st.lists(piece, min_size=1, max_size=8))) or "a"
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    return text, [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]


@given(st.lists(texts_with_spans(), min_size=1, max_size=5))
def test_bytes_and_offsets_give_the_same_mask(batch: list[tuple[str, list[Span]]]) -> None:
    """A token is trained when it shares a character with a span: checked against the tokenizer's own offsets."""
    texts, spans = [text for text, _ in batch], [spans for _, spans in batch]
    encoded, ranges = Encoder(PRACTICE).encode(texts, spans)
    for index, (text, own) in enumerate(batch):
        expected = PRACTICE.tokenizer.encode(text, add_special_tokens=False)
        assert encoded.ids[encoded.offsets[index] : encoded.offsets[index + 1]].tolist() == expected.ids
        for (start, end), (first, last) in zip(own, ranges[index].tolist(), strict=True):
            touching = [i for i, (a, b) in enumerate(expected.offsets) if a < end and b > start]
            if touching and text.isascii():
                assert (first, last) == (touching[0], touching[-1] + 1)
            elif touching:
                # One character may be several tokens, all of which have its offsets.
                assert touching[0] <= first <= last <= touching[-1] + 1


def test_without_the_fast_library_the_result_is_the_same() -> None:
    texts = ["<|im_start|>user\nHello there<|im_end|>\n", "caf\u00e9 \u6f22\u5b57 12", ""]
    spans: list[list[Span]] = [[(3, 9)], [(0, 4), (5, 6)], []]
    fast, slow = Encoder(PRACTICE), Encoder(PRACTICE, fast=False)
    assert slow.name == "tokenizers"
    for left, right in zip(fast.encode(texts, spans)[1], slow.encode(texts, spans)[1], strict=True):
        assert left.tolist() == right.tolist()
    assert np.array_equal(fast.encode(texts, spans)[0].ids, slow.encode(texts, spans)[0].ids)


def test_a_fast_tokenizer_that_differs_is_found_out() -> None:
    pytest.importorskip("gigatoken")
    encoder = Encoder(PRACTICE)

    class Wrong:
        """Gives what another text would give."""

        def __init__(self, real: object) -> None:
            self._real = real

        def encode_batch(self, texts: list[str], **options: object) -> object:
            return self._real.encode_batch([text + "!" for text in texts], **options)  # type: ignore[attr-defined]

    encoder._fast = Wrong(encoder._fast)
    with pytest.raises(FastTokenizerDiffers):
        encoder.encode(["hello"], [[]])


def test_a_text_that_normalisation_changes_still_has_its_mask() -> None:
    """Decomposed text is composed by the tokenizer (NFC), so bytes do not add up."""
    text = "<|im_start|>user\ncafe\u0301<|im_end|>\n<|im_start|>assistant\nnoe\u0308l<|im_end|>\n"
    start = text.index("noe\u0308l")
    end = text.index("<|im_end|>", start) + len("<|im_end|>")
    encoded, ranges = Encoder(PRACTICE).encode([text], [[(start, end)]])
    first, last = ranges[0][0].tolist()
    assert (
        PRACTICE.tokenizer.decode(encoded.ids[first:last].tolist(), skip_special_tokens=False) == "no\u00ebl<|im_end|>"
    )


def test_control_tokens_are_those_that_the_tokenizer_marks_special() -> None:
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(PRACTICE.control_tokens)
    assert "<think>" not in PRACTICE.control_tokens
    assert "<think>" in PRACTICE.added_tokens


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma3", "mistral_inst", "deepseek_r1"])
def test_a_model_folder_is_read_without_transformers(name: str, tmp_path: Path) -> None:
    shape = next(shape for shape in list_shapes() if shape.name == name)
    text = ModelText(shape.write_model(tmp_path / name))
    assert text.eos_token == shape.eos_token
    assert set(shape.special_tokens) <= set(text.control_tokens)
    template = text.build_template()
    assert template is not None
    assert template.source == shape.source


@pytest.mark.torch
def test_templates_render_as_transformers_renders_them(tmp_path: Path) -> None:
    """The one place where transformers is the judge of what a template gives."""
    transformers = pytest.importorskip("transformers")
    messages = [
        {"role": "user", "content": "One <b> & 'two'"},
        {"role": "assistant", "content": "Aone"},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": "Atwo"},
    ]
    for shape in list_shapes():
        text = ModelText(shape.write_model(tmp_path / shape.name))
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / shape.name / "tokenizer.json"),
            bos_token=shape.bos_token,
            eos_token=shape.eos_token,
        )
        template = text.build_template()
        assert template is not None
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                messages[: 3 if prompt else 4], chat_template=shape.source, tokenize=False, add_generation_prompt=prompt
            )
            got = template.render(messages[: 3 if prompt else 4], add_generation_prompt=prompt)
            if "strftime_now" not in shape.source:
                assert got == expected, shape.name


def test_a_folder_without_tokenizer_says_how_to_save_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        ModelText(tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_a_broken_tokenizer_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match="not a tokenizer"):
        ModelText(tmp_path)
