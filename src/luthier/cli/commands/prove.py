"""`luthier prove`: run a proof on one's own spec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.flags import FLAGS, load_run_call, read_overrides, spec_flags
from luthier.cli.output import Group, paint, print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from luthier.training.equivalence import Equivalence
    from luthier.training.proofs import Compared
    from luthier.training.session import Work


@click.group("prove", cls=Group)
def command() -> None:
    """Prove on your own spec what Luthier promises; nothing is left behind."""


@command.command("resume")
@click.argument("spec", required=False)
@click.option("--stop-at", type=int, default=None, metavar="STEP", help="Stop after this step; the middle when absent.")
@spec_flags(*FLAGS)
def resume(spec: str | None, stop_at: int | None, settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Train SPEC for a few steps with and without a stop on the way, and compare every tensor byte for byte."""
    from luthier.training.proofs import prove_resume

    make, steps = _maker(spec, flags, settings, as_json=as_json)
    found = prove_resume(make, steps=steps, stop_at=stop_at or steps // 2, tell=_teller(as_json))
    _print(found, f"stopped and resumed equals never stopped, over {steps} steps", as_json=as_json)


@command.command("invariance")
@click.argument("spec", required=False)
@spec_flags(*FLAGS)
def invariance(spec: str | None, settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Train SPEC for a few steps cut up in different ways (8x1 = 1x8, packed = unpacked, 1 = 2 processes), in fp32."""
    from luthier.training.proofs import prove_invariance

    make, steps = _maker(spec, flags, settings, as_json=as_json)
    found = prove_invariance(make, steps=steps, tell=_teller(as_json))
    _print(found, f"how a step is cut up changes nothing, over {steps} steps", as_json=as_json)


@command.command("engines")
@click.argument("spec", required=False)
@click.option("--steps", type=int, default=20, metavar="N", help="How many steps of the spec; 20 when absent.")
@click.option("--engines", default=None, metavar="NAMES", help="Engines by name, with commas; all that are installed.")
@spec_flags(*(flag for flag in FLAGS if flag not in ("steps", "engine")))
def engines(
    spec: str | None, steps: int, engines: str | None, settings: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Train the first steps of SPEC on each installed engine, in fp32: same tokens, same mask, same losses."""
    from luthier.training.equivalence import check_equivalence, prove_engines

    make, _ = _maker(spec, flags, settings, as_json=as_json)
    named = [name.strip() for name in engines.split(",")] if engines else None
    found = prove_engines(make, named, steps=steps, tell=_teller(as_json))
    if as_json:
        print_json(found.as_dict())
    else:
        _print_engines(found)
    check_equivalence(found)
    if not as_json:
        names = " and ".join([found.first.engine, *(each.trace.engine for each in found.others)])
        say(f"{paint('proved', '32')}: one spec means the same on {names}, over {found.steps} steps")


def _print_engines(found: Equivalence) -> None:
    traces = [found.first, *(each.trace for each in found.others)]
    rows = [
        ("", *(trace.engine for trace in traces)),
        ("tokens", *(trace.token_hash for trace in traces)),
        ("mask", *(trace.mask_hash for trace in traces)),
    ]
    rows += [
        (f"loss of step {number}", *(f"{loss:.6f}" for loss in losses))
        for number, losses in enumerate(zip(*(trace.losses for trace in traces), strict=False), 1)
    ]
    apart = (f"{each.difference:.1e}, {each.allowed:.0e} allowed" for each in found.others)
    print_table([*rows, ("largest difference", "", *apart)])
    for name, why in found.left_out.items():
        say(f"{name}: {why}")
    say("in fp32, without dropout, in one process")


_STEPS = 6


def _maker(spec: str | None, flags: dict[str, Any], settings: tuple[str, ...], *, as_json: bool) -> tuple[Any, int]:
    """A function that makes the work of a run of the spec under other settings, and how many steps to prove."""
    from luthier.runs.home import luthier_home
    from luthier.runs.resolve import find_resolved
    from luthier.runs.run import create_run
    from luthier.spec.load import Override, load_spec
    from luthier.training.session import Work
    from luthier.training.signals import StopFlag
    from luthier.workflow import Ready, plan_run, prepare_data, warm_up

    loaded = load_run_call(spec, flags, settings)
    warm_up(loaded.spec)
    with progress_bar("reading rows", quiet=as_json) as progress:
        prepared = prepare_data(loaded.spec, progress=progress)
    resolved = find_resolved(loaded.spec.model.base, loaded.spec.model.revision, with_weights=True)

    def make(changes: dict[str, object], folder: Path | None) -> Work:
        extra = [Override(key, value, "the proof") for key, value in changes.items()]
        changed = load_spec(Path(spec) if spec else None, read_overrides(flags, settings) + extra).spec
        ready = Ready(plan_run(changed, prepared), prepared, resolved)
        run = create_run(folder, ready.plan, prepared, resolved) if folder else None
        return Work(run, ready.plan, prepared, resolved, luthier_home(), lambda event: None, StopFlag())  # type: ignore[arg-type]

    return make, loaded.spec.optim.steps or _STEPS


def _teller(as_json: bool) -> Any:
    return (lambda text: None) if as_json else (lambda text: say(f"  {text}"))


def _print(found: list[Compared], claim: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"claim": claim, "holds": True, "compared": [each.__dict__ for each in found]})
        return
    print_table([(each.what, "equal" if each.difference == 0 else f"{each.difference:.1e} apart") for each in found])
    say(f"{paint('proved', '32')}: {claim}")
