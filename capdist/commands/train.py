"""`capdist train`: a parent process that starts `accelerate launch` and returns the real exit code.

Launchers turn every exit code but 0 into 1 and print their own traceback. The training processes therefore write their
code and their messages into a folder. The parent prints these once, at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from capdist.console import name_signal, set_up_output
from capdist.errors import EXIT_FOLDER_VARIABLE, CapdistError, ProcessError, Stopped, UsageError

PLACE_FILE = "accelerate_config.yaml"
# The options of `accelerate launch`, by name, because its parser imports torch, which takes seconds. Not `--module` and
# `--no_python`, under which it would start something else, and not `--debug` and `--quiet`, which are train.py's.
_PLACE_OPTIONS = (
    "config_file", "mixed_precision", "num_processes", "num_machines", "num_cpu_threads_per_process", "gpu_ids",
    "machine_rank", "main_process_ip", "main_process_port", "t", "tee", "log_dir", "role", "rdzv_backend", "rdzv_conf",
    "max_restarts", "monitor_interval", "vm", "env", "main_training_function", "zero_stage",
    "offload_optimizer_device", "offload_param_device", "offload_optimizer_nvme_path", "offload_param_nvme_path",
    "gradient_accumulation_steps", "gradient_clipping", "zero3_init_flag", "zero3_save_16bit_model",
    "aws_access_key_id", "aws_secret_access_key", "mpirun_hostfile",
)  # fmt: skip
_PLACE_OPTION_FAMILIES = ("dynamo_", "deepspeed_", "fsdp_", "megatron_lm_", "fp8_", "parallelism_config_")
_PLACE_FLAGS = (
    "cpu", "multi_gpu", "tpu", "enable_cpu_affinity", "dynamo_use_fullgraph", "dynamo_use_dynamic",
    "dynamo_use_regional_compilation", "use_deepspeed", "use_fsdp", "use_parallelism_config", "use_megatron_lm",
    "same_network", "tpu_cluster", "no_tpu_cluster", "tpu_use_sudo", "downcast_bf16", "fp8_use_autocast_during_eval",
)  # fmt: skip
_OTHER_WAYS = ("--tpu", "--use_deepspeed", "--use_fsdp", "--use_megatron_lm")
_REFUSAL_FILE = "refusal"
# Errors of accelerate's simple launcher and torch's elastic one when a process fails; by name, to avoid importing
# torch.
_PROCESS_FAILURES = ("CalledProcessError", "ChildFailedError", "SignalException")


def launch_training(arguments: Sequence[str]) -> int:
    """Train under `accelerate launch`.

    Args:
        arguments: Arguments for `capdist/train.py`, and any that tell `accelerate launch` where to train.

    Returns:
        0, or 1 for a bug whose traceback the training process has printed.

    Raises:
        UsageError: for mistakes in the recipe, before any process starts, and for options that `accelerate launch`
            refuses.
        CapdistError: with the messages of the training processes and their exit code.
    """
    from capdist.recipe.reading import load_recipe
    from capdist.train_options import parse_arguments

    place, what = split_arguments(arguments)
    options = parse_arguments(what)
    set_up_output(quiet=options.quiet)
    load_recipe(options.config, options.overrides)
    script = Path(__file__).resolve().parents[1] / "train.py"
    place, environment = _default_place(place)
    command = [sys.executable, "-m", "capdist.commands.train", *place, str(script), *what]
    with tempfile.TemporaryDirectory(prefix="capdist_") as folder:
        environment[EXIT_FOLDER_VARIABLE] = folder
        # Handle signals before the process starts: it has its own session, so a terminal signals only this parent.
        signals = _Signals()
        process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
        signals.pass_on_to(process.pid)
        code = process.wait()
        return _outcome(code, Path(folder), signals.received)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those that say where to train, spelt with underscores, and the others.

    Raises:
        UsageError: if the last of them needs a value.
    """
    place: list[str] = []
    what: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        spelt, equals, value = argument.partition("=")
        name = spelt.lstrip("-").replace("-", "_")
        is_flag = name in _PLACE_FLAGS
        if not spelt.startswith("-") or not (is_flag or name in _PLACE_OPTIONS or _is_of_family(name)):
            what.append(argument)
            continue
        place.append(("--" if spelt.startswith("--") else "-") + name + equals + value)
        if not is_flag and not equals:
            if not waiting:
                raise UsageError(f"{argument} needs a value")
            place.append(waiting.pop(0))
    return place, what


