"""A spec in the words of the Synth protocol, and a refusal by name of what those words cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.client.submit import build_submission
from luthier.client.synth import build_payload
from luthier.errors import CallError, SpecError
from luthier.spec.load import Override, load_spec
from tests.builders import chat_row, write_jsonl

SEED = Path(__file__).parents[2] / "data" / "synth_seed_001.toml"


def payload(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    rows = write_jsonl(tmp_path / "train.jsonl", [chat_row()])
    valid = write_jsonl(tmp_path / "valid.jsonl", [chat_row()])
    overrides = [Override("data.train", str(rows), "test"), Override("data.valid", str(valid), "test")]
    overrides += [Override(key.replace("__", "."), value, "test") for key, value in settings.items()]
    spec = load_spec(SEED, overrides).spec
    return build_payload(spec, build_submission(spec), {"train": "file_000001", "valid": "file_000002"})


def test_the_seed_s_job_is_sent_as_their_client_sends_it(tmp_path: Path) -> None:
    found = payload(tmp_path)
    assert found["training_file_id"] == "file_000001"
    assert found["model"] == "Qwen/Qwen3-4B"
    assert found["hyperparameters"] == {
        "n_epochs": 1,
        "per_device_batch": 1,
        "gradient_accumulation_steps": 64,
        "sequence_length": 4096,
        "learning_rate": 5e-06,
        "warmup_ratio": 0.03,
        "train_kind": "peft",
        "evaluation_strategy": "steps",
        "eval_steps": 20,
        "save_best_model_at_end": True,
        "metric_for_best_model": "val.loss",
        "greater_is_better": False,
    }
    assert found["metadata"]["effective_config"] == {
        "compute": {"gpu_type": "H100", "gpu_count": 1, "nodes": 1},
        "data": {"topology": {}, "validation_files": ["file_000002"]},
        "training": {"mode": "sft_offline", "use_qlora": True, "validation": {"enabled": True}},
    }


@pytest.mark.parametrize(
    ("key", "value"), [("method__rank", 8), ("optim__weight_decay", 0.1), ("data__train_on", "last_assistant")]
)
def test_what_it_cannot_say_is_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=key.replace("__", ".")):
        payload(tmp_path, **{key: value})


def test_what_is_no_single_file_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    for source in ("hf:org/name:train", str(tmp_path)):
        spec = load_spec(None, [Override("data.train", source, "t"), Override("model.base", "practice", "t")]).spec
        with pytest.raises(CallError, match="single files"):
            build_submission(spec)
