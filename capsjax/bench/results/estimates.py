"""Estimated scaling as text, for the terminal and the page."""

from collections.abc import Sequence

from capsjax.bench.gpus import GPUS
from capsjax.bench.scaling import CHIPS, PAYS, Scaling, ScalingStep

_HEADINGS = (
    "chips",
    "examples\nper chip",
    "examples\nper step",
    "Mcycles",
    "compute\nms",
    "all-reduce\nms",
    "examples/s",
    "efficiency",
)


def title(scaling: Scaling) -> str:
    """Returns a title that names what is scaled."""
    return f"{scaling.kind.capitalize()} scaling on {scaling.generation}: {scaling.program}"


def headings(scaling: Scaling) -> tuple[str, ...]:
    """Returns the headings of the columns; GPUs have no cycles."""
    return tuple(name for name in _HEADINGS if name != "Mcycles" or scaling.generation not in GPUS)


def cells(scaling: Scaling, step: ScalingStep) -> tuple[str, ...]:
    """Returns the text under each heading."""
    return (
        f"{step.chips}",
        f"{step.batch:,}",
        f"{step.chips * step.batch:,}",
        *([] if step.cycles is None else [f"{step.cycles / 1e6:.3f}"]),
        f"{1e3 * step.compute_seconds:.3f}",
        f"{1e3 * step.all_reduce_seconds:.3f}",
        f"{step.examples_per_second:,.0f}",
        f"{scaling.efficiency(step):.0%}",
    )


def verdict(scaling: Scaling) -> str:
    """States where adding chips stops paying, and why."""
    step = scaling.limit
    if step is None:
        step = scaling.steps[-1]
        start = f"Adding chips pays up to {step.chips}, the largest size here"
    else:
        start = f"Adding chips stops paying at {step.chips}, the first below {PAYS:.0%}"
    causes = {cause: max(seconds, 0.0) for cause, seconds in scaling.causes(step).items()}
    lost, cause = sum(causes.values()), max(causes, key=lambda name: causes[name])
    text = f"{start}. There {1e3 * lost:.2f} of {1e3 * step.seconds:.2f} ms are lost"
    return f"{text}, {causes[cause] / lost:.0%} of it to {cause}." if lost else f"{start}."


def assumptions(scalings: Sequence[Scaling]) -> str:
    """States the assumptions of the estimates."""
    generations = dict.fromkeys(each.generation for each in scalings)
    tpus = [name for name in generations if name in CHIPS]
    gpus = [name for name in generations if name in GPUS]
    text = ["These are estimates: nothing was run."]
    if tpus:
        clocks = ", ".join(f"{name} {CHIPS[name].hertz / 1e9:g} GHz" for name in tpus)
        links = ", ".join(
            f"{name} {CHIPS[name].link_bytes_per_second / 1e9:g} GB/s" for name in tpus
        )
        text.append(
            "Compute time is the compiler's estimate of cycles for one chip, divided by its clock"
            f" ({clocks}); it leaves out communication and the start of copies. An all-reduce moves"
            " 2 (n - 1) / n times its bytes over all links of a chip at once"
            f" ({links} for each link and direction), takes 1 us more for each hop, and overlaps"
            " with nothing."
        )
    if gpus:
        links = ", ".join(
            f"{name} {GPUS[name].link_bytes_per_second / 1e9:g} and"
            f" {GPUS[name].network_bytes_per_second / 1e9:g} GB/s"
            for name in gpus
        )
        text.append(
            "Compute time of a GPU is est. ms, an untuned estimate that is too short for libraries."
            " An all-reduce sums over the GPUs of a host by NVLink, and over hosts by"
            f" InfiniBand, one adapter for each GPU ({links} in each direction); it takes 1 us more"
            " for each hop, and overlaps with nothing."
        )
    text += [
        "Many steps run in one call on data in the chips' memory, so that hosts take no time.",
        "Efficiency is examples/s per chip, relative to the fewest chips.",
    ]
    return " ".join(text)
