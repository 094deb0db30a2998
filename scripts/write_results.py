r"""Fills RESULTS.md from docs/results and draws its learning curves: ``write_results.py``.

To record results of ``capsjax reproduce``, copy results.jsonl from its output directory to a folder
of docs/results for the machine, and each run's metrics.jsonl as ROW-seed-N.metrics.jsonl. Where the
folder has that of another length, name it ROW-seed-N.STEPS.metrics.jsonl.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from capsjax.files import write_text
from capsjax.reproduce import TABLES
from capsjax.reproduce.results import Line, measured, read_results
from capsjax.training.files import read_json_lines
from capsjax.training.run_directory import Record

ROOT = Path(__file__).parents[1]
PAGE, RECORDS, IMAGES = ROOT / "RESULTS.md", ROOT / "docs" / "results", ROOT / "docs" / "images"

# CapsNet-Keras after 30 epochs: means of three trials in percent.
ELSEWHERE = {
    ("mnist", "paper-1"): "0.39",
    ("mnist", "paper-1-reconstruction"): "0.37",
    ("mnist", "paper-3"): "0.40",
    ("mnist", "paper-3-reconstruction"): "0.34",
}
NAMES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "multi_mnist": "MultiMNIST",
    "expanded_mnist": "expanded MNIST",
    "affine_mnist": "affine MNIST",
    "cifar10": "CIFAR-10",
    "svhn_cropped": "SVHN",
    "smallnorb": "smallNORB",
}
# Pictures of learning curves, each with a table, its rows, and their labels.
CURVES = {
    "mnist": ("mnist", {"official-3-reconstruction": "official"}),
    "small": ("small", {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}),
    "pairs": (
        "small",
        {
            "multi_mnist-efficient": "Efficient-CapsNet",
            "multi_mnist-wide": "CapsNet",
            "multi_mnist": "small CapsNet",
            "multi_mnist-cnn": "CNN",
        },
    ),
    "affine": ("small", {"affine": "CapsNet", "affine-cnn": "CNN"}),
}


def records() -> list[Line]:
    """Returns all recorded results."""
    return [line for path in sorted(RECORDS.glob("*/results.jsonl")) for line in read_results(path)]


def table(name: str, found: Sequence[Line]) -> str:
    """Returns the rows of a table in Markdown."""
    lines = ["| row | paper | elsewhere | capsjax | command |", "|---|---|---|---|---|"]
    for recipe in TABLES[name]:
        lines.append(
            f"| {recipe.title} | {recipe.paper} | {ELSEWHERE.get((name, recipe.name), '')}"
            f" | {measured(recipe, found, NAMES)} | `{recipe.command}` |"
        )
    return "\n".join(lines)


def filled(page: str, found: Sequence[Line]) -> str:
    """Returns the page with new tables between its marks."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table(match[2], found)}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?\n?(<!-- end -->)", fill, page, flags=re.DOTALL)


def curve(of_table: str, row: str) -> list[Record]:
    """Returns the metrics of a row's longest trial, with a test error for each data set."""
    trials = {(x.seed, x.steps): x for x in records() if (x.table, x.recipe) == (of_table, row)}
    found: list[tuple[Line, list[Record]]] = []
    # Rows of several tables may have this name; the right one ends at the trial's last step.
    for path in sorted(RECORDS.glob(f"*/{row}-seed-*.metrics.jsonl")):
        metrics = [r for r in read_json_lines(path, Record) if r["split"] != "test"]
        seed = int(path.name.split("-seed-")[1].split(".")[0])
        if trial := trials.get((seed, metrics[-1]["step"])):
            found.append((trial, metrics))
    if found:
        trial, metrics = max(found, key=lambda each: each[0].steps)
        return metrics + [
            {"split": "test", "step": trial.steps, "loss": None, "error": error}
            for error in trial.errors.values()
        ]
    raise FileNotFoundError(f"no metrics of row {row} of table {of_table} in {RECORDS}")


def main() -> None:
    """Writes the page and its pictures."""
    from capsjax.viz import training_curves
    from capsjax.viz.draw import save

    write_text(PAGE, filled(PAGE.read_text("utf-8"), records()))
    for name, (of_table, rows) in CURVES.items():
        for theme in ("light", "dark"):
            curves = {label: curve(of_table, row) for row, label in rows.items()}
            figure = training_curves(curves, theme=theme)
            save(figure, IMAGES / f"curves-{name}-{theme}.svg")


if __name__ == "__main__":
    main()
