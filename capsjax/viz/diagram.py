"""The routing diagram: children, votes, couplings, sums and parents of one example."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from capsjax.routing import RoutingTrace
from capsjax.viz._checks import Array, as_array, as_names
from capsjax.viz.selection import Selection, select
from capsjax.viz.theme import Theme, ThemeName, show_image, themed

# Inches.
_ROW = 0.56  # from child to child
_STRIP = (1.02, 0.40)  # width and height of a vector
_PANEL = 1.52  # width of an iteration
_TOP, _BOTTOM, _MARGIN = 1.32, 0.66, 0.2


def routing_diagram(
    trace: RoutingTrace,
    *,
    votes: ArrayLike | None = None,
    children: ArrayLike | None = None,
    image: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    routing: str = "dynamic",
    classes: Sequence[int] | None = None,
    among: Sequence[int] | None = None,
    num_children: int = 8,
    iterations: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    child_names: Sequence[str] | None = None,
    theme: ThemeName = "light",
) -> Figure:
    r"""Draws the routing of one example.

    From left to right, the diagram shows the children :math:`u_i`; their votes
    :math:`\hat u_{j|i} = W_{ij} u_i`; for each iteration, the couplings :math:`c_{ij}` as lines of
    proportional width; the weighted sums :math:`s_j`; and the parents :math:`v_j` with their
    lengths. A vector is a row of bars, one per component; positive components point up. The
    children with the largest couplings are drawn individually. The last row summarises the others:
    their mean coupling, and the sum of their weighted votes.

    Args:
      trace: trace of one example, from :func:`capsjax.routing_trace`.
      votes: the routed votes, ``[I, J, D]``; when None, neither votes nor sums are drawn.
      children: poses of the children, ``[I, K]``; not drawn when None.
      image: input image, ``[H, W, C]`` in [0, 1]; not drawn when None.
      bias: bias inside routing, ``[J, D]``, which is added to the sums.
      routing: name of the algorithm; the equations are drawn for ``"dynamic"`` only.
      classes: one or two parents; the two with the largest activations when None.
      among: children to choose from; all when None.
      num_children: number of children that are drawn individually.
      iterations: iterations to show, counted from 1; all when None.
      class_names: names of the parents; their numbers when None.
      child_names: names of the children; their numbers when None.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure, whose artists have ids such as ``coupling-t-i-j`` and ``vote-i-j``.

    Raises:
      ValueError: a shape or an index does not match the trace.

    Example:
      >>> import jax
      >>> from capsjax import routing_trace
      >>> from capsjax.viz import routing_diagram
      >>> votes = jax.random.normal(jax.random.key(0), (32, 10, 16))
      >>> figure = routing_diagram(routing_trace(votes), votes=votes)
      >>> figure.savefig("diagram.svg")  # doctest: +SKIP

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017.
    """
    chosen = select(
        trace, classes=classes, children=among, num_children=num_children, iterations=iterations
    )
    _, i, j = trace.coupling.shape
    d = trace.poses.shape[-1]
    u = None if children is None else as_array("children", children, i, "K")
    uhat = None if votes is None else as_array("votes", votes, i, j, d)
    beta = None if bias is None else as_array("bias", bias, j, d)
    parent_names = as_names("class_names", class_names, j)
    kid_names = as_names("child_names", child_names, i)
    with themed(theme) as colours:
        drawing = _Drawing(trace, chosen, uhat, beta, routing, parent_names, kid_names, colours)
        return drawing.draw(u, image)


class _Drawing:
    """A diagram; coordinates are inches from the lower left corner."""

    def __init__(
        self,
        trace: RoutingTrace,
        chosen: Selection,
        votes: Array | None,
        bias: Array | None,
        routing: str,
        class_names: list[str],
        child_names: list[str],
        theme: Theme,
    ):
        self.coupling = np.asarray(trace.coupling, np.float64)
        self.poses = np.asarray(trace.poses, np.float64)
        self.activations = np.asarray(trace.activations, np.float64)
        self.chosen, self.votes, self.bias, self.theme = chosen, votes, bias, theme
        self.class_names, self.child_names = class_names, child_names
        self.dynamic = routing == "dynamic"
        rows = len(chosen.children) + bool(len(chosen.rest))
        self.height = _TOP + max(rows, 4) * _ROW + _BOTTOM
        self.middle = _BOTTOM + max(rows, 4) * _ROW / 2
        top = self.middle + rows * _ROW / 2
        self.rows = [top - (n + 0.5) * _ROW for n in range(rows)]
        spread = min(1.25, rows * _ROW / 4)
        self.ends = [
            self.middle + (spread if not n else -spread) * (len(chosen.classes) > 1)
            for n in range(len(chosen.classes))
        ]
        self.figure = Figure()
        self.ax: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.ax.set_axis_off()

    def draw(self, children: Array | None, image: ArrayLike | None) -> Figure:
        """Draws the columns from left to right and returns the figure."""
        x = _MARGIN
        if image is not None:
            x = self._image(x, np.asarray(image, np.float64))
        x = self._children(x, children)
        if self.votes is not None:
            x = self._votes(x, self.votes, children)
        for column in self.chosen.iterations:
            x = self._iteration(x, column)
        width = self._parents(x) + _MARGIN
        self.figure.set_size_inches(width, self.height)
        self.ax.set_xlim(0, width)
        self.ax.set_ylim(0, self.height)
        self._footer(width)
        return self.figure

    def _text(self, x: float, y: float, text: str, size: float, **options: Any) -> None:
        self.ax.text(
            x, y, text, fontsize=size, **{"color": self.theme.ink, "va": "center", **options}
        )

    def _head(self, x: float, title: str, equation: str, shape: str) -> None:
        self._text(x, self.height - 0.30, title, 9, weight="bold", ha="center")
        self._text(x, self.height - 0.56, equation, 10.5, ha="center", parse_math=True)
        self._text(x, self.height - 0.81, shape, 7, ha="center", color=self.theme.soft)

    def _vector(
        self, x: float, y: float, vector: Array, largest: float, colour: str, gid: str
    ) -> None:
        """Draws one bar per component; a component of size `largest` fills the strip."""
        width, height = _STRIP
        pitch = width / len(vector)
        at = x + (np.arange(len(vector)) + 0.5) * pitch
        tips = y + 0.5 * height * vector / (largest or 1.0)
        self.ax.plot([x, x + width], [y, y], color=self.theme.faint, lw=0.6, zorder=1)
        bars = LineCollection(
            [[(a, y), (a, tip)] for a, tip in zip(at, tips, strict=True)],
            colors=colour,
            linewidths=0.68 * pitch * 72,
            capstyle="butt",
            gid=gid,
            zorder=2,
        )
        self.ax.add_collection(bars, autolim=False)

    def _image(self, x: float, image: Array) -> float:
        side = 1.2
        inset = self.ax.inset_axes(
            (x, self.middle - side / 2, side, side), transform=self.ax.transData
        )
        show_image(inset, image, gid="image")
        for spine in inset.spines.values():
            spine.set(visible=True, color=self.theme.faint)
        self._head(x + side / 2, "image", "$x$", _shape("x", image.shape))
        return x + side + 0.12

    def _children(self, x: float, children: Array | None) -> float:
        # Names stand to the left of their rows, flush right.
        names = [self.child_names[child] for child in self.chosen.children]
        label = 0.1 + 0.059 * max(map(len, [*names, "others"]))
        for y, name in zip(self.rows, names, strict=False):
            self._text(x + label - 0.08, y, name, 7.5, ha="right", color=self.theme.soft)
        if len(self.chosen.rest):
            many = f"{len(self.chosen.rest):,}\nothers"
            self._text(
                x + label - 0.08,
                self.rows[-1],
                many,
                7.5,
                ha="right",
                style="italic",
                color=self.theme.soft,
                linespacing=1.1,
            )
        x += label
        if children is None:
            return x + 0.15
        largest = np.abs(children[self.chosen.children]).max()
        for y, child in zip(self.rows, self.chosen.children, strict=False):
            self._vector(x, y, children[child], largest, self.theme.ink, f"child-{child}")
        self._head(x + _STRIP[0] / 2, "children", "$u_i$", _shape("u", children.shape))
        return x + _STRIP[0] + 0.25

    def _votes(self, x: float, votes: Array, children: Array | None) -> float:
        step = _STRIP[0] + 0.18
        classes = list(self.chosen.classes)
        last = self.coupling[self.chosen.iterations[-1]]
        rest = np.einsum("ij,ijd->jd", last[self.chosen.rest], votes[self.chosen.rest])
        largest = np.abs(votes[self.chosen.children][:, classes]).max()
        for n, parent in enumerate(classes):
            for y, child in zip(self.rows, self.chosen.children, strict=False):
                self._vector(
                    x + n * step,
                    y,
                    votes[child, parent],
                    largest,
                    self.theme.accents[n],
                    f"vote-{child}-{parent}",
                )
            if len(self.chosen.rest):
                summed = np.abs(rest[classes]).max()
                self._vector(
                    x + n * step,
                    self.rows[-1],
                    rest[parent],
                    summed,
                    self.theme.accents[n],
                    f"rest-{parent}",
                )
            name = f"for {self.class_names[parent]}"
            self._text(
                x + n * step + _STRIP[0] / 2,
                self.height - 1.16,
                name,
                7.5,
                ha="center",
                color=self.theme.accents[n],
                weight="bold",
            )
        width = len(classes) * step - 0.18
        i, j, d = votes.shape
        shape = _shape("û", votes.shape)
        if children is not None:
            shape = f"{_shape('W', (i, children.shape[-1], j, d))}   {shape}"
        equation = r"$\hat{u}_{j|i} = W_{ij}\,u_i$" if children is not None else r"$\hat{u}_{j|i}$"
        self._head(x + width / 2, "votes", equation, shape)
        if len(self.chosen.rest):
            self._text(
                x + width / 2,
                self.rows[-1] - 0.33,
                r"sum of $c_{ij}\,\hat{u}_{j|i}$, own scale",
                7,
                ha="center",
                color=self.theme.soft,
                parse_math=True,
            )
        return x + width + 0.2

    def _iteration(self, x: float, column: int) -> float:
        coupling = self.coupling[column]
        start, end = x + 0.45, x + _PANEL - 0.28
        for n, parent in enumerate(self.chosen.classes):
            colour, shift = self.theme.accents[n], (0.09, -0.09)[n] * (len(self.ends) > 1)
            values = [(f"{c}", coupling[c, parent]) for c in self.chosen.children]
            if len(self.chosen.rest):
                values.append(("rest", coupling[self.chosen.rest, parent].mean()))
            for y, (child, value) in zip(self.rows, values, strict=True):
                style = (0, (2, 1.2)) if child == "rest" else "solid"
                self.ax.plot(
                    [start, end],
                    [y + shift, self.ends[n]],
                    color=colour,
                    lw=9 * value,
                    alpha=0.75,
                    ls=style,
                    solid_capstyle="butt",
                    zorder=2,
                    gid=f"coupling-{column + 1}-{child}-{parent}",
                )
                mean = "ø " if child == "rest" else ""
                self._text(
                    start - 0.05, y + shift, f"{mean}{value:.2f}", 7, ha="right", color=colour
                )
            present = self.activations[column, parent]
            disc = functools.partial(self.ax.scatter, [end], [self.ends[n]], s=230)
            disc(color=self.theme.paper, zorder=3)
            disc(color=colour, alpha=0.15, zorder=3)
            disc(facecolor="none", edgecolor=colour, lw=1.3, zorder=4)
            self._text(
                end,
                self.ends[n],
                self.class_names[parent][:2],
                8,
                ha="center",
                weight="bold",
                color=colour,
                zorder=5,
            )
            self._text(
                end - 0.08,
                self.ends[n] + (-0.25 if n else 0.25),
                f"{present:.2f}",
                7.5,
                color=colour,
                zorder=5,
            )
        equation = r"$c_{ij} = \mathrm{softmax}_j\, b_{ij}$" if self.dynamic else "$c_{ij}$"
        middle = (start + end) / 2
        self._head(middle, f"iteration {column + 1}", equation, _shape("c", coupling.shape))
        if self.dynamic:
            update = r"$b_{ij} \leftarrow b_{ij} + \hat{u}_{j|i}\cdot v_j$"
            if not column:
                update = r"$b_{ij} = 0$"
            self._text(
                middle,
                _BOTTOM - 0.16,
                update,
                9,
                ha="center",
                color=self.theme.soft,
                parse_math=True,
            )
        return x + _PANEL

    def _parents(self, x: float) -> float:
        x += 0.12
        last = self.chosen.iterations[-1]
        classes = list(self.chosen.classes)
        columns = [("parents", self.poses[last], "v")]
        if self.votes is not None:
            sums = np.einsum("ij,ijd->jd", self.coupling[last], self.votes)
            if self.bias is not None:
                sums = sums + self.bias
            columns.insert(0, ("weighted sums", sums, "s"))
        squash = r"$v_j = \frac{\|s_j\|^2}{1+\|s_j\|^2}\,\frac{s_j}{\|s_j\|}$"
        beta = r"$ + \beta_j$" if self.bias is not None else ""
        equations = {
            "s": r"$s_j = \Sigma_i\, c_{ij}\,\hat{u}_{j|i}$" + beta,
            "v": squash if self.dynamic else "$v_j$",
        }
        for title, vectors, letter in columns:
            largest = np.abs(vectors[classes]).max()
            for n, parent in enumerate(classes):
                colour = self.theme.accents[n]
                self._vector(
                    x, self.ends[n], vectors[parent], largest, colour, f"{letter}-{parent}"
                )
                norm = np.linalg.norm(vectors[parent])
                if letter == "s":
                    self._text(
                        x + _STRIP[0] / 2,
                        self.ends[n] - 0.33,
                        rf"$\|s_j\|$ = {norm:.2f}",
                        7.5,
                        ha="center",
                        color=self.theme.soft,
                        parse_math=True,
                    )
            self._head(x + _STRIP[0] / 2, title, equations[letter], _shape(letter, vectors.shape))
            x += _STRIP[0] + 0.3
        x -= 0.1
        width = 0.95
        for n, parent in enumerate(classes):
            colour, y = self.theme.accents[n], self.ends[n]
            value = self.activations[last, parent]
            for end, alpha in ((1.0, 0.16), (value, 1.0)):
                self.ax.barh(
                    y,
                    width * end,
                    0.16,
                    left=x,
                    color=colour,
                    alpha=alpha,
                    zorder=2,
                    gid=f"length-{parent}" if alpha == 1 else None,
                )
            self._text(x, y + 0.22, self.class_names[parent], 8.5, weight="bold", color=colour)
            self._text(x + width, y + 0.22, f"{value:.3f}", 8.5, ha="right", color=colour)
        name = r"$\|v_j\|$" if self.dynamic else "$a_j$"
        shape = f"[{self.activations.shape[-1]}]"
        self._head(x + width / 2, "class present", f"{name}", shape)
        return x + width

    def _footer(self, width: float) -> None:
        bars = "Vectors: one bar per component, all of a column to one scale."
        lines = "Lines: width is the coupling."
        if len(self.chosen.rest):
            lines += " ø, dashed: mean over the others."
        y = self.height - 0.98
        self.ax.plot([_MARGIN, width - _MARGIN], [y, y], color=self.theme.faint, lw=0.8)
        self._text(width - _MARGIN, 0.16, f"{bars} {lines}", 7, ha="right", color=self.theme.soft)


def _shape(name: str, shape: tuple[int, ...]) -> str:
    return f"{name} [{', '.join(map(str, shape))}]"
