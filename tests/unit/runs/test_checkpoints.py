"""Whatever single file breaks, and wherever the process dies, the newest whole checkpoint is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import CheckpointError, DiskFullError
from luthier.runs import checkpoints, manifest
from luthier.runs.checkpoints import CheckpointStore, ResumePoint, SavedCheckpoint
from tests.unit.runs.folders import DAMAGES, FILES, STATE, save, writer

PARTS = [("checkpoint_step_{}", name) for name in (*FILES, "manifest.json")] + [
    ("training_state/step_{}", name) for name in (*STATE, "manifest.json")
]
CRASH_POINTS = manifest.CRASH_POINTS + checkpoints.CRASH_POINTS


def newest(folder: Path, **facts: object) -> ResumePoint:
    point, _ = CheckpointStore(folder).find_newest()
    assert point is not None
    assert (point.weights / "adapter_config.json").read_bytes() == FILES["adapter_config.json"] + b"%d" % point.step
    assert (point.state / "state.json").read_bytes() == STATE["state.json"] + b"%d" % point.step
    assert point.facts == {"position": point.step * 4, "best": None, "step": point.step, **facts}
    return point


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    store = CheckpointStore(folder)
    for step in (10, 20):
        save(store, step)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("part", "name"), PARTS, ids=lambda each: str(each).format("N"))
def test_every_damage_to_every_file_is_found_and_passed_over(
    part: str, name: str, damage: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    DAMAGES[damage](folder / part.format(20) / name)
    assert newest(folder).step == 10
    _, broken = CheckpointStore(folder).find_newest()
    assert [(point.step, point.path) for point in broken] == [(20, folder / part.format(20))]
    assert f"`{name}`" in broken[0].reason
    store = CheckpointStore(folder)
    save(store, 20)
    assert newest(folder).step == 20


def test_the_cases_are_all_there() -> None:
    assert (len(PARTS), len(DAMAGES), len(set(CRASH_POINTS))) == (6, 9, 13)


@given(
    place=st.floats(0, 1),
    bit=st.integers(0, 7),
    part=st.sampled_from(PARTS),
)
def test_any_flipped_bit_is_found(saved: Path, place: float, bit: int, part: tuple[str, str]) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "run"
        shutil.copytree(saved, folder)
        path = folder / part[0].format(20) / part[1]
        content = bytearray(path.read_bytes())
        content[round(place * (len(content) - 1))] ^= 1 << bit
        path.write_bytes(content)
        assert newest(folder).step == 10


def test_weights_and_state_of_two_saves_are_no_checkpoint(tmp_path: Path) -> None:
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        save(CheckpointStore(tmp_path / run), 10)
    store = CheckpointStore(tmp_path / "a")
    store.save(20, writer(FILES, 20), writer(STATE, 20), {})
    CheckpointStore(tmp_path / "b").save(20, writer(FILES, 21), writer(STATE, 20), {})
    shutil.rmtree(tmp_path / "a" / "checkpoint_step_20")
    shutil.copytree(tmp_path / "b" / "checkpoint_step_20", tmp_path / "a" / "checkpoint_step_20")
    point, broken = store.find_newest()
    assert point is not None
    assert point.step == 10
    assert "not of one save" in broken[0].reason


def test_weights_without_their_state_are_named(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "training_state" / "step_20")
    assert newest(folder).step == 10
    assert CheckpointStore(folder).find_newest()[1][0].reason == "training_state/step_20 is missing"
    with pytest.raises(CheckpointError):
        CheckpointStore(folder).check(20)


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "no run").find_newest() == (None, [])


def names(folder: Path) -> tuple[list[int], list[int]]:
    weights = sorted(int(path.name.rpartition("_")[2]) for path in folder.glob("checkpoint_step_*"))
    return weights, sorted(int(path.name.rpartition("_")[2]) for path in (folder / "training_state").iterdir())


def test_the_two_newest_states_and_all_weights_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (5, 10, 15, 100):
        save(store, step)
    assert names(tmp_path) == ([5, 10, 15, 100], [15, 100])


def test_as_many_weights_as_asked_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_weights=3)
    for step in range(1, 9):
        save(store, step, needs=[4 if step >= 4 else 2])
    assert names(tmp_path) == ([4, 6, 7, 8], [7, 8])
    lean = CheckpointStore(tmp_path, keep_weights=1)
    save(lean, 9)
    assert names(tmp_path) == ([4, 8, 9], [8, 9])  # the older state, and what it needs, stay beside it
    save(lean, 10)
    assert names(tmp_path) == ([9, 10], [9, 10])


def test_what_the_older_state_needs_is_kept_for_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_weights=1)
    for step, best in ((1, 1), (2, 1), (3, 3)):
        save(store, step, needs=[best])
    assert names(tmp_path) == ([1, 2, 3], [2, 3])
    (tmp_path / "checkpoint_step_3" / "adapter_config.json").unlink()
    assert newest(tmp_path, needs=[1]).step == 2


def test_a_checkpoint_whose_best_is_broken_is_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step, needs in ((1, []), (2, [2]), (3, [2])):
        save(store, step, needs=needs)
    (tmp_path / "checkpoint_step_2" / "adapter_config.json").write_bytes(b"")
    point, broken = store.find_newest()
    assert point is None  # the state of step 1 was pruned, and those of 2 and 3 both need what is broken
    assert [each.step for each in broken] == [3, 2, 1]
    assert "cannot do without another one: checkpoint_step_2: `adapter_config.json` has 0 bytes" in broken[0].reason


def test_no_room_for_another_one_is_known_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    size_bytes = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(size_bytes, size_bytes, size_bytes))
    save(store, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(size_bytes, 0, size_bytes // 2))
    with pytest.raises(DiskFullError, match="are needed there"):
        save(store, 3)
    assert newest(tmp_path).step == 2


def test_a_broken_one_does_not_count_among_those_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        save(store, step)
    (tmp_path / "training_state" / "step_2" / "state.json").unlink()
    later = CheckpointStore(tmp_path)
    save(later, 3)
    assert names(tmp_path)[1] == [1, 2, 3]
    assert later.find_newest()[0] is not None
    save(later, 4)
    assert names(tmp_path)[1] == [3, 4]


def test_in_the_background_one_after_another(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    may_write, told = threading.Event(), []

    def slowly(folder: Path) -> None:
        assert may_write.wait(10)
        writer(FILES, 1)(folder)

    store.save_in_background(1, slowly, writer(STATE, 1), {"position": 4, "best": None}, on_saved=told.append)
    assert store.is_saving
    assert told == []
    may_write.set()
    store.save_in_background(2, writer(FILES, 2), writer(STATE, 2), {"position": 8, "best": None}, on_saved=told.append)
    last = store.wait()
    assert [each.step for each in told] == [1, 2]
    assert last == told[1]
    assert isinstance(last, SavedCheckpoint)
    assert last.size_bytes > 3000
    assert not store.is_saving
    assert newest(tmp_path).step == 2


def test_what_failed_in_the_background_is_raised_once_where_it_is_seen(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def full(folder: Path) -> None:
        with Path("/dev/full").open("wb") as file:
            file.write(b"x")

    store.save_in_background(2, full, writer(STATE, 2), {})
    with pytest.raises(DiskFullError):
        store.wait()
    store.wait()
    store.save_in_background(2, writer(FILES, 2), full, {})
    with pytest.raises(DiskFullError):
        store.save(3, writer(FILES, 3), writer(STATE, 3), {})
    assert newest(tmp_path).step == 1
    save(store, 3)
    assert newest(tmp_path).step == 3


def die_at_each(parent: Path, steps: list[int]) -> dict[Path, int]:
    """Folders of children that died at each passing of each crash point, with their exit codes."""
    cases = [f"{name}:{count}" for name in CRASH_POINTS for count in range(1, 2 * len(steps) + 1)]
    call = [sys.executable, "-m", "tests.unit.runs.crash_child", str(parent), json.dumps(steps), json.dumps(cases)]
    root = Path(__file__).parents[3]
    done = subprocess.run(call, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    assert len(codes) == len(cases)
    return {parent / case.replace(":", "-"): code for case, code in codes.items()}


def test_a_crash_at_any_point_loses_no_finished_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    died = {folder: code for folder, code in die_at_each(tmp_path, [10, 20, 30]).items() if code}
    assert set(died.values()) == {137}
    assert {folder.name.partition("-")[0] for folder in died} == set(CRASH_POINTS) - {"after_aside"}
    for folder in died:
        done = int((folder / "done").read_text()) if (folder / "done").exists() else 0
        found, _ = CheckpointStore(folder).find_newest()
        assert (found.step if found else 0) >= done, folder
        if done:
            newest(folder)
        store = CheckpointStore(folder, keep_weights=2)
        for step in range(done + 10, 50, 10):
            save(store, step)
        assert newest(folder).step == 40
        assert names(folder) == ([30, 40], [30, 40]), folder
        assert list(folder.rglob("*.tmp-*")) == []


def test_a_crash_while_one_is_saved_anew_loses_that_one_at_most(tmp_path: Path) -> None:
    died = {folder: code for folder, code in die_at_each(tmp_path, [10, 20, 20]).items() if code}
    assert {folder.name for folder in died} >= {"after_aside-1", "after_aside-2"}
    for folder in died:
        if (folder / "done").exists():
            assert newest(folder).step >= 10
