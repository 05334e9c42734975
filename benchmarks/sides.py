"""One side of a training benchmark in a process of its own: does the job it is given and writes what it measured.

`python benchmarks/sides.py JOB` reads the job's JSON file. Jobs: make the model, prepare the rows, and train as
`luthier`, as TRL's trainers, as transformers' Trainer with PEFT, or as a plain loop over transformers and PEFT. All
of them train the token ids that Luthier's preparation made, in the order of its run, from the same adapter.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """What a side is asked to do; all paths are text, so that it travels as JSON."""

    kind: str
    out: str
    model: str
    spec: str = ""
    examples: str = ""
    adapter: str = ""
    method: str = "lora"
    objective: str = "sft"
    rank: int = 16
    batch: int = 8
    steps: int = 1
    learning_rate: float = 1e-3
    save_every_steps: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measured:
    """What a side did: each step's loss, gradient norm and the seconds since the step before it."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Seconds of all its threads together, for each step; on a shared machine they waver less."""
    reference_seconds: float = 0.0
    load_seconds: float = 0.0
    peak_bytes: int = 0
    """The most that the process held, of the device's memory where there is one."""
    training_bytes: int = 0
    """The same from the first step on."""
    saves: list[float] = field(default_factory=list)
    """Seconds that training stood still for each checkpoint."""
    notes: dict[str, Any] = field(default_factory=dict)


# -- measuring --------------------------------------------------------------------------------------------------


