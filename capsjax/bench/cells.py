"""The cells of a benchmark, and suites of them."""

import dataclasses
import hashlib
import itertools
import shlex
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capsjax import routing
from capsjax.bench.config import Suite
from capsjax.bench.scaling import batches
from capsjax.bench.targets import Target, parse_target
from capsjax.bench.workloads import make_workload

Entry = tuple[str, Mapping[str, Any]]
_LOOPS = ("fori_loop", "scan", "unrolled")
_DIRECTIONS = ("forward", "gradient")
_PLAIN = frozenset(string.ascii_letters + string.digits + "=.-:")
# File names have at most 255 bytes, with their endings.
_LONGEST_NAME = 180
_PODS = ("v5e-256", "v6e-256", "v5p-128")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One workload for one target under a set of XLA flags.

    Attributes:
      workload: name of the workload.
      parameters: given parameters; the others have the workload's defaults.
      target: name of the target.
      xla_flags: flags in addition to those of the process.
    """

    workload: str
    parameters: tuple[tuple[str, Any], ...]
    target: str
    xla_flags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A readable name, unique among cells."""
        given = "".join(f" {name}={shlex.quote(str(value))}" for name, value in self.parameters)
        flags = "".join(f" {flag}" for flag in self.xla_flags)
        return f"{self.workload}{given} @ {self.target}{flags}"

    @property
    def file_name(self) -> str:
        """The key as a file name; if it is long, its beginning and a hash."""
        name = "".join(c if c in _PLAIN else "_" for c in self.key).strip("_")
        if len(name) <= _LONGEST_NAME:
            return name
        return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(self.key.encode()).hexdigest()[:8]}"


def suite_cells(suite: Suite, targets: Sequence[str], flags: Sequence[str] = ()) -> list[Cell]:
    """Returns the cells of a suite.

    Args:
      suite: ``quick``, ``routing``, ``hotos``, ``train`` or ``pod``.
      targets: names of targets; if empty, the CPU, or for ``pod`` v5e-256, v6e-256 and v5p-128.
      flags: sets of XLA flags to sweep, one string each; the empty string is no flags.

    Raises:
      ConfigError: a target is unknown.

    Example:
      >>> from capsjax.bench import suite_cells
      >>> suite_cells("pod", [])[0].key
      'pmap_train_step preset=paper dtype=bfloat16 batch=128 @ v5e-256'
    """
    cells: list[Cell] = []
    for name in dict.fromkeys(targets) or (_PODS if suite == "pod" else ("cpu",)):
        cells += make_cells(_SUITES[suite](parse_target(name)), [name], flags)
    return cells


def make_cells(
    entries: Iterable[Entry], targets: Sequence[str], flags: Sequence[str] = ()
) -> list[Cell]:
    """Returns cells for every workload, target and set of flags, each once.

    Workloads that are mapped over devices get eight virtual ones if the target is one CPU.

    Raises:
      ConfigError: a target, a workload or a parameter is unknown.
    """
    cells = []
    for name, each, flag in itertools.product(targets, list(entries), flags or ("",)):
        parse_target(name)
        workload, parameters = each
        make_workload(workload, parameters)
        target = "cpu:8" if workload == "pmap_train_step" and name == "cpu" else name
        if workload == "hotos_gcc" and (target != "cpu" or flag):
            continue  # gcc has neither other targets nor XLA flags
        cells.append(Cell(workload, tuple(parameters.items()), target, tuple(shlex.split(flag))))
    return list({cell.key: cell for cell in cells}.values())


def groups(cells: Iterable[Cell], alternate: str | None) -> list[list[Cell]]:
    """Groups cells that differ only in one parameter; without a parameter, each is a group.

    Example:
      >>> from capsjax.bench.cells import groups, make_cells, sweep
      >>> cells = make_cells(sweep("squash", {"batch": [1, 2], "features": [4, 8]}), ["cpu"])
      >>> [len(group) for group in groups(cells, "features")]
      [2, 2]
    """
    if alternate is None:
        return [[cell] for cell in cells]
    found: dict[Cell, list[Cell]] = {}
    for cell in cells:
        others = tuple(each for each in cell.parameters if each[0] != alternate)
        found.setdefault(dataclasses.replace(cell, parameters=others), []).append(cell)
    return list(found.values())


