"""What may happen to each recipe key: the rules are those that seven tables held before keys declared them."""

from __future__ import annotations

import pytest

from capdist.recipe.rules import Key, keys_of, rules_of
from capdist.recipe.sections import Recipe, section_classes

# A row a key: whether stages may differ, when a resumed run may change it, and whether it shapes layers. Written down
# from the tables, not from the declarations. (The tables had no `decoder.name` among the layers: it had one value.)
RULES = """
run.name                        -      always     -
run.output_dir                  -      always     -
run.seed                        -      never      -
run.threads                     -      always     -
data.source                     -      never      -
data.path                       -      always     -
data.image_size                 stages never      -
data.batch_size                 stages never      -
data.captions_per_image         stages never      -
data.num_workers                stages always     -
data.limit                      -      never      -
data.random_crop                stages never      -
data.horizontal_flip            stages never      -
data.color_jitter               stages never      -
data.image_column               -      never      -
data.captions_column            -      never      -
data.id_column                  -      never      -
data.split_column               -      never      -
text.min_frequency              -      never      -
text.max_length                 -      never      -
encoder.name                    -      never      layers
encoder.weights                 -      always     -
encoder.last_block              -      never      layers
encoder.grid                    -      never      layers
encoder.projection              -      never      layers
encoder.trainable_from          stages never      -
encoder.batch_norm              stages never      -
encoder.cache                   stages always     -
encoder.cache_views             stages never      -
encoder.precision               stages never      -
encoder.batch_size              stages always     -
encoder.compile                 stages always     -
encoder.gradient_checkpointing  stages always     -
decoder.name                    -      never      layers
decoder.embed_size              -      never      layers
decoder.hidden_size             -      never      layers
decoder.attention_size          -      never      layers
decoder.dropout                 stages never      -
decoder.gate                    -      never      layers
decoder.tie_weights             -      never      layers
training.objective              stages never      -
training.start_from             stages always     -
training.epochs                 stages unfinished -
training.max_steps              stages unfinished -
training.learning_rate          stages never      -
training.encoder_learning_rate  stages never      -
training.optimizer              stages never      -
training.weight_decay           stages never      -
training.schedule               stages never      -
training.warmup_steps           stages never      -
training.accumulation           stages never      -
training.clip_norm              stages never      -
training.label_smoothing        stages never      -
training.scheduled_sampling     stages never      -
training.doubly_stochastic      stages never      -
training.word_presence          stages never      -
training.mixed_precision        -      never      -
training.ema_decay              stages never      -
training.patience               stages unfinished -
training.log_every              stages always     -
scst.samples                    stages never      -
scst.baseline                   stages never      -
scst.temperature                stages never      -
scst.cider_weight               stages never      -
scst.bleu_weight                stages never      -
scst.cross_entropy_weight       stages never      -
evaluation.every_epochs         stages always     -
evaluation.beam_size            stages never      -
evaluation.length_penalty       stages never      -
evaluation.no_repeat_ngram      stages never      -
evaluation.consensus            stages never      -
evaluation.min_length           stages never      -
evaluation.batch_size           stages always     -
evaluation.select_by            stages never      -
evaluation.halve_validation     -      never      -
checkpoint.every_steps          stages always     -
checkpoint.keep                 stages always     -
tracking.with                   -      always     -
tracking.project                -      always     -
"""
ROWS = [line.split() for line in RULES.strip().splitlines()]


@pytest.mark.parametrize("section", Recipe.model_fields)
def test_every_key_takes_one_stance(section: str) -> None:
    for one in section_classes(section):
        for name, field in keys_of(one).items():
            stances = [note for note in field.metadata if isinstance(note, Key)]
            assert len(stances) == 1, (
                f"{one.__name__}.{name} declares {len(stances)} stances; see capdist.recipe.rules.Key"
            )


def test_a_stance_leaves_neither_stages_nor_resuming_open() -> None:
    with pytest.raises(TypeError, match="stages"):
        Key(resume="never")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="resume"):
        Key(stages=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(("name", "stages", "resume", "layers"), ROWS, ids=[row[0] for row in ROWS])
def test_the_rules_of_a_key_are_as_they_were(name: str, stages: str, resume: str, layers: str) -> None:
    section, key = name.split(".")
    rule = rules_of(section_classes(section)[0])[key]
    assert rule == Key(stages=stages == "stages", resume=resume, layers=layers == "layers")  # type: ignore[arg-type]
