"""`luthier tinker`: look at a Tinker service."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from luthier.cli.output import Group, heartbeat, paint, print_json, print_table, say, tell

if TYPE_CHECKING:
    from luthier.engines.tinker.inspecting import Answered, Inspection


@click.group("tinker", cls=Group)
def command() -> None:
    """Look at the Tinker service that TINKER_BASE_URL and TINKER_API_KEY name."""


@command.command("inspect")
@click.option("--try", "tried", metavar="MODEL", help="Try every verb on this base too: a few tokens, deleted again.")
def inspect(tried: str | None, as_json: bool) -> int:
    """Show what a service supports: its models, its limits, and which methods answer."""
    from luthier.engines.registry import check_engine
    from luthier.engines.tinker.address import find_service
    from luthier.engines.tinker.inspecting import inspect_service

    check_engine("tinker")
    service = find_service()
    with heartbeat(f"asking {service.url}", quiet=as_json):
        found = inspect_service(service, tried=tried, tell=None if as_json else lambda name: tell(f"trying {name}"))
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)
    return 0 if all(each.works for each in found.methods) or tried is None else 1


def _print(found: Inspection) -> None:
    say(f"{found.url}, asked with the SDK {found.sdk}")
    say("models" if found.models else "models: the service lists none")
    print_table(
        [
            (
                each.name,
                f"{each.max_context_length:,} tokens" if each.max_context_length else "",
                "trains" if each.trainable else "",
                "samples" if each.sampleable else "",
            )
            for each in found.models
        ]
    )
    if found.limits:
        say("limits")
        print_table(
            [(name, f"{value:,}" if type(value) is int else str(value)) for name, value in found.limits.items()]
        )
    say("methods")
    print_table(
        [(_mark(each), each.method, each.call, f"{1000 * each.seconds:.0f} ms", each.said) for each in found.methods]
    )


def _mark(answered: Answered) -> str:
    return paint("answers", "32") if answered.works else paint("FAILS", "31")
