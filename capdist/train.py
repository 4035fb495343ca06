"""Train a captioner: `accelerate launch capdist/train.py --config RECIPE [section.key=value …] [--resume]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started as a file: this folder must not be where imports are looked up first
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from capdist.console import set_up_output
from capdist.distributed.process import spin_briefly
from capdist.errors import run_program
from capdist.recipe.reading import load_stages, save_recipe
from capdist.recipe.sections import Recipe
from capdist.train_options import parse_arguments

if TYPE_CHECKING:
    from capdist.distributed.launch import Accelerator

spin_briefly()


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        folder: Holds the run.
        steps: Optimizer steps taken, over all its starts.
        split: Split of the final scores: `test`, or the reported half of `validation`, or `validation`.
        metrics: Scores of the best model on `split`, by name.
    """

    folder: Path
    steps: int
    split: str
    metrics: dict[str, Any]


def train(stages: Sequence[Recipe], *, resume: bool = False) -> TrainResult:
    """Run the stages of a recipe one after the other, each from data to final scores.

    Args:
        stages: What to train; see `load_stages`.
        resume: Continue the runs in the stages' folders.

    Returns:
        What the last stage came to.

    Raises:
        CapdistError: the class says what kind of thing went wrong.
    """
    from capdist.distributed import launch
    from capdist.training.run import find_runs, refuse_to_overwrite, refuse_to_skip
    from capdist.training.start import check_networks

    accelerator = launch.build_accelerator(stages[0])
    folders = [stage.run_folder for stage in stages]
    # Now, not when the first stage is over.
    check_networks(stages[1:])
    if not resume:
        refuse_to_overwrite(folders, accelerator)
    # Stages before the last one that began are over: it started from their best model.
    begun = find_runs(folders, accelerator)
    first = folders.index(begun[-1]) if begun else 0
    refuse_to_skip(stages[:first], accelerator)
    for stage in stages[first:]:
        result = train_stage(accelerator, stage, resume=resume)
        launch.end_stage(accelerator)
    accelerator.end_training()
    return result


def train_stage(accelerator: Accelerator, recipe: Recipe, *, resume: bool = False) -> TrainResult:
    """Run one stage.

    Args:
        accelerator: Gives device and precision, and joins the processes.
        recipe: Says what this stage trains.
        resume: Continue the run in the recipe's folder.

    Raises:
        CapdistError: the class says what kind of thing went wrong.
    """
    from capdist.data.images import Preprocessing
    from capdist.data.splits import prepare
    from capdist.distributed.stopping import StopSignals
    from capdist.evaluation.evaluator import Evaluator
    from capdist.evaluation.report import final_report
    from capdist.features.filling import encode_splits
    from capdist.features.source import feature_sources
    from capdist.model_folder import search_options
    from capdist.training.loop import Loop
    from capdist.training.optimization import build_optimizer
    from capdist.training.run import Run
    from capdist.training.start import build_network
    from capdist.training.tracking import Tracking

    with Run.open(recipe, accelerator, resume=resume) as run:
        # Photos and captions, words, network.
        data = prepare(recipe)
        model = build_network(recipe, data.vocabulary, run.checkpoint).to(accelerator.device)
        preprocessing = Preprocessing(recipe.data.image_size, model.encoder.mean, model.encoder.std)
        optimizer = build_optimizer(model, recipe.training)
        run.identify(data, model)
        run.show(data, model)

        # A frozen encoder sees each photo once, not once an epoch.
        stores = {}
        if recipe.caches_features:
            for encoded in encode_splits(accelerator, model, preprocessing, data.splits, recipe):
                encoded.store.hold(accelerator.device)
                stores[encoded.split] = encoded.store
        sources = feature_sources(data.splits, stores, preprocessing, accelerator, recipe.data.num_workers)

        # Steps, validations, checkpoints.
        model, optimizer = accelerator.prepare(model, optimizer)
        options = search_options(recipe.evaluation, data.vocabulary, recipe.text.max_length)
        evaluator = Evaluator(accelerator, data.vocabulary, options, recipe.evaluation.batch_size)
        loop = Loop(run, data, model, optimizer, preprocessing, sources, evaluator)
        loop.warm_up()
        loop.restore()
        tracking = Tracking(accelerator, recipe, run.state.step)
        if accelerator.is_main_process:
            save_recipe(recipe, run.folder / "config.yaml")
        tracking.log(run.describe(), run.state.step)
        try:
            with StopSignals() as signals:
                state = loop.train(tracking, signals)
            # The best model on the split that nothing was chosen on.
            scored, metrics = final_report(recipe, data, evaluator, sources)
            tracking.log({"split": scored, "final": True, **metrics}, state.step, group="final")
        finally:
            tracking.close()
    return TrainResult(run.folder, state.step, scored, metrics)


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Train what the command line asks for.

    Args:
        argv: Arguments; None takes those of the process.

    Raises:
        CapdistError: the class says what kind of thing went wrong.
    """
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    set_up_output(quiet=options.quiet)
    return train(load_stages(options.config, options.overrides), resume=options.resume)


if __name__ == "__main__":
    sys.exit(run_program(main, debug="--debug" in sys.argv))
