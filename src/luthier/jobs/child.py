"""The trainer of one attempt: `python -m luthier.jobs.child ATTEMPT` reads its order there, and ends with `exit.json`.

It does what `luthier train` and `luthier resume` do, and never speaks to the database: a worker reads the events of the
run, and what lies in the attempt's folder.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import orjson

from luthier.errors import (
    DiskFullError,
    LuthierError,
    PlanError,
    ProcessDiedError,
    ProofError,
    RunLockedError,
    StorageError,
)
from luthier.jobs.attempt import Ending, Identity, Order, read_order, write_identity
from luthier.jobs.fence import Fence
from luthier.jobs.job import Outcome
from luthier.jobs.processes import when_started
from luthier.runs import layout
from luthier.runs.run import Run, is_made
from luthier.training.signals import EXIT_CODES, AskedToStop, StopFlag

if TYPE_CHECKING:
    from luthier.runs.events import Event
    from luthier.spec.run import RunSpec
    from luthier.training.passes import Watch
    from luthier.workflow import Ready

log = logging.getLogger("luthier.trainer")
_SIGNAL_OF_PARENTS_DEATH = 1
_NICENESS = 5
_ENDINGS = {"pause": "paused", "cancel": "cancelled", "lost": "lost"}
_EXIT_CODES = {"succeeded": 0, "paused": EXIT_CODES["SIGTERM"], "cancelled": EXIT_CODES["SIGTERM"]}
# What may be otherwise the next time: another process took the memory, the disk had a moment, a process was killed.
_TRANSIENT = (PlanError, ProcessDiedError, StorageError)
_LOCK_POLL_SECONDS = 0.05


def main(place: str) -> int:
    """Train what the attempt's folder says; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    folder = Path(place)
    order = read_order(folder)
    write_identity(folder, Identity(os.getpid(), when_started(os.getpid()) or "", order.token))
    ending = Ending(folder, order.token)
    os.nice(_NICENESS)
    stop = StopFlag()
    with stop:  # to the very end: a signal must not take the last word away
        with Fence(folder, order.timings) as fence:
            outcome = Trainer(order, stop, fence).train()
        ending.write(outcome)
    log.info("%s %s %s", outcome.ending, outcome.error_code or "", outcome.message)
    return _EXIT_CODES.get(outcome.ending, 1)


class Trainer:
    """One attempt at the run of a job."""

    def __init__(self, order: Order, stop: StopFlag, fence: Fence) -> None:
        self._order, self._stop, self._fence = order, stop, fence
        self._folder = Path(order.run)

    def train(self) -> Outcome:
        """Do it, and say how it ended. This is the edge of the process: no error leaves it."""
        try:
            return self._train()
        except AskedToStop:
            return self._stopped()
        except DiskFullError as error:
            return Outcome("paused", error.code, error.message)
        except RunLockedError as error:
            return Outcome("lost", error.code, error.message)
        except _TRANSIENT as error:
            return Outcome("crashed", error.code, error.message)
        except LuthierError as error:
            return Outcome("failed", error.code, error.message)
        except Exception as error:
            log.exception("not foreseen")
            said = (str(error).splitlines() or [""])[0][:300]
            return Outcome("crashed", "internal_error", f"an error of Luthier's own: {type(error).__name__}: {said}")

    def _train(self) -> Outcome:
        run, ready, is_new = self._open()
        self._wait_for_others(run)
        if run.state == "finished":
            self._complete(run)
        elif run.spec.compute.processes > 1:
            if ready is None:
                self._reopen(run)  # what is wrong is told here, and not by one of several processes
            outcome = self._train_in_processes(run, is_new=is_new)
            if outcome is not None:
                return outcome
        else:
            from luthier.workflow import train_run

            ready = ready or self._reopen(run)
            train_run(run, ready, watch=_after_training(run), stop=self._stop, resume=not is_new)
        return self._close(run)

    def _open(self) -> tuple[Run, Ready | None, bool]:
        """The run of the job: made by its first attempt, opened by the others."""
        from luthier.runs.models import register
        from luthier.workflow import make_ready, prepare_data, warm_up

        if is_made(self._folder):
            run = Run(self._folder)
            register(run)
            if run.state != "finished":
                warm_up(run.spec)
            return run, None, False
        spec = self._spec()
        warm_up(spec)
        with self._stop.at_once():
            prepared = prepare_data(spec)
            ready = make_ready(spec, prepared)
            return self._create(ready), ready, True

    def _create(self, ready: Ready) -> Run:
        from luthier.runs.run import create_run

        return create_run(self._folder.parent, ready.plan, ready.prepared, ready.resolved, id=self._order.job)

    def _spec(self) -> RunSpec:
        from luthier.runs.model_folder import check_name
        from luthier.spec.run import RunSpec

        spec = RunSpec.model_validate(self._order.spec)
        check_name(spec.model.base)
        return spec

    def _reopen(self, run: Run) -> Ready:
        from luthier.workflow import reopen

        with self._stop.at_once():
            return reopen(run)

    def _wait_for_others(self, run: Run) -> None:
        """An attempt that was given up may be ending still; its lock goes with it, and its fence ends it."""
        until = time.monotonic() + self._order.timings.takeover
        with self._stop.at_once():
            while run.is_locked and time.monotonic() < until:
                time.sleep(_LOCK_POLL_SECONDS)

    def _complete(self, run: Run) -> None:
        """What was left undone after training: merging, and the certificate."""
        from luthier.workflow import complete_run, is_complete, warm_up

        if not is_complete(run):
            warm_up(run.spec)
            with run.lock():
                complete_run(run, watch=_told_to(run), stop=self._stop)

    def _train_in_processes(self, run: Run, *, is_new: bool) -> Outcome | None:
        """Several processes that share each step; None when they came to the end."""
        from luthier.training.launch import run_processes

        arguments = ["-m", "luthier.jobs.child", "--share", str(run.folder), *([] if is_new else ["--resume"])]
        if self._stop:
            raise AskedToStop
        before = len(run.read_events())
        code = run_processes(arguments, run.spec.compute.processes, run.folder)
        if code == 0 or self._fence.reason:
            return None
        ends = [each for each in run.read_events()[before:] if each["kind"] in ("failed", "paused")]
        said: dict[str, Any] = ends[-1] if ends else {}
        if said.get("kind") == "paused":
            return Outcome("paused", said["reason"], "the disk is full")
        if said.get("code", LuthierError.code) != LuthierError.code:
            ending = "crashed" if said["code"] in {each.code for each in _TRANSIENT} else "failed"
            return Outcome(ending, said["code"], said["message"])
        if code in EXIT_CODES.values():
            return self._stopped()
        return Outcome("crashed", "process_died", f"the leading process ended with exit code {code}")

    def _close(self, run: Run) -> Outcome:
        """The report, and what came of the run."""
        from luthier.adapters.certificate import find_certificate
        from luthier.workflow import is_complete, write_report

        if run.state != "finished" or (self._is_asked_to_stop and not is_complete(run)):
            return self._stopped()
        certificate = find_certificate(run)
        if certificate is not None and not certificate.is_valid:
            broken = certificate.broken
            first = f": {broken[0].claim}" if broken else ""
            raise ProofError(f"the certificate does not hold{first}", hint=f"luthier verify {run.id}")
        try:
            write_report(run)
        except LuthierError as error:
            log.warning("no report: %s", error.message)
        return Outcome("succeeded", model=self._model_id(run), trained_tokens=count_trained_tokens(run))

    @property
    def _is_asked_to_stop(self) -> bool:
        return bool(self._stop) or self._fence.reason is not None

    def _stopped(self) -> Outcome:
        """A stop that nobody asked for by word is the machine's: it is shutting down."""
        ending = _ENDINGS[self._fence.reason or "lost"]
        why = {"lost": "the lease was not renewed" if self._fence.reason else "the machine ended the trainer"}
        return Outcome(ending, message=why.get(ending, f"{ending}; the state is saved"))

    def _model_id(self, run: Run) -> str:
        return model_id(run.spec.model.base, run.id, self._order.suffix)