def resident_peak() -> int:
    """The most memory this program has held. Not `ru_maxrss`, which starts at what the parent held when it forked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    """Begin to count the peak anew, so that loading and training can be told apart."""
    Path("/proc/self/clear_refs").write_text("5")


class Stopwatch:
    """Times steps from outside: what lies between the end of one step and the end of the next."""

    def __init__(self) -> None:
        self.measured = Measured()
        self._began = self._last = time.perf_counter()
        self._last_cpu = 0.0
        self._device: Any = None

    def start(self) -> None:
        """The model is loaded; training begins now."""
        import torch

        self._device = torch.cuda if torch.cuda.is_available() else None
        self.measured.load_seconds = time.perf_counter() - self._began
        self.measured.peak_bytes = self._peak()
        if self._device:
            self._device.reset_peak_memory_stats()
        else:
            forget_peak()
        self.measured.notes["threads"] = torch.get_num_threads()
        self._last, self._last_cpu = time.perf_counter(), time.process_time()

    def lap(self) -> None:
        """A step has ended."""
        if self._device:
            self._device.synchronize()
        now, cpu = time.perf_counter(), time.process_time()
        self.measured.seconds.append(now - self._last)
        self.measured.cpu_seconds.append(cpu - self._last_cpu)
        self._last, self._last_cpu = now, cpu

    def note(self, loss: float, grad_norm: float) -> None:
        """What the step was about."""
        self.measured.losses.append(float(loss))
        self.measured.grad_norms.append(float(grad_norm))

    def time_saves(self, save: Callable[..., Any], job: Job) -> Callable[..., Any]:
        """The same, timed where training waits for it: not after the last step."""

        def run(*arguments: Any, **named: Any) -> Any:
            is_waited_for = len(self.measured.seconds) < job.steps
            return timed(save, self.measured.saves if is_waited_for else [])(*arguments, **named)

        return run

    def stop(self) -> Measured:
        """Training and what comes after it are done."""
        self.measured.training_bytes = self._peak()
        self.measured.peak_bytes = max(self.measured.peak_bytes, self.measured.training_bytes)
        return self.measured

    def _peak(self) -> int:
        return int(self._device.max_memory_allocated()) if self._device else resident_peak()


def timed(work: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same, and the seconds of each call appended."""

    def run(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = work(*arguments, **named)
        seconds.append(time.perf_counter() - started)
        return result

    return run


# -- what all sides share ---------------------------------------------------------------------------------------


def make_model(job: Job) -> Measured:
    """Random weights in bf16 beside the text files that are there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(job.model)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(job.model)
    return Measured(notes={"parameters": sum(weight.numel() for weight in model.parameters())})


def prepare(job: Job) -> Measured:
    """The rows through Luthier's own preparation and order; and the adapter that its engine starts with."""
    import numpy as np

    from luthier.data.order import step_examples
    from luthier.training.batches import read_item

    ready = read_plan(job)
    prepared, plan = ready.prepared, ready.plan
    examples = []
    for step in range(plan.steps):
        places = step_examples(step, plan.train_examples, job.batch, plan.spec.seed, last=plan.stream_end)
        examples += [int(example) for example in prepared.train[places]]
    found = []
    for example in examples:
        item = read_item(prepared, example)
        masks = [np.isin(np.arange(len(ids)), places) for ids, places in zip(item.sequences, item.trained, strict=True)]
        ids = [sequence.tolist() for sequence in item.sequences]
        found.append({"ids": ids, "trained": [mask.tolist() for mask in masks]})
    Path(job.examples).write_text(json.dumps(found))
    if job.adapter and not Path(job.adapter).exists():
        from luthier.engines.torch.engine import build
        from luthier.runs.home import luthier_home

        Path(job.adapter).mkdir(parents=True)
        build(plan, ready.resolved, luthier_home()).save("weights").write(Path(job.adapter))
    return Measured(notes={"plan": plan.spec.compute.model_dump(), "steps": plan.steps})


def read_plan(job: Job) -> Any:
    """The plan of the job's spec, on its prepared rows."""
    from luthier.spec.load import load_spec
    from luthier.workflow import make_ready, prepare_data, warm_up

    spec = load_spec(Path(job.spec)).spec
    warm_up(spec)
    return make_ready(spec, prepare_data(spec))


def read_examples(job: Job) -> list[dict[str, Any]]:
    """What `prepare` wrote: all rows in the order in which they are trained."""
    found: list[dict[str, Any]] = json.loads(Path(job.examples).read_text())
    return found


def labels_of(example: dict[str, Any]) -> list[int]:
    """Ids where they are trained, -100 elsewhere."""
    return [
        token if is_trained else -100
        for token, is_trained in zip(example["ids"][0], example["trained"][0], strict=True)
    ]


def copy_start(model: Any, job: Job) -> None:
    """Give a PEFT model the adapter that Luthier starts with."""
    import torch
    from safetensors.torch import load_file

    start = load_file(str(Path(job.adapter) / "adapter_model.safetensors"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(start.pop(name.replace(".default", "")))
    if start:
        raise SystemExit(f"the peer has no weights for {sorted(start)[:3]}")


def lora_config(job: Job) -> Any:
    """PEFT's configuration of the same adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=job.rank, lora_alpha=2 * job.rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def quantised() -> Any:
    """NF4 with double quantisation, computed in bf16."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


# -- Luthier ----------------------------------------------------------------------------------------------------


def train_luthier(job: Job) -> Measured:
    """What `luthier train` runs once its flags are read: warm-up, preparation, plan, run folder, training, results."""
    from luthier.runs import events
    from luthier.training.loop import Loop
    from luthier.training.signals import StopFlag
    from luthier.workflow import start_run, train_run

    watch = Stopwatch()
    ready = read_plan(job)
    run = start_run(ready)
    references: list[float] = []
    Loop._save = watch.time_saves(Loop._save, job)  # type: ignore[method-assign]

    def follow(event: events.Event) -> None:
        if isinstance(event, events.EngineLoaded):
            watch.start()
        elif isinstance(event, events.Working) and event.done == event.count:
            watch.lap()
            references.append(watch.measured.seconds.pop())
            watch.measured.cpu_seconds.pop()
        elif isinstance(event, events.StepDone):
            watch.lap()
            watch.note(event.loss, event.grad_norm)

    train_run(run, ready, watch=follow, stop=StopFlag())
    measured = watch.stop()
    measured.reference_seconds = sum(references)
    compute = ready.plan.spec.compute
    keys = ("precision", "recompute", "micro_batch_tokens")
    measured.notes |= {key: getattr(compute, key) for key in keys}
    return measured


# -- peers ------------------------------------------------------------------------------------------------------


def trainer_arguments(job: Job) -> dict[str, Any]:
    """What any trainer of transformers is told so that it does the same work; everything else is its default."""
    import torch

    return {
        "use_cpu": not torch.cuda.is_available(),
        "output_dir": str(Path(job.out).with_suffix(".trainer")),
        "per_device_train_batch_size": job.options.get("micro_batch", job.batch),
        "gradient_accumulation_steps": job.batch // job.options.get("micro_batch", job.batch),
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "steps" if job.save_every_steps else "no",
        "save_steps": job.save_every_steps or 500,
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_trainer(trainer: Any, job: Job, watch: Stopwatch) -> Measured:
    """Train and follow."""
    from transformers import TrainerCallback

    class Follow(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            watch.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            watch.lap()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if "loss" in logs:
                watch.note(logs["loss"], logs["grad_norm"])

    trainer._save_checkpoint = watch.time_saves(trainer._save_checkpoint, job)
    trainer.add_callback(Follow())
    if job.adapter:
        copy_start(trainer.model, job)
    trainer.train()
    watch.measured.notes["weights"] = str(next(trainer.model.parameters()).dtype)
    return watch.stop()


def read_precision(options: dict[str, Any]) -> dict[str, Any]:
    """`bf16_weights` for a model held in bf16, without autocast; else the trainer's own defaults."""
    found: dict[str, Any] = {}
    if options.get("bf16_weights"):
        found |= {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": bool(options.get("autocast"))}
    if options.get("recompute") is False:
        found["gradient_checkpointing"] = False
    return found


def train_trl(job: Job) -> Measured:
    """TRL's SFTTrainer or DPOTrainer over the prepared ids."""
    return _train_dpo(job) if job.objective == "dpo" else _train_sft(job)


def _train_sft(job: Job) -> Measured:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    watch = Stopwatch()
    options = job.options
    arguments = trainer_arguments(job) | read_precision(options)
    if options.get("padding_free"):
        arguments |= {"padding_free": True, "max_length": None}
    rows = [{"input_ids": each["ids"][0], "labels": labels_of(each)} for each in read_examples(job)]
    more: dict[str, Any] = {} if job.method == "full" else {"peft_config": lora_config(job)}
    if job.method == "qlora":
        more["quantization_config"] = quantised()
    trainer = SFTTrainer(
        job.model,
        SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        **more,
    )
    return run_trainer(trainer, job, watch)


def _train_dpo(job: Job) -> Measured:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    watch = Stopwatch()
    references: list[float] = []

    class OverIds(DPOTrainer):  # type: ignore[misc]
        """Takes the ids as they are, which DPOTrainer would make from text of its own."""

        def _prepare_dataset(self, dataset: Any, *others: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            return timed(super()._precompute_ref_logps, references)(*arguments)

    arguments = trainer_arguments(job) | read_precision(job.options)
    if job.options.get("precompute"):
        arguments["precompute_ref_log_probs"] = True
    rows = []
    for each in read_examples(job):
        shared = each["trained"][0].index(True)
        chosen, rejected = each["ids"]
        if not all(each["trained"][0][shared:]) or chosen[:shared] != rejected[:shared]:
            raise SystemExit("TRL trains all of an answer, so these pairs cannot be compared")
        rows.append({"prompt_ids": chosen[:shared], "chosen_ids": chosen[shared:], "rejected_ids": rejected[shared:]})
    trainer = OverIds(
        job.model,
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora_config(job),
    )
    measured = run_trainer(trainer, job, watch)
    measured.reference_seconds = sum(references)
    return measured


class Padded:
    """Batches of the prepared rows, padded to their longest or joined into one row without padding."""

    def __init__(self, pad: int, *, is_joined: bool = False) -> None:
        self._pad, self._is_joined = pad, is_joined

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        if self._is_joined:
            for each in labels:
                each[0] = -100
            places = torch.cat([torch.arange(len(each)) for each in ids])
            return {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None], "position_ids": places[None]}
        fill = torch.nn.utils.rnn.pad_sequence
        padded = {"input_ids": fill(ids, True, self._pad), "labels": fill(labels, True, -100)}
        mask = fill([torch.ones_like(each) for each in ids], True, 0)
        return {**padded, "attention_mask": mask}


def load_peft(job: Job) -> tuple[Any, int]:
    """transformers' model with PEFT's adapter over it, as `options` would have it; and the padding token."""
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    options = job.options
    named: dict[str, Any] = {"dtype": torch.bfloat16 if options.get("bf16_weights") else torch.float32}
    if job.method == "qlora":
        named["quantization_config"] = quantised()
    if "attention" in options:
        named["attn_implementation"] = options["attention"]
    if torch.cuda.is_available():
        named["device_map"] = {"": 0}
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, **named)
    pad = model.config.pad_token_id
    if job.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.get("recompute", True))
    if job.method != "full":
        model = get_peft_model(model, lora_config(job), autocast_adapter_dtype=not options.get("bf16_adapter"))
        copy_start(model, job)
    return model, pad


def train_trainer(job: Job) -> Measured:
    """transformers' Trainer over PEFT's model, without TRL."""
    from transformers import Trainer, TrainingArguments

    watch = Stopwatch()
    model, pad = load_peft(job)
    rows = [{"input_ids": each["ids"][0], "labels": labels_of(each)} for each in read_examples(job)]
    options = job.options
    recompute = bool(options.get("recompute", False))
    if recompute:
        model.enable_input_require_grads()
    arguments = trainer_arguments(job) | {"bf16": bool(options.get("autocast")), "gradient_checkpointing": recompute}
    trainer = Trainer(
        model,
        TrainingArguments(**arguments, remove_unused_columns=False),
        data_collator=Padded(pad, is_joined=bool(options.get("joined"))),
        train_dataset=rows,
    )
    return run_trainer(trainer, job, watch)


def train_plain(job: Job) -> Measured:
    """The loop that a person writes over transformers and PEFT: padded batches, AdamW, clipped gradients."""
    import torch

    watch = Stopwatch()
    options = job.options
    model, pad = load_peft(job)
    model.train()
    device = next(model.parameters()).device
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0)
    collate = Padded(pad, is_joined=bool(options.get("joined")))
    rows = [{"input_ids": each["ids"][0], "labels": labels_of(each)} for each in read_examples(job)]
    watch.start()
    size = options.get("micro_batch", job.batch)
    for start in range(0, job.steps * job.batch, job.batch):
        chosen, total = rows[start : start + job.batch], torch.zeros((), device=device)
        count = sum(label != -100 for row in chosen for label in row["labels"][1:])
        for first in range(0, job.batch, size):
            batch = {name: each.to(device) for name, each in collate(chosen[first : first + size]).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=bool(options.get("autocast"))):
                loss = model(**batch, use_cache=False, num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.note(total.item(), norm.item())
        watch.lap()
    return watch.stop()


KINDS: dict[str, Callable[[Job], Measured]] = {
    "make": make_model,
    "prepare": prepare,
    "luthier": train_luthier,
    "trl": train_trl,
    "trainer": train_trainer,
    "plain": train_plain,
}


def main() -> None:
    """Do the job."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    measured = KINDS[job.kind](job)
    Path(job.out).write_text(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
