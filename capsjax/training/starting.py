"""New runs and resumed ones: what they compute, and the stored configuration of each."""

from collections.abc import Sequence
from typing import Any

from capsjax import models
from capsjax.data import Dataset
from capsjax.errors import ConfigError
from capsjax.training import choices
from capsjax.training.config import OF_LEARNING_RATE, TrainConfig
from capsjax.training.custom import Custom
from capsjax.training.data_description import DataDescription
from capsjax.training.inputs import load_dataset
from capsjax.training.loading import load_own
from capsjax.training.loop import is_over, read_history
from capsjax.training.reporting import say
from capsjax.training.run_directory import RunConfig, RunDirectory
from capsjax.training.setup import Setup, set_up


def start(
    configs: Sequence[TrainConfig],
    model: models.ModelConfig | None,
    dataset: Dataset | None,
    custom: Custom,
) -> tuple[Setup, list[RunConfig]]:
    """Returns what new runs compute, and the stored configuration of each."""
    config = configs[0]
    config.check_effect()
    given = dataset is not None
    if dataset is None:
        choices.check_data_dir(config.dataset, config.data_dir)
        dataset = load_dataset(
            config.dataset,
            config.input,
            data_dir=config.data_dir,
            image_size=config.image_size,
            channels=config.channels,
        )
    if model is None:
        model = choices.choose_model(config, dataset)
    else:
        choices.check_model(config, model)
    data = DataDescription.of(dataset)
    setup = set_up(configs, model, dataset, custom)
    return setup, [
        RunConfig(each, model, data, given=given, custom=custom.shaping) for each in configs
    ]


def resume(
    configs: Sequence[TrainConfig],
    directories: Sequence[RunDirectory],
    model: models.ModelConfig | None,
    dataset: Dataset | None,
    custom: Custom,
) -> tuple[Setup, list[RunConfig]]:
    """Returns what resumed runs compute, and the stored configuration of each."""
    resumed = [directory.read_config() for directory in directories]
    for each, before in zip(configs, resumed, strict=True):
        check_same_run(each, model, before)
        model = before.model
        if custom.shaping != before.custom:
            both = (before.custom, custom.shaping)
            then, now = (" and ".join(names) or "neither" for names in both)
            raise ConfigError(
                f"to resume the run in {each.run_dir}, give the same objective and optimizer in"
                f" Python as at its start: {then}, got {now}"
            )
    stratified = {before.stratified for before in resumed}
    if len(stratified) > 1:
        raise ConfigError("these runs hold out different images; resume each one alone")
    if dataset is None:
        config, before = configs[0], resumed[0]
        other = config.data_dir if config.data_dir != before.train.data_dir else None
        dataset = load_own(before, other, input=config.input)
    data = DataDescription.of(dataset)
    for before in resumed:
        before.data.check(data)
    data = resumed[0].data.completed(data)
    assert model is not None  # there is at least one run
    configs[0].check_learning_rate()
    steps = [directory.last_checkpoint() for directory in directories]
    if not any(steps):
        say(f"the run in {directories[0].path} has no checkpoint and starts again at step 0")
    setup = set_up(
        configs,
        model,
        dataset,
        custom,
        stratified=all(stratified),
        initialise=not any(steps),
    )
    return setup, [
        before._replace(
            train=each,
            model=model,
            data=data,
            changes=(*before.changes, *_changes(before, each, step)),
        )
        for each, before, step in zip(configs, resumed, steps, strict=True)
    ]


def check_same_run(
    config: TrainConfig,
    model: models.ModelConfig | None,
    before: RunConfig,
    *,
    may_change_rate: bool = True,
) -> None:
    """Raises a ConfigError unless the options, and the network if given, are those of the run."""
    config.check_resumes(before.train, may_change_rate=may_change_rate)
    if model is not None and model != before.model:
        raise ConfigError(f"the run in {config.run_dir} trains another network: {before.model}")


def check_unfinished(setup: Setup, directories: Sequence[RunDirectory]) -> None:
    """Raises a ConfigError if all of these runs are finished."""
    results = [each.read_result() for each in directories]
    _, history = read_history(setup, [each.read_metrics() for each in directories])
    ends = [r.step for r in results if r and is_over(setup, r.step, history)]
    if len(ends) == len(directories):
        raise ConfigError(
            f"the run in {directories[0].path} is finished at step {ends[0]:,}; raise --epochs,"
            " --steps or --patience to continue"
        )


def _changes(before: RunConfig, config: TrainConfig, step: int) -> list[dict[str, Any]]:
    """Returns the record of a changed learning rate for a run that is resumed at this step."""
    # A cosine schedule depends on the last step.
    names = (*OF_LEARNING_RATE, *(("steps", "epochs") if config.schedule == "cosine" else ()))
    options = {name: getattr(config, name) for name in names}
    changed = {n: v for n, v in options.items() if v != getattr(before.train, n)}
    return [{"step": step, **changed}] if changed else []