def model_id(base: str, job: str, suffix: str | None = None) -> str:
    """The `ft:` id of a job's result; the last colon part is the job."""
    return layout.model_id(base, f"{suffix}:{job}" if suffix else job)


def count_trained_tokens(run: Run) -> int:
    """Trained tokens of all steps that count."""
    steps = orjson.loads((run.folder / layout.TRAINING_LOG).read_bytes())
    return sum(int(each.get("trained_tokens", 0)) for each in steps)


def share_run(place: str, *, resume: bool) -> int:
    """This process's share of a run that several train; the events and the exit code say how it went."""
    _follow_parent()
    from luthier.engines.surroundings import prepare_process
    from luthier.training.launch import PEER_DIED
    from luthier.workflow import is_complete, reopen, train_run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    stop = StopFlag()
    run = Run(Path(place))
    try:
        with stop:
            prepare_process(run.spec.compute.processes)
            with stop.at_once():
                ready = reopen(run)
            trained = train_run(run, ready, watch=_after_training(run), stop=stop, resume=resume)
    except AskedToStop:
        return EXIT_CODES["SIGTERM"]
    except ProcessDiedError:
        return PEER_DIED
    except LuthierError as error:
        log.error("error: %s", error.message)
        return error.exit_code
    is_whole = trained.outcome.is_done and not (stop and os.environ.get("RANK") == "0" and not is_complete(run))
    return 0 if is_whole else EXIT_CODES[stop.reason or "SIGTERM"]


def _follow_parent() -> None:
    """Be asked to stop when the process that started this one is gone, so that none of them trains on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_OF_PARENTS_DEATH, signal.SIGTERM, 0, 0, 0)


def _told_to(run: Run) -> Watch:
    def watch(event: Event) -> None:
        run.events.append(event)

    return watch


def _after_training(run: Run) -> Watch:
    """Training records its own events; those of merging and certifying are for the run's log, too."""
    tell, is_over = _told_to(run), False

    def watch(event: Event) -> None:
        nonlocal is_over
        if is_over:
            tell(event)
        is_over = is_over or event.kind == "finished"

    return watch


def run_module(arguments: list[str]) -> NoReturn:
    """What `python -m luthier.jobs.child` does."""
    is_share = arguments[0] == "--share"
    code = share_run(arguments[1], resume="--resume" in arguments) if is_share else main(arguments[0])
    logging.shutdown()
    os._exit(code)  # taking torch apart would cost most of a second and save nothing


if __name__ == "__main__":
    run_module(sys.argv[1:])
