"""What a Tinker service cannot be asked for is refused by its key; what a spec leaves open is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.errors import SpecError
from luthier.spec.load import load_spec_text
from luthier.spec.run import RunSpec

BASE = '[engine]\nkind = "tinker"\n[model]\nbase = "practice"\n'


def load(text: str) -> RunSpec:
    return load_spec_text(BASE + text, "toml", name="run.toml", base_dir=Path()).spec


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[method]\nkind = "full"', "method.kind"),
        ('[method]\nkind = "qlora"', "method.kind"),
        ("[method]\nalpha = 16", "method.alpha"),
        ("[method]\ndropout = 0.1", "method.dropout"),
        ("[method]\nrslora = true", "method.rslora"),
        ("[method]\nlast_layers = 2", "method.last_layers"),
        ('[method]\nalso_train = ["lm_head"]', "method.also_train"),
        ('[optim]\nkind = "adam"', "optim.kind"),
        ('[optim]\nkind = "adafactor"', "optim.kind"),
        ('[compute]\nprecision = "fp16"', "compute.precision"),
        ('[compute]\nrecompute = "always"', "compute.recompute"),
        ("[compute]\nprocesses = 2", "compute.processes"),
        ("[compute.parallelism]\nactivation_checkpointing = true", "compute.parallelism.activation_checkpointing"),
        ('[evaluate]\nevery_steps = 5\nbest_metric = "token_accuracy"', "evaluate.best_metric"),
    ],
)
def test_what_no_service_honours_is_refused_by_its_key(text: str, key: str) -> None:
    with pytest.raises(SpecError) as told:
        load(text)
    assert f"`{key}`" in str(told.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[method]\nkind = "lora"\nrank = 8\nalpha = 32\ndropout = 0',
        '[compute]\nprecision = "fp32"\nmicro_batch_tokens = 512',
        "[optim]\nmicro_batch = 2",
    ],
)
def test_what_a_service_honours_is_taken(text: str) -> None:
    assert load(text).engine.kind == "tinker"


def test_a_model_of_the_service_is_of_this_engine_alone() -> None:
    changed: dict[str, Any] = {"model": {"base": "practice"}, "engine": {"kind": "torch", "model": "org/name"}}
    text = '[engine]\nmodel = "org/name"\n[model]\nbase = "practice"\n'
    with pytest.raises(SpecError, match=r"engine\.model"):
        load_spec_text(text, "toml", name="run.toml", base_dir=Path())
    assert RunSpec.model_validate({**changed, "engine": {"kind": "tinker", "model": "org/name"}}).engine.model
