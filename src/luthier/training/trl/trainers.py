"""TRL's trainers made durable by one mixin: our steps in our order, our schedule, and none of their own saving."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from luthier.runs.manifest import storage_errors
from luthier.spec.method import FullMethod
from luthier.spec.objective import DpoObjective
from luthier.spec.plan import RunPlan
from luthier.training.schedule import learning_rate
from luthier.training.trl.model import Loaded

# What tells these libraries of other processes: a step is shared out and summed by us.
_PROCESS_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adam": "adamw_torch",
    "adafactor": "adafactor",
    "adamw_8bit": "adamw_8bit",
}
_NOISY = ("accelerate", "datasets", "peft", "trl")


class Steps(Protocol):
    """Who decides the steps of a trainer, and takes them with it."""

    def list_steps(self) -> Any:
        """The steps that are left, each a mapping, made one by one as they are asked for; their number is known."""
        ...

    def take(self, model: Any, inputs: Any) -> Tensor:
        """Loss and gradients of a step, by `Durable.add_gradients`."""
        ...

    def check(self, grad_norm: float) -> float:
        """Before the optimizer moves: the gradients' norm; what must not be taken has its gradients cleared."""
        ...

    def finish(self) -> None:
        """After the optimizer has moved."""
        ...


_Trainer: Any = transformers.Trainer


class Durable(_Trainer):
    """What makes a trainer of TRL train the steps of a run, and leave everything else of the run to us."""

    steps: Steps
    first_step = 0
    plan: RunPlan
    precompute_ref_logps: bool
    loss_is_scaled_for_ga = True

    def add_gradients(self, model: Any, inputs: dict[str, Any], units: int) -> float:
        """Loss and gradients of one micro-batch as shares of a step of so many units."""
        return float(super().training_step(model, inputs, units))

    # -- what the run decides ----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        return self.steps.list_steps()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        return self.steps.take(model, inputs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        return self.steps.check(float(super()._get_grad_norm(model, grad_norm)))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler: Any = Planned(optimizer or self.optimizer, self.plan, self.first_step)
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    # -- what the run does itself ------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _maybe_log_save_evaluate(self, *_: Any, **__: Any) -> None:
        pass

    def _save_checkpoint(self, *_: Any, **__: Any) -> None:
        raise AssertionError("the run saves its checkpoints itself")

    def log(self, *_: Any, **__: Any) -> None:
        pass

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _send_telemetry(self) -> None:
        pass


class Imitation(Durable, SFTTrainer):
    """Cross-entropy on the trained tokens."""


class Preference(Durable, DPOTrainer):
    """Direct preference optimisation."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL takes the mean over the pairs at hand; of a step it is the mean over all of its pairs."""
        pairs = len(inputs["input_ids"]) // 2
        return super().compute_loss(model, inputs) * (pairs / num_items_in_batch)


class Planned(torch.optim.lr_scheduler.LRScheduler):
    """The learning rate of each step as the plan has it, from the first step of this process on."""

    def __init__(self, optimizer: Any, plan: RunPlan, first_step: int) -> None:
        self._plan, self._first_step = plan, first_step
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        rate = learning_rate(self._first_step + self.last_epoch, self._plan.steps, self._plan.spec.optim)
        return [rate] * len(self.optimizer.param_groups)


class _AfterStep(transformers.TrainerCallback):
    def __init__(self, trainer: Durable) -> None:
        self._trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._trainer.steps.finish()


def build_trainer(plan: RunPlan, loaded: Loaded) -> Durable:
    """The trainer of a plan's objective over a model, with PEFT's layers put in; it has no steps yet."""
    is_paired = isinstance(plan.spec.objective, DpoObjective)
    # It looks at a row before it begins; ours go past it, token ids that nobody tokenises again.
    row = (
        {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]} if is_paired else {"input_ids": [0], "labels": [0]}
    )
    with (
        storage_errors(Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix="luthier-trl-") as folder,
        quiet(),
        _single_process(),
    ):
        arguments = _arguments(plan, folder)
        trainer: Durable = (Preference if is_paired else Imitation)(
            model=loaded.model,
            args=arguments,
            data_collator=list,
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=_no_tokenizer(),
            peft_config=loaded.lora,
        )
    trainer.plan, trainer.processing_class, trainer.precompute_ref_logps = plan, None, True
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(_AfterStep(trainer))
    if plan.spec.optim.kind == "adam":
        _, known = trainer.get_optimizer_cls_and_kwargs(arguments)
        trainer.optimizer_cls_and_kwargs = torch.optim.Adam, {**known, "fused": True}
    return trainer


def _arguments(plan: RunPlan, folder: str) -> Any:
    spec = plan.spec
    optim, compute, objective = spec.optim, spec.compute, spec.objective
    recomputes = compute.recompute == "always"
    shared: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": plan.device == "cpu",
        "bf16": compute.precision == "bf16",
        "fp16": False,
        "activation_checkpointing": recomputes,
        "gradient_checkpointing": recomputes,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": optim.learning_rate,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "optim": _OPTIMIZERS[optim.kind],
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "router_aux_loss_coef": 0.0,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "max_length": None,
        "seed": spec.seed % 2**32,
    }
    if not isinstance(objective, DpoObjective):
        made: Any = SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True})
    else:
        by_length = "sigmoid_norm" if objective.length_normalised else "sigmoid"
        made = DPOConfig(
            **shared,
            beta=objective.beta,
            loss_type=["ipo" if objective.loss == "ipo" else by_length],
            disable_dropout=False,
            # What the reference says comes with the rows. TRL would load one for a model without an adapter, unless
            # it is told so here; with one it would take a hash of the whole model for nothing.
            precompute_ref_log_probs=isinstance(spec.method, FullMethod),
        )
    # One device a process: with more in sight it would split each batch over all of them.
    made.device  # noqa: B018 (it counts the devices when asked for the first time)
    made._n_gpu = min(made._n_gpu, 1)
    return made


def _no_tokenizer() -> Any:
    """What TRL asks for by type; it can tell no text from another, so nothing here is tokenised again."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"": 0}, unk_token="")), eos_token="", pad_token=""
    )


@contextmanager
def _single_process() -> Iterator[None]:
    """Accelerate on its own: neither our other processes nor what a shell says of its own ones concern it."""
    hidden = {key: os.environ.pop(key) for key in list(os.environ) if key in _PROCESS_KEYS or _is_accelerates(key)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_accelerates(key: str) -> bool:
    return key.startswith(("ACCELERATE_", "FSDP_", "DEEPSPEED_"))


@contextmanager
def quiet() -> Iterator[None]:
    """What these libraries warn of among themselves is not for the person who trains."""
    transformers_logging.set_verbosity_error()
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
