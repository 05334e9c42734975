"""A machine that has MLX and no torch: it trains, certifies, merges, quantises, answers and measures."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.unit.adapters.trained import save_model

pytest.importorskip("torch")  # the base is made with it
pytest.importorskip("mlx_lm")
pytestmark = [pytest.mark.slow, pytest.mark.torch]
ROOT = Path(__file__).parents[4]
_LEFT_OUT = ("torch", "functorch", "bitsandbytes", "accelerate", "peft", "trl", "triton", "nvidia")
SCRIPT = """
import importlib.util, sys
from pathlib import Path

assert importlib.util.find_spec("torch") is None
from luthier.adapters import verify
from luthier.engines.registry import choose_kind, load_sampler
from luthier.engines.verbs import SampleParams
from luthier.runs.home import luthier_home
from luthier.runs.resolve import find_resolved
from tests.certifying import never_start_a_process
from tests.unit.adapters.trained import train_run

never_start_a_process()
folder, base = Path(sys.argv[1]), sys.argv[2]
run = train_run(folder / "run", base, {"engine.kind": "mlx", "method.kind": "qlora", "optim.steps": 2})
assert verify.verify_run(run).is_valid
merged = verify.merge_run(run, None, verify.MergeOptions())
for model in (base, str(run.folder), str(merged.folder)):
    resolved = find_resolved(model, with_weights=True)
    assert choose_kind(resolved) == "mlx"
    sampler = load_sampler(resolved, luthier_home())
    assert len(sampler.sample([[5, 6, 7]], SampleParams(max_tokens=2))[0]) == 2
    assert sampler.score([[5, 6, 7]])[0] < 0
assert "torch" not in sys.modules
print("all of it")
"""


def test_everything_goes_without_torch(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith(_LEFT_OUT):
            (packages / path.name).symlink_to(path)
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT, str(tmp_path), str(base)],
        env={
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{packages}",
            "LUTHIER_HOME": str(tmp_path / "home"),
            "HOME": str(tmp_path),
            "PATH": "/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("all of it")
