"""An Ollama Modelfile beside a GGUF file: the chat template as Ollama's own kind of template, and where to stop."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from luthier.adapters.gguf_vocabulary import Vocabulary
from luthier.adapters.turns import Turns, find_end_of_turn, find_turns, list_differences
from luthier.data.tokens import ModelText

MODELFILE = "Modelfile"
_PLAIN = "{{ .Prompt }}"
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
# What the Modelfile or the template would read as its own.
_OWN_SIGNS = re.compile(r'\{\{|\}\}|"""|[^\n\t -~\u00a0-\ud7ff\ue000-\U0010ffff]')


@dataclass(frozen=True)
class Modelfile:
    """The text of a Modelfile, its stops, and what to know of it."""

    text: str
    stops: tuple[str, ...]
    notes: tuple[str, ...]


def build_modelfile(vocabulary: Vocabulary, weights: str) -> Modelfile:
    """The Modelfile for the file `weights`; UnsupportedError where the chat template cannot be carried over."""
    text = vocabulary.text
    generation = _read(text.folder / "generation_config.json")
    template = text.build_template()
    notes: list[str] = []
    end = None
    source = _PLAIN
    if template is None:
        notes.append("the model has no chat template: Ollama passes the prompt on as it is")
    else:
        turns = find_turns(template)
        end = find_end_of_turn(template, text.control_tokens)
        source = render_template(turns, left_out=text.bos_token if vocabulary.adds_bos else "")
        notes += [*turns.notes, *list_differences(template, turns), "the Ollama template takes no tools"]
    stops = _stops(text, end, [generation, _read(text.folder / "config.json")])
    lines = [f"FROM ./{weights}", f'TEMPLATE """{source}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    if generation.get("do_sample"):
        lines += [
            f"PARAMETER {theirs} {generation[ours]}"
            for ours, theirs in _SAMPLING.items()
            if isinstance(generation.get(ours), int | float)
        ]
    return Modelfile("\n".join(lines) + "\n", tuple(stops), tuple(notes))


def _stops(text: ModelText, end: str | None, configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every token at which the model is done: by the template's end of a turn, by the configs, by the tokenizer."""
    found = [end, text.eos_token]
    for config in configs:
        ids = config.get("eos_token_id")
        numbers = ids if isinstance(ids, list) else [ids]
        found += [text.tokenizer.id_to_token(number) for number in numbers if isinstance(number, int)]
    return list(dict.fromkeys(token for token in found if token))


def render_template(turns: Turns, *, left_out: str = "") -> str:
    """The turns as a Go template; `left_out` is the token that Ollama itself puts before the text."""

    def opening(text: str) -> str:
        return _literal(text.removeprefix(left_out))

    first, later = opening(turns.start), _literal(turns.question)
    if turns.system is not None:
        whole = f"{opening(turns.system[0])}{{{{ $.System }}}}{_literal(turns.system[1])}"
        at_first = "$.System" if turns.late_system is None else "and $last $.System"
        first = f"{{{{ if {at_first} }}}}{whole}{{{{ else }}}}{first}{{{{ end }}}}"
    if turns.late_system is not None:
        before, after = map(_literal, turns.late_system)
        later = f"{{{{ if and $last $.System }}}}{before}{{{{ $.System }}}}{after}{{{{ else }}}}{later}{{{{ end }}}}"
    prompt, answer = _literal(turns.prompt), _literal(turns.answer)
    return (
        "{{ $first := true }}{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f'{{{{ if eq .Role "user" }}}}{{{{ if $first }}}}{first}{{{{ else }}}}{later}{{{{ end }}}}'
        f"{{{{ $first = false }}}}{{{{ .Content }}}}{{{{ if $last }}}}{prompt}{{{{ else }}}}{answer}{{{{ end }}}}"
        '{{ else if eq .Role "assistant" }}{{ .Content }}{{ end }}{{ end }}'
    )


def _literal(text: str) -> str:
    """Text as it stands in a template; as a quoted string where a sign of it would be read as something else."""
    if not _OWN_SIGNS.search(text):
        return text
    quoted = (
        json.dumps(text, ensure_ascii=False).replace('\\"', "\\u0022").replace("{", "\\u007b").replace("}", "\\u007d")
    )
    return f"{{{{ {quoted} }}}}"


def _read(path: Path) -> dict[str, Any]:
    found = orjson.loads(path.read_bytes()) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
