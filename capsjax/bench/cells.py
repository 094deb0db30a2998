"""Cells of a benchmark and the suites that name them."""

import dataclasses
import itertools
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from capsjax.bench.targets import parse_target
from capsjax.bench.workloads import make_workload

Suite = Literal["quick", "routing", "hotos", "train", "pod"]
_Entry = tuple[str, Mapping[str, Any]]
_LOOPS = ("fori_loop", "scan", "unrolled")
_DIRECTIONS = ("forward", "gradient")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One workload for one target under some XLA flags.

    Attributes:
      workload: its name.
      parameters: those that are given; the others are the workload's defaults.
      target: name of the target.
      xla_flags: in addition to those of the process.
    """

    workload: str
    parameters: tuple[tuple[str, Any], ...]
    target: str
    xla_flags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What tells cells apart, for people too."""
        given = "".join(f" {name}={shlex.quote(str(value))}" for name, value in self.parameters)
        flags = "".join(f" {flag}" for flag in self.xla_flags)
        return f"{self.workload}{given} @ {self.target}{flags}"

    @property
    def file_name(self) -> str:
        """The key as a name of files."""
        return "".join(c if c.isalnum() or c in "=.-:" else "_" for c in self.key).strip("_")


def suite_cells(suite: Suite, targets: Sequence[str], flags: Sequence[str] = ()) -> list[Cell]:
    """Returns the cells of a suite.

    Args:
      suite: ``quick``, ``routing``, ``hotos``, ``train`` or ``pod``.
      targets: names; empty for the suite's own, the CPU, or for ``pod`` ``v5e-256``.
      flags: sets of XLA flags to sweep, each a text; empty for none.

    Raises:
      TargetError: a target is unknown.

    Example:
      >>> from capsjax.bench import suite_cells
      >>> suite_cells("pod", [])[0].key
      'pmap_train_step preset=paper @ v5e-256'
    """
    targets = targets or (["v5e-256"] if suite == "pod" else ["cpu"])
    return make_cells(_SUITES[suite](), targets, flags)


def make_cells(
    entries: Iterable[_Entry], targets: Sequence[str], flags: Sequence[str]
) -> list[Cell]:
    """Every workload for every target under every set of flags.

    What is mapped over devices gets eight made-up ones where the target is one CPU.

    Raises:
      TargetError, WorkloadError: a target, a workload or a parameter is unknown.
    """
    cells = []
    for name, each, flag in itertools.product(targets, list(entries), flags or ("",)):
        parse_target(name)
        workload, parameters = each
        make_workload(workload, parameters)
        target = "cpu:8" if workload == "pmap_train_step" and name == "cpu" else name
        if workload == "hotos_gcc" and (target != "cpu" or flag):
            continue  # gcc knows neither other targets nor flags of XLA
        cells.append(Cell(workload, tuple(parameters.items()), target, tuple(shlex.split(flag))))
    return cells


def sweep(workload: str, settings: Mapping[str, Sequence[Any]]) -> list[_Entry]:
    """A workload with every combination of values.

    Example:
      >>> from capsjax.bench.cells import sweep
      >>> sweep("squash", {"batch": [1, 2]})
      [('squash', {'batch': 1}), ('squash', {'batch': 2})]
    """
    names = list(settings)
    values = itertools.product(*settings.values())
    return [(workload, dict(zip(names, each, strict=True))) for each in values]


def _quick() -> list[_Entry]:
    return [
        ("squash", {}),
        ("routing", {"iterations": 1}),
        *sweep("routing", {"loop": ["fori_loop", "scan", "unrolled"]}),
        ("routing", {"direction": "gradient"}),
        *sweep("routing", {"implementation": ["blocked"], "direction": _DIRECTIONS}),
        ("routing", {"algorithm": "em"}),
        *sweep("hotos", {"formulation": ["einsum", "patches", "conv"]}),
        ("hotos_gcc", {}),
        ("forward", {}),
        ("train_step", {}),
        ("pmap_train_step", {"batch": 16}),
    ]


def _routing() -> list[_Entry]:
    forms = {"iterations": [1, 3, 5, 10], "loop": _LOOPS, "direction": _DIRECTIONS}
    others = {
        "algorithm": ["em", "attention", "variational", "kmeans"],
        "loop": ["fori_loop", "unrolled"],
        "direction": _DIRECTIONS,
    }
    return [
        *sweep("squash", {"direction": _DIRECTIONS}),
        *sweep("routing", forms),
        *sweep(
            "routing",
            {"implementation": ["blocked"], "iterations": [1, 3, 5, 10], "direction": _DIRECTIONS},
        ),
        *sweep(
            "routing",
            {
                "batch": [32, 512],
                "implementation": ["reference", "blocked"],
                "direction": ["gradient"],
            },
        ),
        *sweep("routing", others),
        *sweep(
            "routing",
            {
                "algorithm": ["self", "heinsen", "efficient", "uniform", "random"],
                "direction": _DIRECTIONS,
            },
        ),
        *sweep("stack", {"layers": [1, 2, 4, 8], "loop": ["fori_loop", "unrolled"]}),
    ]


def _hotos() -> list[_Entry]:
    formulations = ["einsum", "patches", "conv", "shifts"]
    return [
        *sweep("hotos", {"formulation": formulations, "direction": _DIRECTIONS}),
        *sweep("hotos_gcc", {"threads": [1, 2], "flags": ["", "-march=native -ffast-math"]}),
    ]


def _train() -> list[_Entry]:
    implementations = {"implementation": ["reference", "blocked"]}
    return [
        *sweep("forward", {"preset": ["small", "paper", "efficient_capsnet"]}),
        *sweep("train_step", {"preset": ["small"], **implementations}),
        *sweep("train_step", {"preset": ["paper"], "batch": [64], **implementations}),
        ("train_step", {"preset": "efficient_capsnet"}),
        ("pmap_train_step", {"batch": 16}),
    ]


def _pod() -> list[_Entry]:
    return [("pmap_train_step", {"preset": "paper"})]


_SUITES = {
    "quick": _quick,
    "routing": _routing,
    "hotos": _hotos,
    "train": _train,
    "pod": _pod,
}
SUITES: tuple[Suite, ...] = get_args(Suite)
