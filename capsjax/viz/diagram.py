"""The connection diagram: children, votes, couplings, sums, parents."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from capsjax.routing import RoutingTrace
from capsjax.viz.theme import Theme, ThemeName, themed

Array = npt.NDArray[np.float64]

_ROW = 0.56  # inches from child to child
_STRIP = (1.02, 0.40)  # width and height of a drawn vector
_PANEL = 1.52  # width of an iteration
_TOP, _BOTTOM, _MARGIN = 1.32, 0.66, 0.2


class Selection(NamedTuple):
    """Which part of routing a diagram shows.

    Attributes:
      classes: two parents.
      children: those that are drawn one by one, in the order of the rows.
      rest: those that are summed up in the last row.
      iterations: those that have a column, counted from 0.
    """

    classes: tuple[int, ...]
    children: npt.NDArray[np.intp]
    rest: npt.NDArray[np.intp]
    iterations: tuple[int, ...]


def select(
    trace: RoutingTrace,
    *,
    classes: Sequence[int] | None = None,
    children: Sequence[int] | None = None,
    num_children: int = 8,
    iterations: Sequence[int] | None = None,
) -> Selection:
    """Chooses what a diagram shows of a trace without leading axes.

    Args:
      trace: ``[r, I, J]`` and so on.
      classes: one parent or two; those with the largest activations when None.
      children: only from among these; all when None.
      num_children: how many, those with the largest couplings in the last iteration that is shown,
        in turn for each of the classes.
      iterations: counted from 1; all when None.

    Returns:
      :class:`Selection`.

    Raises:
      ValueError: the trace has leading axes, or an index is out of range.
    """
    if trace.coupling.ndim != 3:
        raise ValueError(
            f"trace must be of one example, coupling [r, I, J], got shape {trace.coupling.shape}"
        )
    r, i, j = trace.coupling.shape
    if classes is None:
        classes = np.argsort(-np.asarray(trace.activations[-1]), kind="stable")[:2].tolist()
    if not 1 <= len(classes) <= 2 or len(set(classes)) != len(classes):
        raise ValueError(f"classes must be one class or two different ones, got {list(classes)}")
    shown = _within("classes", classes, 0, j)
    among = np.arange(i) if children is None else np.unique(_within("children", children, 0, i))
    columns = _within("iterations", range(1, r + 1) if iterations is None else iterations, 1, r + 1)
    if not len(among) or not columns:
        raise ValueError("children and iterations must not be empty")
    if num_children < 1:
        raise ValueError(f"num_children must be at least 1, got {num_children}")
    coupling = np.asarray(trace.coupling[columns[-1] - 1])
    ranked = [among[np.argsort(-coupling[among, parent], kind="stable")] for parent in shown]
    merged = dict.fromkeys(int(child) for turn in zip(*ranked, strict=True) for child in turn)
    first = list(merged)[:num_children]
    # Those of the first class above those of the second.
    first.sort(key=lambda child: -coupling[child, shown[0]] + coupling[child, shown[-1]])
    rest = np.setdiff1d(np.arange(i), first)
    return Selection(
        tuple(shown), np.array(first, np.intp), rest, tuple(column - 1 for column in columns)
    )


def _within(name: str, values: Sequence[int], low: int, high: int) -> list[int]:
    for value in values:
        if not low <= value < high:
            raise ValueError(f"{name} must be from {low} to {high - 1}, got {value}")
    return [int(value) for value in values]


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
    r"""Draws routing by agreement for one example, from true numbers.

    From left to right: children :math:`u_i`; their votes :math:`\hat u_{j|i} = W_{ij} u_i`; for
    each iteration the couplings :math:`c_{ij}` as lines whose width is the coupling; the weighted
    sums :math:`s_j`; the parents :math:`v_j` with their length. A vector is a row of bars, one per
    component, up for positive. The children with the largest couplings are drawn one by one; the
    last row sums up all others: their mean coupling, and the sum of their weighted votes.

    Args:
      trace: of one example, from :func:`capsjax.routing_trace`.
      votes: those that were routed, ``[I, J, D]``; without them neither they nor sums are drawn.
      children: poses ``[I, K]``; not drawn when None.
      image: that the children see, ``[H, W, C]``, in [0, 1]; not drawn when None.
      bias: inside routing, ``[J, D]``, part of the sums.
      routing: name of the algorithm; the equations of dynamic routing are its own.
      classes: one parent or two; the two with the largest activations when None.
      among: children to choose from; all when None.
      num_children: how many are drawn one by one.
      iterations: which have a column, counted from 1; all when None.
      class_names: of the parents; their numbers when None.
      child_names: of the children; their numbers when None.
      theme: ``"light"`` or ``"dark"``.

    Returns:
      A matplotlib figure. Its artists have ids (``coupling-t-i-j``, ``vote-i-j`` and so on).

    Raises:
      ValueError: a shape or an index does not go with the trace.

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
    u = _array("children", children, (i, None))
    uhat = _array("votes", votes, (i, j, d))
    beta = _array("bias", bias, (j, d))
    parents = _names("class_names", class_names, j)
    kids = _names("child_names", child_names, i)
    with themed(theme) as colours:
        return _Drawing(trace, chosen, u, uhat, beta, image, routing, parents, kids, colours).figure


