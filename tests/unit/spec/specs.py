"""Strategies for whole run specs, made from the spec's own fields, so that a new field is drawn from its first day."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from hypothesis import strategies as st
from pydantic import BaseModel

from luthier.spec.problems import list_kinds
from luthier.spec.run import RunSpec
from tests.builders import texts


def _numbers(kind: type, limits: list[Any]) -> st.SearchStrategy[Any]:
    low = next((float(each.ge) for each in limits if isinstance(each, Ge)), None)
    low_open = next((float(each.gt) for each in limits if isinstance(each, Gt)), None)
    high = next((float(each.le) for each in limits if isinstance(each, Le)), None)
    high_open = next((float(each.lt) for each in limits if isinstance(each, Lt)), None)
    if kind is int:
        return st.integers(int(low or 0), int(high) if high is not None else 2**63 - 1)
    made = st.floats(
        low if low is not None else low_open,
        high if high is not None else high_open,
        allow_nan=False,
        allow_infinity=False,
    )
    return made.filter(lambda x: (low_open is None or x > low_open) and (high_open is None or x < high_open))


def _values(annotation: Any, limits: list[Any]) -> st.SearchStrategy[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0], [limit for each in arguments[1:] for limit in getattr(each, "metadata", [each])])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of(*(_values(each, limits) for each in arguments))
    if origin is list:
        return st.lists(_values(arguments[0], []), max_size=3)
    if list_kinds(annotation):
        return _table(annotation)
    if annotation in (int, float):
        return _numbers(annotation, limits)
    if annotation is str:
        return texts if any(isinstance(each, MinLen) for each in limits) else texts | st.just("")
    return {bool: st.booleans(), type(None): st.none()}[annotation]


def _table(part: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    drawn = {name: _values(field.annotation, field.metadata) for name, field in part.model_fields.items()}
    needed = {name for name, field in part.model_fields.items() if field.is_required()}
    kind = {"kind"} & drawn.keys()
    return st.fixed_dictionaries(
        {name: drawn[name] for name in needed | kind},
        optional={name: each for name, each in drawn.items() if name not in needed | kind},
    )


def spec_tables() -> st.SearchStrategy[dict[str, Any]]:
    """Tables of a run spec that pydantic accepts; settings in them may contradict each other."""
    tables = {}
    for name, field in RunSpec.model_fields.items():
        parts = list_kinds(field.annotation)
        tables[name] = st.one_of(*map(_table, parts)) if parts else _values(field.annotation, field.metadata)
    return st.fixed_dictionaries({"model": tables.pop("model")}, optional=tables)