def _is_of_family(name: str) -> bool:
    return name.startswith(_PLACE_OPTION_FAMILIES)


def _default_place(place: list[str]) -> tuple[list[str], dict[str, str]]:
    """Add the shipped file if no other is named, and `--multi_gpu`, without which only one process starts.

    Returns:
        Arguments of `accelerate launch`, and additional environment variables for it.
    """
    named = any(argument.startswith("--config_file") for argument in place)
    several = _asks_for_several(place) and not {"--multi_gpu", *_OTHER_WAYS} & {*place}
    # `--cpu` starts a single process, even with `--num_processes`, and is refused with `--multi_gpu`.
    on_processors = several and "--cpu" in place
    if on_processors:
        place = [argument for argument in place if argument != "--cpu"]
    if on_processors or (several and not named):
        place = [*place, "--multi_gpu"]
    if not named:
        here = Path(__file__).resolve().parents[1]
        shipped = next(p for p in (here.parent / PLACE_FILE, here / PLACE_FILE) if p.exists())
        place = ["--config_file", str(shipped), *place]
    return place, {"ACCELERATE_USE_CPU": "true"} if on_processors else {}


def _asks_for_several(place: list[str]) -> bool:
    words = " ".join(place).replace("=", " ").split()
    return "--num_processes" in words and words[words.index("--num_processes") + 1 :][:1] != ["1"]


class _Signals:
    """Pass signals on to training processes; the launcher is left out, since it would not let them save a checkpoint.

    Signals that the parent ignores from its start, for example under `nohup`, are still ignored.

    Attributes:
        received: The signals that came, in their order.
    """

    def __init__(self) -> None:
        import psutil

        self.received: list[int] = []
        self._waiting: list[int] = []
        self._launcher: int | None = None
        self._psutil = psutil
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def pass_on_to(self, launcher: int) -> None:
        """Pass signals on to the children of a process, including signals that came before it started."""
        self._launcher = launcher
        self._pass_on()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        self._waiting.append(number)
        if self._launcher is not None:
            self._pass_on()

    def _pass_on(self) -> None:
        # Send each only once, even if another comes meanwhile, because a second signal ends training at once.
        with contextlib.suppress(IndexError):
            while True:
                self._send(self._waiting.pop(0))

    def _send(self, number: int) -> None:
        with contextlib.suppress(self._psutil.NoSuchProcess):
            launcher = self._psutil.Process(self._launcher)
            for process in launcher.children() or [launcher]:
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


def _outcome(launcher_code: int, folder: Path, received: list[int]) -> int:
    ends = [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*"))]
    # When one process fails, the others may fail because it is gone. Take the reason from the one that knows it.
    told = next((end for end in ends if end["code"] != 1), None)
    if told is not None:
        error = CapdistError(*told["mistakes"])
        error.exit_code = told["code"]
        raise error
    if not all(end["lost_peers"] for end in ends):
        return 1
    if launcher_code and received:
        again = "--resume goes on from the last checkpoint, if there is one"
        raise Stopped(received[0], f"stopped by {name_signal(received[0])}; {again}")
    if (folder / _REFUSAL_FILE).exists():
        reason = json.loads((folder / _REFUSAL_FILE).read_text())
        raise UsageError(f"accelerate launch refuses its options: {reason}")
    if launcher_code == UsageError.exit_code:  # argparse has printed the reason
        return launcher_code
    if launcher_code and len(ends) < (ends[0]["processes"] if ends else 1):
        raise ProcessError(
            f"a training process died without a word (launcher code {launcher_code}); most often memory ran out: "
            "lower data.batch_size or data.num_workers"
        )
    return int(launcher_code != 0)


def _launch_quietly() -> int:
    """Act as `accelerate launch` without its traceback: the training processes report what happened.

    Returns:
        0; 1 if a training process failed; or 2 for options that are refused, whose reason is in a file for the parent.
    """
    import logging

    from accelerate.commands.launch import launch_command, launch_command_parser

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    parser = launch_command_parser()
    parser.exit_on_error = False
    try:
        launch_command(parser.parse_args())
    except SystemExit as end:
        return UsageError.exit_code if end.code == UsageError.exit_code else 1
    except Exception as error:
        if type(error).__name__ in _PROCESS_FAILURES:
            return 1
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        Path(os.environ[EXIT_FOLDER_VARIABLE], _REFUSAL_FILE).write_text(json.dumps(reason))
        return UsageError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_launch_quietly())
