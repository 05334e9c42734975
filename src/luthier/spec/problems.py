"""Turn what pydantic found into sentences that a person can act on, all of them at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from luthier.errors import SpecError
from luthier.spec.part import Part
from luthier.spec.run import RunSpec

_TAGS = {"auto", "full", "lora", "qlora", "sft", "pretrain", "dpo", "simpo", "orpo"}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a spec."""

    path: str
    message: str
    where: str
    hint: str = ""


def list_problems(error: ValidationError, raw: dict[str, Any], where: Callable[[str], str]) -> list[Problem]:
    """Every problem of one validation, in the order of the spec."""
    found: list[Problem] = []
    for item in error.errors(include_url=False, include_context=True):
        problem = _problem(item, raw, where)
        same = next((other for other in found if other.path == problem.path), None)
        if same is None:
            found.append(problem)
        elif item["type"] not in ("extra_forbidden", "missing"):
            found[found.index(same)] = _joined(same, problem)
    return found


def _joined(first: Problem, second: Problem) -> Problem:
    """Two readings of one value (a union) are one problem with two ways out."""
    expected = second.message.split("expected ")[-1].split(", found")[0]
    head, _, tail = first.message.partition(", found")
    return Problem(first.path, f"{head} or {expected}, found{tail}", first.where, first.hint)