def _array(name: str, given: ArrayLike | None, shape: tuple[int | None, ...]) -> Array | None:
    if given is None:
        return None
    array = np.asarray(given, np.float64)
    if array.ndim != len(shape) or any(
        n is not None and n != m for n, m in zip(shape, array.shape, strict=True)
    ):
        wanted = ", ".join("K" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got shape {array.shape}")
    return array


def _names(name: str, given: Sequence[str] | None, number: int) -> list[str]:
    if given is None:
        return [str(n) for n in range(number)]
    if len(given) != number:
        raise ValueError(f"{name} must be {number} names, got {len(given)}")
    return [str(text) for text in given]


class _Drawing:
    """One diagram while it is drawn, in inches from the lower left corner."""

    def __init__(
        self,
        trace: RoutingTrace,
        chosen: Selection,
        children: Array | None,
        votes: Array | None,
        bias: Array | None,
        image: ArrayLike | None,
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
        x = _MARGIN
        if image is not None:
            x = self._image(x, np.asarray(image, np.float64))
        x = self._children(x, children)
        if votes is not None:
            x = self._votes(x, votes, children)
        for column in chosen.iterations:
            x = self._iteration(x, column, routing)
        x = self._parents(x)
        self.width = x + _MARGIN
        self.figure.set_size_inches(self.width, self.height)
        self.ax.set_xlim(0, self.width)
        self.ax.set_ylim(0, self.height)
        self._footer()

    def _text(self, x: float, y: float, text: str, size: float = 8, **options: object) -> None:
        options.setdefault("color", self.theme.ink)
        options.setdefault("va", "center")
        self.ax.text(x, y, text, fontsize=size, **options)  # type: ignore[arg-type]

    def _head(self, x: float, title: str, equation: str, shape: str) -> None:
        self._text(x, self.height - 0.30, title, 9, weight="bold", ha="center")
        self._text(x, self.height - 0.56, equation, 10.5, ha="center")
        self._text(x, self.height - 0.81, shape, 7, ha="center", color=self.theme.soft)

    def _vector(
        self, x: float, y: float, vector: Array, largest: float, colour: str, gid: str
    ) -> None:
        """Bars of the components, on a line; the largest component of a column fills the height."""
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
        shown = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        inset = self.ax.inset_axes(
            (x, self.middle - side / 2, side, side), transform=self.ax.transData
        )
        inset.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest", gid="image")
        inset.set_xticks([])
        inset.set_yticks([])
        for spine in inset.spines.values():
            spine.set(visible=True, color=self.theme.faint)
        shape = _shape("x", image.shape)
        self._head(x + side / 2, "image", "$x$", shape)
        return x + side + 0.12

    def _children(self, x: float, children: Array | None) -> float:
        # Names are set flush right, on the left of what they name.
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
            )
        return x + width + 0.2

    def _iteration(self, x: float, column: int, routing: str) -> float:
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
                    solid_capstyle="round",
                    zorder=2,
                    gid=f"coupling-{column + 1}-{child}-{parent}",
                )
                mean = "ø " if child == "rest" else ""
                self._text(
                    start - 0.05, y + shift, f"{mean}{value:.2f}", 7, ha="right", color=colour
                )
            present = self.activations[column, parent]
            self.ax.scatter([end], [self.ends[n]], s=230, color=self.theme.paper, zorder=3)
            self.ax.scatter([end], [self.ends[n]], s=230, color=colour, alpha=0.15, zorder=3)
            self.ax.scatter(
                [end], [self.ends[n]], s=230, facecolor="none", edgecolor=colour, lw=1.3, zorder=4
            )
            self._text(
                end,
                self.ends[n],
                _short(self.class_names[parent]),
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
            update = (
                r"$b_{ij} = 0$"
                if not column
                else r"$b_{ij} \leftarrow b_{ij} + \hat{u}_{j|i}"
                r"\cdot v_j$"
            )
            self._text(middle, _BOTTOM - 0.16, update, 9, ha="center", color=self.theme.soft)
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

    def _footer(self) -> None:
        bars = "Vectors: one bar per component, all of a column to one scale."
        lines = "Lines: width is the coupling."
        if len(self.chosen.rest):
            lines += " ø, dashed: mean over the others."
        y = self.height - 0.98
        self.ax.plot([_MARGIN, self.width - _MARGIN], [y, y], color=self.theme.faint, lw=0.8)
        self._text(
            self.width - _MARGIN, 0.16, f"{bars} {lines}", 7, ha="right", color=self.theme.soft
        )


def _shape(name: str, shape: tuple[int, ...]) -> str:
    return f"{name} [{', '.join(map(str, shape))}]"


def _short(name: str) -> str:
    return name if len(name) <= 2 else name[:2]
