"""Train, with one thing going wrong: FAULT names it.

term:7       SIGTERM to rank 0 during step 7
vanish:9     all processes end during step 9 without a word, as if the power went
forget:X     restore everything but X from the checkpoint: model, optimizer, average or step
"""

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from capdist import train  # noqa: E402
from capdist.errors import run_program  # noqa: E402
from capdist.training import loop, run  # noqa: E402
from capdist.training.step import TrainStep  # noqa: E402

kind, _, value = os.environ.get("FAULT", "none:0").partition(":")
take_step = TrainStep.__call__
load = loop.load_checkpoint
read = run.read_state


def faulty_step(self, step, window, stop_requested=False, progress=0.0):
    if kind == "vanish" and step + 1 == int(value):
        os._exit(1)
    if kind == "term" and step + 1 == int(value) and self.accelerator.is_main_process:
        os.kill(os.getpid(), signal.SIGTERM)
        stop_requested = True
    return take_step(self, step, window, stop_requested, progress)


def forgetful_load(checkpoint, model, optimizer, average):
    model_before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer_before = optimizer.state_dict()
    average_before = {} if average is None else {name: tensor.clone() for name, tensor in average.tensors.items()}
    load(checkpoint, model, optimizer, average)
    if value == "model":
        model.load_state_dict(model_before)
    if value == "optimizer":
        optimizer.load_state_dict(optimizer_before)
    if value == "average":
        average.tensors.update(average_before)


def forgetful_read(checkpoint):
    state, identity = read(checkpoint)
    if value == "step":
        state.step -= 1
    return state, identity


TrainStep.__call__ = faulty_step
if kind == "forget":
    loop.load_checkpoint = forgetful_load
    run.read_state = forgetful_read

if __name__ == "__main__":
    sys.exit(run_program(train.main))
