"""Training: a pure step, drivers that run it on any devices, and a loop that loses nothing."""

from capsjax.errors import CheckpointError, ConfigError, DivergedError, ProcessError
from capsjax.training.checkpoints import Checkpoints
from capsjax.training.classifier import Classifier, load_classifier
from capsjax.training.config import TrainConfig
from capsjax.training.counting import Evaluation
from capsjax.training.drivers import Driver, make_driver
from capsjax.training.evaluation import (
    CheckpointEvaluation,
    EvaluateConfig,
    evaluate,
    predict_test,
)
from capsjax.training.exporting import ExportConfig, export
from capsjax.training.holdout import hold_out
from capsjax.training.joining import ProcessOptions, initialize
from capsjax.training.loading import TrainedNetwork, load_network
from capsjax.training.memory import Memory, estimate_memory
from capsjax.training.objectives import (
    absolute_error,
    binary_cross_entropy_loss,
    cross_entropy_loss,
    official_loss,
    paper_loss,
    spread_objective,
    squared_error_loss,
    weigh_classes,
)
from capsjax.training.optimizers import paper_optimizer
from capsjax.training.predicting import PredictConfig, Predictions, predict
from capsjax.training.programs import make_evaluate, make_run_steps, make_step
from capsjax.training.run import Result, train, train_seeds
from capsjax.training.step import (
    StepMetrics,
    TrainState,
    Variables,
    init_state,
    make_train_step,
    split_network,
)

__all__ = [
    "CheckpointError",
    "CheckpointEvaluation",
    "Checkpoints",
    "Classifier",
    "ConfigError",
    "DivergedError",
    "Driver",
    "EvaluateConfig",
    "Evaluation",
    "ExportConfig",
    "Memory",
    "PredictConfig",
    "Predictions",
    "ProcessError",
    "ProcessOptions",
    "Result",
    "StepMetrics",
    "TrainConfig",
    "TrainState",
    "TrainedNetwork",
    "Variables",
    "absolute_error",
    "binary_cross_entropy_loss",
    "cross_entropy_loss",
    "estimate_memory",
    "evaluate",
    "export",
    "hold_out",
    "init_state",
    "initialize",
    "load_classifier",
    "load_network",
    "make_driver",
    "make_evaluate",
    "make_run_steps",
    "make_step",
    "make_train_step",
    "official_loss",
    "paper_loss",
    "paper_optimizer",
    "predict",
    "predict_test",
    "split_network",
    "spread_objective",
    "squared_error_loss",
    "train",
    "train_seeds",
    "weigh_classes",
]
