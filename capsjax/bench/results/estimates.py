"""Estimated scaling as text, which the terminal and the page show."""

from collections.abc import Sequence

from capsjax.bench.scaling import CHIPS, PAYS, Scaling, ScalingStep

HEADINGS = (
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
    """What is scaled."""
    return f"{scaling.kind.capitalize()} scaling on {scaling.generation}: {scaling.program}"


def cells(scaling: Scaling, step: ScalingStep) -> tuple[str, ...]:
    """The text under each heading."""
    return (
        f"{step.chips}",
        f"{step.batch:,}",
        f"{step.chips * step.batch:,}",
        f"{step.cycles / 1e6:.3f}",
        f"{1e3 * step.compute_seconds:.3f}",
        f"{1e3 * step.all_reduce_seconds:.3f}",
        f"{step.examples_per_second:,.0f}",
        f"{scaling.efficiency(step):.0%}",
    )


def verdict(scaling: Scaling) -> str:
    """Where adding chips stops paying, and what takes the time."""
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
    """What the estimates rest on."""
    generations = dict.fromkeys(each.generation for each in scalings)
    clocks = ", ".join(f"{name} {CHIPS[name].hertz / 1e9:g} GHz" for name in generations)
    links = ", ".join(
        f"{name} {CHIPS[name].link_bytes_per_second / 1e9:g} GB/s" for name in generations
    )
    return (
        "These are estimates: nothing was run. Compute time is the compiler's cycles for one chip"
        f" at its clock ({clocks}); starts of copies and communication are not among them. An"
        " all-reduce moves 2 (n - 1) / n times its bytes over all links of a chip at once"
        f" ({links} for each link and direction), takes 1 us more for each hop, and overlaps with"
        " nothing. Many steps are one call on data in the chips' memory: hosts take no time."
        " Efficiency is examples/s per chip, relative to the fewest chips."
    )
