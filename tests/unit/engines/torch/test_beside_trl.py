"""Whole steps held against TRL's trainers on the same tokens, in the same order, from the same start, in fp32."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data.order import step_examples
from luthier.engines.verbs import StepParams
from luthier.runs import events
from luthier.runs.checkpoints import CheckpointStore
from luthier.spec.plan import RunPlan
from luthier.training.batches import Item, build_batch
from luthier.training.loop import Loop
from luthier.training.objectives import build_loss
from luthier.training.schedule import learning_rate
from luthier.training.signals import StopFlag
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.tiny import (
    VOCAB,
    assert_near,
    assert_same_gradients,
    build_engine,
    draw_items,
    gradients_of,
    load_plain,
    make_plan,
    write_prepared,
)

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the `trl` extra"),
]
STEPS, BATCH = 20, 4


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What these libraries warn of is theirs."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tokenizer() -> Any:
    """A tokenizer that is asked for nothing but its padding."""
    import transformers
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(VOCAB)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="w0", eos_token="w2"
    )


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
        "seed": 0,
        **more,
    }


def save(engine: Any, folder: Path) -> Path:
    folder.mkdir()
    engine.save("weights").write(folder)
    return folder


def own_name(name: str) -> str:
    for ending in ("lora_A", "lora_B"):
        name = name.replace(f"{ending}.default.weight", ending)
    return name.removeprefix("base_model.model.")


# -- imitation ----------------------------------------------------------------------------------------------------


def train_with_trl(model: Any, items: list[Item], plan: RunPlan, folder: Path) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of each step, by TRL's trainer, two examples at once."""
    import datasets
    import trl

    optim, chosen = plan.spec.optim, []
    for step in range(plan.steps):
        chosen += [items[int(place)] for place in step_examples(step, len(items), optim.batch, plan.spec.seed)]
    rows = [
        {
            "input_ids": item.sequences[0].tolist(),
            "completion_mask": np.isin(np.arange(len(item.sequences[0])), item.trained[0]).astype(int).tolist(),
        }
        for item in chosen
    ]
    losses: list[float] = []

    class InOrder(trl.SFTTrainer):
        """Its rows as they come, and every loss noted."""

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset if dataset is None else dataset)

        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(*arguments, **named)
            losses.append(loss.item())
            return loss

    assert optim.learning_rate
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=optim.learning_rate, weight_decay=optim.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, plan.steps, optim) / (optim.learning_rate or 1)
    )
    arguments = settings(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=optim.batch // 2,
        max_steps=plan.steps,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=1,
        completion_only_loss=True,
    )
    trainer = InOrder(
        model=model,
        args=trl.SFTConfig(**arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return np.array(losses).reshape(plan.steps, -1).sum(1).tolist(), norms


@pytest.mark.parametrize(("kind", "method"), [("llama", "lora"), ("qwen3", "full"), ("gemma2", "lora")])
def test_the_first_losses_of_a_run_are_those_of_trl(
    kind: str, method: str, shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    optim = {"learning_rate": 5e-3, "schedule": "cosine", "warmup_steps": 4, "weight_decay": 0.05, "max_grad_norm": 0.5}
    lengths = np.random.default_rng(2).integers(4, 30, 30).tolist()
    items = draw_items(*lengths, seed=6)
    plan = make_plan(method, seed=3, steps=STEPS, examples=len(items), optim=optim, compute={"micro_batch_tokens": 40})
    plan = replace(plan, stream_end=None)
    engine = build_engine(shaped(kind), own_home, plan)
    model = load_plain(shaped(kind))
    if method == "lora":
        model = PeftModel.from_pretrained(model, save(engine, tmp_path / "start"), is_trainable=True)
    done: list[events.StepDone] = []
    store = CheckpointStore(tmp_path / "run")
    prepared = write_prepared(tmp_path / "prepared", items)

    def watch(event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            done.append(event)

    outcome = Loop(plan, prepared, engine, store, watch=watch, stop=StopFlag()).run()
    assert outcome.step == STEPS
    losses, norms = train_with_trl(model, items, plan, tmp_path / "trl")
    assert losses[-1] < losses[0] - 0.2
    assert max(norms) > optim["max_grad_norm"]
    assert np.abs(np.array([each.loss for each in done]) - losses).max() < 1e-4
    assert_near([each.grad_norm for each in done], norms, 1e-3)
    expected = {own_name(name): each.detach().numpy() for name, each in model.named_parameters() if each.requires_grad}
    found = engine._masters.named()
    assert set(found) == set(expected)
    # Adam divides by the root of the second moment, so that weights whose gradient is next to nothing may part.
    away = np.concatenate([np.abs(found[name].numpy() - each).ravel() for name, each in expected.items()])
    assert np.quantile(away, 0.99) < 1e-4


# -- preference ---------------------------------------------------------------------------------------------------


def trl_loss(
    model: Any, reference: Any, items: list[Item], folder: Path, **more: Any
) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of one batch of pairs by TRL's trainer, and the gradients that it leaves in the model."""
    import datasets
    import trl

    rows = []
    for item in items:
        (chosen, rejected), start = (each.tolist() for each in item.sequences), item.shared
        rows.append({"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]})

    class Prepared(trl.DPOTrainer):
        """Its rows are token ids already, and taken as they come."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset if dataset is None else dataset)

    trainer = Prepared(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(**settings(folder, per_device_train_batch_size=len(rows), disable_dropout=True, **more)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    trainer.model.train()
    model.zero_grad()
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    found = {
        own_name(name): each.grad.numpy().copy() for name, each in model.named_parameters() if each.grad is not None
    }
    return loss.item(), found


PAIRS = ((7, 5, 9), (3, 8, 2), (12, 1, 6), (5, 4, 4))
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"beta": 0.3}, {"beta": 0.3, "loss_type": ["sigmoid"]}),
    "ipo": ({"beta": 0.2, "loss": "ipo"}, {"beta": 0.2, "loss_type": ["ipo"]}),
    "by length": ({"beta": 2.0, "length_normalised": True}, {"beta": 2.0, "loss_type": ["sigmoid_norm"]}),
}


def moved(shaped: Shaped, home: Path, method: str, kind: str = "llama") -> tuple[Any, list[Item], np.ndarray]:
    """An engine some steps away from its start, pairs, and what the start says of their tokens."""
    items = draw_items(*PAIRS, seed=8)
    engine = build_engine(shaped(kind), home, make_plan(method))
    batch = build_batch(items)
    reference: np.ndarray = engine.forward(batch).result().logprobs
    for _ in range(3):
        loss = build_loss(make_plan().spec.objective, items[1:3], build_batch(items[1:3]), scale=0.02, references=None)
        engine.forward_backward(build_batch(items[1:3]), loss).result()
        engine.optim_step(StepParams(1e-2)).result()
    return engine, items, reference


def our_loss(
    engine: Any, items: list[Item], reference: np.ndarray, **objective: Any
) -> tuple[float, dict[str, float], dict[str, np.ndarray]]:
    from luthier.spec.objective import DpoObjective

    batch, ends = build_batch(items), np.cumsum([0, *(item.trained_tokens for item in items)])
    by_item = {item.example: reference[ends[place] : ends[place + 1]] for place, item in enumerate(items)}
    asked = DpoObjective(kind="dpo", **objective)
    loss = build_loss(asked, items, batch, scale=1 / len(items), references=lambda item: by_item[item.example])
    computed = engine.forward_backward(batch, loss).result()
    return computed.value / len(items), computed.metrics, gradients_of(engine)


def policy(engine: Any, base: Path, method: str, folder: Path) -> Any:
    """The engine's weights as they stand, in a model for TRL."""
    from peft import PeftModel

    saved = save(engine, folder)
    return (
        PeftModel.from_pretrained(load_plain(base), saved, is_trainable=True) if method == "lora" else load_plain(saved)
    )


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", LOSSES)
def test_dpo_is_that_of_trl(name: str, method: str, shaped: Shaped, own_home: Path, tmp_path: Path) -> None:
    engine, items, reference = moved(shaped, own_home, method)
    assert [item.shared for item in items] == [prompt for prompt, _, _ in PAIRS]
    ours, theirs = LOSSES[name]
    value, metrics, gradients = our_loss(engine, items, reference, **ours)
    assert abs(metrics["reward_margin"]) > 0.01
    model = policy(engine, shaped("llama"), method, tmp_path / "policy")
    expected, expected_gradients = trl_loss(model, load_plain(shaped("llama")), items, tmp_path / "trl", **theirs)
    assert value == pytest.approx(expected, rel=1e-4)
    assert_same_gradients(gradients, expected_gradients, 5e-4)


def test_label_smoothing_weighs_the_loss_with_that_of_the_answers_swapped(
    shaped: Shaped, own_home: Path, tmp_path: Path
) -> None:
    """TRL has dropped it from its sigmoid loss; its `robust` is another loss (unbiased, so not bounded below by 0)."""
    engine, items, reference = moved(shaped, own_home, "full")
    value, _, gradients = our_loss(engine, items, reference, beta=0.3, label_smoothing=0.2)
    model = policy(engine, shaped("llama"), "full", tmp_path / "policy")
    swapped = [Item(item.example, item.sequences[::-1], item.trained[::-1]) for item in items]
    parts = []
    for number, each in enumerate((items, swapped)):
        base = load_plain(shaped("llama"))
        parts.append(trl_loss(model, base, each, tmp_path / f"trl_{number}", beta=0.3, loss_type=["sigmoid"]))
    assert value == pytest.approx(0.8 * parts[0][0] + 0.2 * parts[1][0], rel=1e-4)
    expected = {name: 0.8 * each + 0.2 * parts[1][1][name] for name, each in parts[0][1].items()}
    assert_same_gradients(gradients, expected, 5e-4)
