"""What fits where, and what a request is told that asks for more than there is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.errors import PlanError
from luthier.jobs.capacity import (
    GIB,
    Capacity,
    Needs,
    check_asked,
    does_fit,
    find_capacity,
    list_shortages,
    may_check,
    offer_for,
    read_capacity,
    read_needs,
)
from luthier.machine import Machine

CPU = Capacity(processors=4, memory_bytes=16 * GIB)
GPUS = Capacity(
    8, 64 * GIB, devices=2, device="cuda", device_name="NVIDIA H100 80GB HBM3", device_bytes=80 * GIB, slots=2
)


def test_a_job_takes_from_what_is_left() -> None:
    small = Needs(processors=1, memory_bytes=6 * GIB)
    two = replace(CPU, slots=2)
    assert does_fit(small, two)
    assert does_fit(small, two.without([small]))
    assert not does_fit(small, two.without([small, small]))  # no slot
    assert not does_fit(small, replace(CPU, slots=3).without([small, small]))  # no memory
    assert list_shortages(small, CPU.without([small, small])) == ["6.0 GiB of memory, and 4.0 GiB are there"]
    assert list_shortages(Needs(processors=5), CPU) == ["5 processors, and 4 are there"]


def test_what_was_planned_for_one_device_does_not_go_to_another() -> None:
    assert not does_fit(Needs(device="cuda", devices=1), CPU)
    assert not does_fit(Needs(device="cpu"), GPUS)
    assert does_fit(Needs(device="cuda", devices=2, device_bytes=79 * GIB), GPUS)
    assert not does_fit(Needs(device="cuda", devices=1, device_bytes=81 * GIB), GPUS)


def test_rows_hold_them_and_more() -> None:
    needs = Needs(processors=2, memory_bytes=5, gpu_type="H100", gpu_count=2)
    assert read_needs({**needs.as_dict(), "container_count": 3}) == needs
    assert read_needs({}) == Needs()
    assert read_capacity({**GPUS.as_dict(), "colour": "blue"}) == GPUS


@pytest.mark.parametrize(
    ("asked", "there", "offers", "message"),
    [
        (Needs(gpu_type="H100"), [CPU], {}, "gpu_type 'H100' is not what this server has: no accelerator"),
        (Needs(gpu_type="B200"), [CPU, GPUS], {}, "gpu_type 'B200' is not what this server has: NVIDIA H100"),
        (Needs(gpu_type="H100", gpu_count=4), [GPUS], {}, "gpu_count 4 is asked for, and the largest machine .* has 2"),
        (Needs(gpu_count=2), [CPU], {}, "gpu_count 2 is asked for, and the largest machine of this server has 0"),
        (Needs(nodes=2), [GPUS], {}, "2 nodes are asked for"),
        (Needs(processors=9), [CPU, GPUS], {}, "the job needs 9 processors, and [48] are there"),
    ],
)
def test_a_request_for_more_is_refused_with_the_numbers(
    asked: Needs, there: list[Capacity], offers: dict[str, str], message: str
) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        check_asked(asked, there, offers)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("asked", "there", "offers"),
    [
        (Needs(gpu_type="H100", gpu_count=2, nodes=1), [CPU, GPUS], {}),
        (Needs(gpu_type="h100-80gb"), [GPUS], {}),
        (Needs(gpu_type="H100", gpu_count=8), [CPU], {"H100": "cpu"}),
        (Needs(gpu_count=1), [CPU], {}),
        (Needs(), [], {}),
    ],
)
def test_what_is_there_or_offered_is_taken(asked: Needs, there: list[Capacity], offers: dict[str, str]) -> None:
    check_asked(asked, there, offers)


def test_who_checks_a_job_trains_it_on_what_it_asked_for() -> None:
    asked = Needs(gpu_type="H100")
    assert may_check(asked, GPUS, {})
    assert not may_check(asked, CPU, {})
    assert may_check(asked, CPU, {"H100": "cpu"})
    assert may_check(Needs(), CPU, {})
    assert offer_for("", [GPUS], {}) is None


def test_a_machine_keeps_some_memory_for_itself() -> None:
    machine = Machine(4, 100, 50, "cpu", "some processor", 100, 50, True, "key")
    assert find_capacity(machine) == Capacity(4, 90, device_name="some processor")
    cuda = replace(machine, device="cuda", device_memory_bytes=7, device_count=3)
    assert find_capacity(cuda).slots == 3
    assert find_capacity(cuda, slots=1).devices == 3
