"""Flags of the command line that set keys of the run spec: one name, one sentence, defined in the spec alone."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from luthier.spec.load import LoadedSpec, Override

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclass(frozen=True)
class Flag:
    """A flag and the key it sets; `is_text` values are never read as numbers."""

    name: str
    path: str
    metavar: str = ""
    is_text: bool = True
    is_switch: bool = False


FLAGS = {
    flag.name: flag
    for flag in (
        Flag("model", "model.base", "MODEL"),
        Flag("chat-template", "model.chat_template", "FILE"),
        Flag("data", "data.train", "SOURCE"),
        Flag("valid", "data.valid", "SHARE|COUNT|FILE", is_text=False),
        Flag("format", "data.format", "FORMAT"),
        Flag("group-by", "data.group_by", "KEY"),
        Flag("examples", "data.examples", "N", is_text=False),
        Flag("max-rejected-share", "data.max_rejected_share", "SHARE", is_text=False),
        Flag("max-length", "data.max_length", "TOKENS", is_text=False),
        Flag("too-long", "data.too_long", "drop|truncate|split|error"),
        Flag("train-on", "data.train_on", "TURNS"),
        Flag("spans", "data.spans", "auto|markers"),
        Flag("unroll", "data.unroll", is_switch=True),
        Flag("method", "method.kind", "auto|full|lora|qlora"),
        Flag("rank", "method.rank", "N", is_text=False),
        Flag("alpha", "method.alpha", "X", is_text=False),
        Flag("dropout", "method.dropout", "X", is_text=False),
        Flag("last-layers", "method.last_layers", "N", is_text=False),
        Flag("objective", "objective.kind", "sft|pretrain|dpo|simpo|orpo"),
        Flag("learning-rate", "optim.learning_rate", "X", is_text=False),
        Flag("warmup-steps", "optim.warmup_steps", "N", is_text=False),
        Flag("epochs", "optim.epochs", "X", is_text=False),
        Flag("steps", "optim.steps", "N", is_text=False),
        Flag("batch", "optim.batch", "N", is_text=False),
        Flag("micro-batch", "optim.micro_batch", "N", is_text=False),
        Flag("save-every-steps", "output.save_every_steps", "N", is_text=False),
        Flag("output-dir", "output.dir", "DIR"),
        Flag("engine", "engine.kind", "ENGINE"),
        Flag("precision", "compute.precision", "FORMAT"),
        Flag("processes", "compute.processes", "N", is_text=False),
        Flag("seed", "seed", "N", is_text=False),
    )
}
# What decides how one row is read, and what decides the places of all of them.
ROW_FLAGS = (
    "format",
    "examples",
    "max-length",
    "too-long",
    "train-on",
    "spans",
    "unroll",
    "chat-template",
    "objective",
)
DATA_FLAGS = (*ROW_FLAGS, "valid", "group-by", "max-rejected-share", "seed")


class SpecOption(click.Option):
    """An option whose help is the spec's own sentence, read when help is asked for and not at every start."""

    def __init__(self, *args: Any, path: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._path = path

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from luthier.spec.describe import describe_path

        self.help = describe_path(self._path)
        return super().get_help_record(ctx)


def spec_flags(*names: str) -> Callable[[Decorated], Decorated]:
    """Options for the named flags, with the sentences of the spec as help, and `--set` for every other key."""

    def decorate(function: Decorated) -> Decorated:
        function = click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set any key of the spec, such as optim.schedule=linear.",
        )(function)
        for name in reversed(names):
            flag = FLAGS[name]
            options: dict[str, Any] = (
                {"is_flag": True, "default": None} if flag.is_switch else {"metavar": flag.metavar}
            )
            function = click.option(f"--{name}", _key(name), cls=SpecOption, path=flag.path, **options)(function)
        return function

    return decorate


def _key(name: str) -> str:
    return "flag_" + name.replace("-", "_")


def read_overrides(given: dict[str, Any], settings: tuple[str, ...]) -> list[Override]:
    """What the flags and `--set` of a call say, in the order in which later ones win."""
    from luthier.spec.load import Override, parse_setting

    overrides = []
    for flag in FLAGS.values():
        value = given.get(_key(flag.name))
        if value is None:
            continue
        read = value if flag.is_text or flag.is_switch else _read_value(value)
        overrides.append(Override(flag.path, read, f"flag --{flag.name}"))
    return overrides + [parse_setting(text) for text in settings]


def _read_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return float(text)  # `.5`, which TOML does not know
    except ValueError:
        return text


def load_call(
    spec: str | None, given: dict[str, Any], settings: tuple[str, ...], *, extra: list[Override] | None = None
) -> LoadedSpec:
    """The spec a call describes: its file, if any, then its flags."""
    from luthier.spec.load import load_spec

    return load_spec(Path(spec) if spec else None, (extra or []) + read_overrides(given, settings))


def load_run_call(spec: str | None, given: dict[str, Any], settings: tuple[str, ...]) -> LoadedSpec:
    """The same for a run, which needs data: asked for where a person is there, else an error."""
    loaded = load_call(spec, given, settings)
    return loaded if loaded.spec.data.train is not None else load_call(spec, given, settings, extra=[_ask_for_data()])


def _ask_for_data() -> Override:
    from luthier.errors import SpecError
    from luthier.spec.load import Override

    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise SpecError(
            "no training data: `data.train` is not set",
            hint="give --data FILE, or set data.train in the spec",
        )
    answer = click.prompt("Training data (a file, a folder or hf:org/name:split)", err=True)
    return Override("data.train", answer, "answer")