def _problem(item: Any, raw: dict[str, Any], where: Callable[[str], str]) -> Problem:
    path = _plain_path(item["loc"])
    if item["type"] == "extra_forbidden":
        path = [*_plain_path(item["loc"][:-1]), str(item["loc"][-1])]
    dotted = ".".join(path)
    place = where(dotted)
    if item["type"] == "extra_forbidden":
        return Problem(dotted, f"unknown key `{dotted}`{_tag_note(path, raw)}", place, _nearest(path, raw))
    if item["type"] == "missing":
        # The only key without a default; a spec without [model] lacks it just as one with an empty [model].
        missing = "model.base" if dotted == "model" else dotted
        return Problem(missing, f"`{missing}` is missing", place, "set it in the spec, or give --model MODEL")
    if item["type"] == "union_tag_invalid":
        kinds = item["ctx"]["expected_tags"].replace("'", '"')
        value = str(item["ctx"]["tag"])
        close = difflib.get_close_matches(value, [kind.strip(' "') for kind in kinds.split(",")], 1)
        hint = f'did you mean "{close[0]}"?' if close else ""
        place = where(f"{dotted}.kind")
        return Problem(f"{dotted}.kind", f'`{dotted}.kind` is "{value}"; expected one of {kinds}', place, hint)
    if item["type"] == "union_tag_not_found":
        return Problem(f"{dotted}.kind", f"`{dotted}.kind` is missing", place, f"set `{dotted}.kind`")
    return Problem(
        dotted,
        f"`{dotted}`: expected {_expected(item)}, found {_shown(item['input'])}",
        place,
        _closest_value(item),
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _expected(item: Any) -> str:
    context, kind = item.get("ctx", {}), item["type"]
    named = {
        "int_type": "a whole number",
        "float_type": "a number",
        "string_type": "text",
        "bool_type": "true or false",
        "list_type": "a list",
        "model_type": "a table",
        "model_attributes_type": "a table",
        "dict_type": "a table",
        "string_too_short": "text that is not empty",
        "finite_number": "a finite number",
        "invalid_key": "keys that are text",
    }
    if kind in named:
        return named[kind]
    if kind == "literal_error":
        return "one of " + str(context["expected"]).replace("'", '"')
    words = {"greater_than_equal": "at least {ge}", "greater_than": "more than {gt}"}
    words |= {"less_than_equal": "at most {le}", "less_than": "less than {lt}"}
    if kind in words:
        return words[kind].format(**context)
    return str(item["msg"]).lower()


def _closest_value(item: Any) -> str:
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    choices = [word.strip("' ") for word in item["ctx"]["expected"].replace(" or ", ",").split(",")]
    close = difflib.get_close_matches(item["input"], choices, 1)
    return f'did you mean "{close[0]}"?' if close else ""


def _plain_path(loc: Sequence[int | str]) -> list[str]:
    """The location as the person wrote it: union tags and type names are not theirs."""
    path: list[str] = []
    for position, step in enumerate(loc):
        is_tag = position == 1 and step in _TAGS and loc[0] in ("method", "objective")
        is_type = isinstance(step, str) and position > 0 and not step.isidentifier()
        if not is_tag and not is_type and not (position > 1 and step in ("str", "int", "float")):
            path.append(str(step))
    if path[:2] == ["data", "valid"] or path[:2] == ["method", "targets"]:
        return path[:2]
    return path


def _tag_note(path: list[str], raw: dict[str, Any]) -> str:
    table = raw.get(path[0])
    kind = table.get("kind") if isinstance(table, dict) else None
    return f' (kind = "{kind}")' if kind and len(path) > 1 else ""


def _nearest(path: list[str], raw: dict[str, Any]) -> str:
    """The nearest known name beside the key, or the table in which a key of this very name lives."""
    key, table = path[-1], ".".join(path[:-1])
    siblings = known_keys(raw).get(table, [])
    if close := difflib.get_close_matches(key, siblings, 1, cutoff=0.7):
        return f"did you mean `{close[0]}`?"
    if kinds := _kinds_with(key, table):
        return f"`{key}` is a key of kind {kinds}"
    homes = [f"{name}.{key}" if name else key for name, keys in known_keys({}).items() if key in keys and name != table]
    if homes:
        return f"did you mean `{homes[0]}`?"
    if close := difflib.get_close_matches(key, siblings, 1, cutoff=0.5):
        return f"did you mean `{close[0]}`?"
    return "known keys: " + ", ".join(siblings) if siblings else ""


def _kinds_with(key: str, table: str) -> str:
    """The kinds of a tagged table that know the key."""
    field = RunSpec.model_fields.get(table)
    parts = list_kinds(field.annotation) if field else []
    found = [f'"{kind}"' for part in parts if key in part.model_fields for kind in _kinds_of(part)]
    return " or ".join(found)


def known_keys(raw: dict[str, Any]) -> dict[str, list[str]]:
    """Keys of each table; a tagged table lists those of the kind that `raw` chose, or of all kinds."""
    keys: dict[str, list[str]] = {"": list(RunSpec.model_fields)}
    for name, field in RunSpec.model_fields.items():
        parts = list_kinds(field.annotation)
        table = raw.get(name)
        kind = table.get("kind") if isinstance(table, dict) else None
        chosen = [part for part in parts if kind and kind in _kinds_of(part)] or parts
        if chosen:
            keys[name] = list(dict.fromkeys(key for part in chosen for key in part.model_fields))
        for part in chosen:
            keys |= {f"{name}.{key}": inner for key, inner in _inner_keys(part).items()}
    return keys


def _inner_keys(part: type[BaseModel]) -> dict[str, list[str]]:
    """Keys of the tables inside a table."""
    inner = {key: list_kinds(field.annotation) for key, field in part.model_fields.items()}
    return {key: list(parts[0].model_fields) for key, parts in inner.items() if parts}


def list_kinds(annotation: Any) -> list[type[BaseModel]]:
    """The part classes an annotation admits: one, or the kinds of a tagged table."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    inner = getattr(annotation, "__args__", ())
    return [part for each in inner for part in list_kinds(each)]


def _kinds_of(part: type[BaseModel]) -> tuple[str, ...]:
    field = part.model_fields.get("kind")
    return getattr(field.annotation, "__args__", ()) if field else ()


def raise_problems(problems: list[Problem], name: str) -> None:
    """Raise one SpecError that lists them all; nothing when there are none."""
    if not problems:
        return
    details = [asdict(problem) for problem in problems]
    if len(problems) == 1:
        only = problems[0]
        where = only.where or name
        raise SpecError(f"{only.message} in {where}", hint=only.hint or _schema_hint(), where=where, details=details)
    listed = "\n".join(f"  {_line(problem, name)}" for problem in problems)
    raise SpecError(f"{len(problems)} problems in {name}\n{listed}", hint=_schema_hint(), where=name, details=details)


def _line(problem: Problem, name: str) -> str:
    return f"{problem.where or name}: {problem.message}" + (f"; {problem.hint}" if problem.hint else "")


def _schema_hint() -> str:
    return "`luthier spec schema` lists every key; docs/reference/spec.md explains them"
