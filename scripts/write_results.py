r"""Fills RESULTS.md from docs/results, and draws its learning curves: ``write_results.py``.

What ``capsjax reproduce`` has left in its output directory, results.jsonl and \*.curve.jsonl, is
recorded by copying it to a folder of docs/results; each folder is one machine.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capsjax.training import TABLES, Recipe

ROOT = Path(__file__).parents[1]
PAGE, RECORDS, IMAGES = ROOT / "RESULTS.md", ROOT / "docs" / "results", ROOT / "docs" / "images"

# Means of three trials in per cent, of CapsNet-Keras after 30 epochs, which the page names.
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
# Table and rows of one picture of learning curves, and what rows are called in it, by its name.
CURVES = {
    "mnist": (
        "mnist",
        {"paper-3-reconstruction": "paper", "official-3-reconstruction": "official"},
    ),
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


def json_lines(path: Path) -> list[dict[str, Any]]:
    """What a file of JSON lines holds."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def records() -> list[dict[str, Any]]:
    """All trials that are recorded."""
    return [line for path in sorted(RECORDS.glob("*/results.jsonl")) for line in json_lines(path)]


def measured(recipe: Recipe, found: Sequence[Mapping[str, Any]]) -> str:
    """Errors in per cent of the trials of a row, with their steps, or that there are none.

    Of trials of the recipe's own length in float32, else of the longest; the last one of each seed.
    """
    wanted = (recipe.table, recipe.name, "float32")
    lines = [x for x in found if (x["table"], x["recipe"], x["dtype"]) == wanted]
    lengths = {x["asked_steps"] for x in lines if "seed" in x}
    asked = None if None in lengths else max(lengths, default=None)
    lines = [x for x in lines if x["asked_steps"] == asked]
    mine = list({x["seed"]: x for x in lines if "seed" in x}.values())
    if not mine:
        return "not run"
    texts = [
        f"{100 * x['error']:.2f} as an ensemble of {x['ensemble']}"
        for x in lines
        if "ensemble" in x
    ][-1:]
    for name in mine[0]["errors"]:
        errors = [100 * x["errors"][name] for x in mine]
        text = f"{statistics.mean(errors):.2f}"
        if len(errors) > 1:
            text += f" ± {statistics.stdev(errors):.3f}"
        several = f" on {NAMES[name]}" if len(mine[0]["errors"]) > 1 else ""
        texts.append(text + several)
    steps = f"{min(x['steps'] for x in mine):,}"
    if asked is not None:
        steps += f" of {recipe.steps:,}"
    minutes = statistics.mean(x["seconds"] for x in mine) / 60
    trials = f"{len(mine)} seed{'s' if len(mine) > 1 else ''}"
    return f"{', '.join(texts)} ({trials}, {steps} steps, {minutes:.0f} min)"


def table(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a table in Markdown."""
    lines = ["| row | paper | elsewhere | capsjax | command |", "|---|---|---|---|---|"]
    for recipe in TABLES[name]:
        lines.append(
            f"| {recipe.title} | {recipe.paper} | {ELSEWHERE.get((name, recipe.name), '')}"
            f" | {measured(recipe, found)} | `{recipe.command}` |"
        )
    return "\n".join(lines)


def filled(page: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The page with the tables between its marks made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table(match[2], found)}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?\n?(<!-- end -->)", fill, page, flags=re.DOTALL)


def curve(of_table: str, row: str) -> list[dict[str, Any]]:
    """Loss and error of a row's first trial as :func:`capsjax.viz.training_curves` takes them."""
    ends = {
        (x["seed"], x["steps"]): x
        for x in records()
        if (x["table"], x["recipe"]) == (of_table, row) and "seed" in x
    }

    def end(points: list[dict[str, Any]]) -> tuple[int, int]:
        return points[0]["seeds"][0], points[-1]["step"]

    # Rows of several tables may have this name.
    curves = map(json_lines, sorted(RECORDS.glob(f"*/{row}-seeds-*.curve.jsonl")))
    points = next(points for points in curves if end(points) in ends)
    trained = [
        {"split": "train", "step": p["step"], "loss": p["loss"][0], "error": p["error"][0]}
        for p in points
    ]
    held_out = [
        {"split": "validation", "step": p["step"], "error": p["validation"][0]}
        for p in points
        if p["validation"]
    ]
    seed, steps = end(points)
    errors = ends[seed, steps]["errors"].values()
    tests = [{"split": "test", "step": steps, "error": error} for error in errors]
    return trained + held_out + tests


def main() -> None:
    """Writes the page and its pictures."""
    from capsjax.viz import training_curves
    from capsjax.viz.draw import save

    PAGE.write_text(filled(PAGE.read_text(), records()))
    for name, (of_table, rows) in CURVES.items():
        for theme in ("light", "dark"):
            curves = {label: curve(of_table, row) for row, label in rows.items()}
            figure = training_curves(curves, theme=theme)
            save(figure, IMAGES / f"curves-{name}-{theme}.svg")


if __name__ == "__main__":
    main()
