"""`luthier chat`: talk with a model, or with it and what it started from side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.output import Command, heartbeat, paint, print_json, say, tell

if TYPE_CHECKING:
    from luthier.engines.chat import Chat
    from luthier.engines.verbs import SampleParams


@click.command("chat", cls=Command)
@click.argument("model")
@click.option("--compare", "beside", is_flag=True, help="Let what the model started from answer too.")
@click.option("--system", metavar="TEXT", default="", help="System message at the start of the conversation.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0 takes the likeliest token."
)
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Cut answers off here.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the draws.")
@click.option("--chat-template", metavar="FILE", help="Chat template to ask by, instead of the model's own.")
def command(
    model: str,
    beside: bool,
    system: str,
    temperature: float,
    max_tokens: int,
    seed: int,
    chat_template: str | None,
    as_json: bool,
) -> None:
    """Talk with MODEL: a run, an adapter, a model folder, an ft: id, a hub id or `practice`.

    `/reset` begins a new conversation, `/quit` ends it; Ctrl-C cuts an answer off. From a pipe, each line is a message.
    """
    from luthier.engines.chat import Chat
    from luthier.engines.registry import import_in_background
    from luthier.engines.surroundings import prepare_process
    from luthier.engines.verbs import SampleParams
    from luthier.evals.heldout import find_template
    from luthier.runs.home import luthier_home
    from luthier.runs.resolve import find_resolved, resolve_start

    prepare_process()
    import_in_background()
    tuned = find_resolved(model, with_weights=True)
    template = find_template(tuned, chat_template)
    both = [resolve_start(tuned), tuned] if beside else [tuned]
    with heartbeat("loading the model", quiet=as_json):
        chats = [Chat(each, luthier_home(), template=template, system=system) for each in both]
    params = SampleParams(max_tokens, temperature, seed=seed)
    turns = [turn for turn in _talk(chats, params, quiet=as_json) if as_json]
    if as_json:
        print_json({"models": [each.name for each in chats], "turns": turns})


def _talk(chats: list[Chat], params: SampleParams, *, quiet: bool) -> Iterator[dict[str, Any]]:
    """One turn after another, until nothing more is said."""
    from luthier.errors import CallError

    if sys.stdin.isatty() and not quiet:
        say(f"{' and '.join(each.name for each in chats)}: `/reset` begins anew, `/quit` ends")
    for said in _messages(is_prompted=sys.stdin.isatty() and not quiet):
        if said == "/reset":
            for chat in chats:
                chat.reset()
            if not quiet:
                say("a new conversation")
            continue
        try:
            yield {"said": said, "answers": [_answer(chat, said, params, len(chats), quiet=quiet) for chat in chats]}
        except CallError as error:
            tell(f"{error.message}; {error.hint}")


def _messages(*, is_prompted: bool) -> Iterator[str]:
    while True:
        if is_prompted:
            say(paint("> ", "36"), end="", at_once=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        said = line.strip()
        if not line or said == "/quit":
            if is_prompted and not line:
                say()
            return
        if said:
            yield said


def _answer(chat: Chat, said: str, params: SampleParams, count: int, *, quiet: bool) -> str:
    def hear(text: str) -> None:
        if not quiet:
            say(_safe(text), end="", at_once=True)

    if count > 1 and not quiet:
        say(paint(f"[{chat.name}]", "1"))
    found = chat.answer(said, params, hear)
    if not quiet:
        say()
    return found


def _safe(text: str) -> str:
    """Nothing that a model says may move the cursor or colour the terminal."""
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)