def sweep(workload: str, settings: Mapping[str, Sequence[Any]]) -> list[Entry]:
    """Returns a workload with every combination of values.

    Example:
      >>> from capsjax.bench.cells import sweep
      >>> sweep("squash", {"batch": [1, 2]})
      [('squash', {'batch': 1}), ('squash', {'batch': 2})]
    """
    values = itertools.product(*settings.values())
    return [(workload, dict(zip(settings, each, strict=True))) for each in values]


def _blocks(target: Target) -> str:
    """Returns the layout of blocks that suits the platform."""
    return "blocked" if target.platform == "cpu" else "lanes"


def _quick(target: Target) -> list[Entry]:
    return [
        ("squash", {}),
        ("routing", {"iterations": 1}),
        *sweep("routing", {"loop": _LOOPS}),
        ("routing", {"direction": "gradient"}),
        *sweep("routing", {"implementation": [_blocks(target)], "direction": _DIRECTIONS}),
        ("routing", {"algorithm": "em"}),
        *sweep("hotos", {"formulation": ["einsum", "patches", "conv"]}),
        ("hotos_gcc", {}),
        ("forward", {}),
        ("train_step", {}),
        ("pmap_train_step", {"batch": 16}),
    ]


def _routing(target: Target) -> list[Entry]:
    blocks, iterations, both = _blocks(target), [1, 3, 5, 10], {"direction": _DIRECTIONS}
    records = [routing.algorithm(name) for name in routing.algorithms() if name != "dynamic"]
    looped = [record.name for record in records if record.passes]
    others = [record.name for record in records if not record.passes]
    return [
        *sweep("squash", both),
        *sweep("routing", {"iterations": iterations, "loop": _LOOPS, **both}),
        *sweep("routing", {"implementation": [blocks], "iterations": iterations, **both}),
        *sweep(
            "routing",
            {
                "batch": [32, 512],
                "implementation": ["reference", blocks],
                "direction": ["gradient"],
            },
        ),
        *sweep("routing", {"algorithm": looped, "loop": ["fori_loop", "unrolled"], **both}),
        *sweep("routing", {"algorithm": others, **both}),
        *sweep("stack", {"layers": [1, 2, 4, 8], "loop": ["fori_loop", "unrolled"]}),
    ]


def _hotos(target: Target) -> list[Entry]:
    del target
    formulations = ["einsum", "patches", "conv", "shifts"]
    return [
        *sweep("hotos", {"formulation": formulations, "direction": _DIRECTIONS}),
        *sweep("hotos_gcc", {"threads": [1, 2], "flags": ["", "-march=native -ffast-math"]}),
    ]


def _train(target: Target) -> list[Entry]:
    implementations = {"implementation": ["reference", _blocks(target)]}
    return [
        *sweep("forward", {"preset": ["small", "paper", "efficient_capsnet"]}),
        *sweep("train_step", {"preset": ["small"], **implementations}),
        *sweep("train_step", {"preset": ["paper"], "batch": [64], **implementations}),
        ("train_step", {"preset": "efficient_capsnet"}),
        ("pmap_train_step", {"batch": 16}),
    ]


def _pod(target: Target) -> list[Entry]:
    """One program for each batch per chip; slices smaller than the pod run the same programs."""
    parameters = {"preset": "paper", "dtype": "bfloat16"}
    return [("pmap_train_step", {**parameters, "batch": batch}) for batch in batches(target)]


_SUITES = {"quick": _quick, "routing": _routing, "hotos": _hotos, "train": _train, "pod": _pod}
