"""Starts the processes with their devices and precision, and runs what they must do together."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator as Accelerator  # for modules that must not import accelerate
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)

from capdist.distributed.process import keep_freed_memory
from capdist.errors import UsageError
from capdist.files import try_lock
from capdist.recipe.sections import Recipe

T = TypeVar("T")

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Where Linux gives a container's share of processor time: allowed microseconds, and the period they count for."""


def build_accelerator(recipe: Recipe | None = None) -> Accelerator:
    """Join the processes of this launch.

    Args:
        recipe: Gives threads, precision, trackers and folders; None for a program that only captions.

    Raises:
        UsageError: if the launcher started processes that do not see each other, or a precision this device lacks.
    """
    precision = threads = None
    if recipe is not None:
        threads = recipe.run.threads
        precision = recipe.training.mixed_precision
    folder = None if recipe is None else recipe.run_folder
    try:
        accelerator = Accelerator(
            mixed_precision=None if precision == "inherit" else precision,
            log_with=list(recipe.tracking.with_) or None if recipe is not None else None,
            project_config=ProjectConfiguration(project_dir=folder, logging_dir=folder),
            # A plugin, because the environment overrides the plain argument. `TrainStep` accumulates gradients itself.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                # The other processes wait while the main one scores, and METEOR may take long.
                InitProcessGroupKwargs(timeout=timedelta(hours=1)),
            ],
        )
    except ValueError as error:
        if "mixed precision" not in str(error):
            raise
        raise UsageError(f"training.mixed_precision: {error}; use bf16 or no") from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError(  # accelerate would compute in float32 without a warning
            "training.mixed_precision: fp16 needs a GPU; use bf16 or no, here or in what accelerate launch is given"
        )
    check_world(accelerator)
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        atexit.register(_leave_group)
    # Messages to the user are printed once.
    _let_one_speak(accelerator)
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, available_processors() // local_processes))
    # Attention weights and Adam's second moments decay into denormals, on which processors are ten times slower.
    torch.set_flush_denormal(True)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def _let_one_speak(accelerator: Accelerator) -> None:
    """Silence all processes but the main one, which a program may have made quiet before."""
    logger = logging.getLogger("capdist")
    if not accelerator.is_main_process:
        logger.setLevel(logging.ERROR)
    elif logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def _leave_group() -> None:
    """End the group of processes if it still exists: gloo threads that outlive the interpreter abort its process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_stage(accelerator: Accelerator) -> None:
    """Release a stage's model and optimizer, and reset the loss scale to that of a new run."""
    accelerator.free_memory()
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(type(accelerator.scaler)(accelerator.device.type).state_dict())


def check_world(accelerator: Accelerator) -> None:
    """Refuse processes that each take themselves for the only one: all would write their models into one folder.

    Raises:
        UsageError: if the launcher started another number of processes than have joined.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UsageError(
            f"launch: {started} processes were started, but {accelerator.num_processes} joined on "
            f"{accelerator.device}; on a machine without a GPU set ACCELERATE_USE_CPU=true"
        )


@contextmanager
def exclusive(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Lock a run folder, so that two runs never write into the same one. The lock ends with the process.

    Raises:
        UsageError: if another process holds it.
    """
    with ExitStack() as stack:
        on_main(accelerator, lambda: _lock(folder, stack))
        yield


def _lock(folder: Path, stack: ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lock = try_lock(folder / ".lock")
    if lock is None:
        raise UsageError(f"{folder}: another run is writing there; wait, or choose another run.name")
    stack.enter_context(lock)


def available_processors() -> int:
    """Return the processors this process may use, which in a container are fewer than the machine has."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, CPU_QUOTA.read_text().split())
    except (OSError, ValueError):  # no such control group, or `max`
        return allowed
    return max(1, min(allowed, quota // period))


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Run a function in the main process only; every process gets its value or its error.

    All processes must call it together. An error in only one process would leave the others waiting.

    Args:
        accelerator: Tells which process is the main one.
        function: Its value must be picklable if there are several processes.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    value: T = outcome[0]
    return value


def raise_together(error: Exception | None) -> None:
    """Raise, in every process, the error of the first process that has one. All must call it together.

    Args:
        error: What this process raised; it must be picklable if there are several processes.
    """
    for found in gather_object([error]):
        if found is not None:
            raise found
