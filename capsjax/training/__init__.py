"""Training: one pure step, drivers that run it anywhere, a loop that loses nothing."""

from capsjax.data import Batch
from capsjax.errors import CheckpointError, ConfigError, DivergedError
from capsjax.training.checkpoints import Checkpoints
from capsjax.training.config import EvaluateConfig, TrainConfig
from capsjax.training.drivers import Driver, make_driver
from capsjax.training.evaluation import Evaluated, Loaded, evaluate, load_network
from capsjax.training.loop import Result, train
from capsjax.training.objectives import (
    binary_cross_entropy_loss,
    cross_entropy_loss,
    official_loss,
    paper_loss,
    spread_objective,
)
from capsjax.training.programs import make_evaluate, make_run_steps
from capsjax.training.recipes import TABLES, Recipe
from capsjax.training.session import Evaluation, Session, hold_out
from capsjax.training.step import (
    StepMetrics,
    TrainState,
    Variables,
    init_state,
    make_train_step,
    paper_optimizer,
    split_network,
)
from capsjax.training.tables import ReproduceConfig, RowResult, reproduce
from capsjax.training.trials import Trial, Trials

__all__ = [
    "TABLES",
    "Batch",
    "CheckpointError",
    "Checkpoints",
    "ConfigError",
    "DivergedError",
    "Driver",
    "EvaluateConfig",
    "Evaluated",
    "Evaluation",
    "Loaded",
    "Recipe",
    "ReproduceConfig",
    "Result",
    "RowResult",
    "Session",
    "StepMetrics",
    "TrainConfig",
    "TrainState",
    "Trial",
    "Trials",
    "Variables",
    "binary_cross_entropy_loss",
    "cross_entropy_loss",
    "evaluate",
    "hold_out",
    "init_state",
    "load_network",
    "make_driver",
    "make_evaluate",
    "make_run_steps",
    "make_train_step",
    "official_loss",
    "paper_loss",
    "paper_optimizer",
    "reproduce",
    "split_network",
    "spread_objective",
    "train",
]
