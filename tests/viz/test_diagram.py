"""The diagram draws the numbers of the trace."""

import jax
import numpy as np
import pytest

from capsjax import length, routing_trace
from capsjax.viz import dissect, routing_diagram, select

CHILDREN, J, D = 40, 5, 6


@pytest.fixture(scope="module")
def votes():
    return 0.8 * jax.random.normal(jax.random.key(1), (CHILDREN, J, D))


@pytest.fixture(scope="module")
def trace(votes):
    return routing_trace(votes, num_iterations=3)


def artists(figure):
    ax = figure.axes[0]
    return {a.get_gid(): a for a in ax.get_children() if a.get_gid()}


def bars(collection):
    """Heights of a vector's bars, in inches from its baseline."""
    return np.array([tip - base for (_, base), (_, tip) in collection.get_segments()])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_are_as_wide_as_the_coupling(votes, trace, theme):
    figure = routing_diagram(trace, votes=votes, classes=(1, 3), num_children=6, theme=theme)
    drawn = artists(figure)
    chosen = select(trace, classes=(1, 3), num_children=6)
    assert len(chosen.children) == 6
    assert len(chosen.rest) == CHILDREN - 6
    for t in range(3):
        for j in (1, 3):
            for i in chosen.children:
                width = drawn[f"coupling-{t + 1}-{i}-{j}"].get_linewidth()
                np.testing.assert_allclose(width, 9 * trace.coupling[t, i, j], rtol=1e-6)
            mean = np.mean(trace.coupling[t, chosen.rest, j])
            width = drawn[f"coupling-{t + 1}-rest-{j}"].get_linewidth()
            np.testing.assert_allclose(width, 9 * mean, rtol=1e-5)


def test_bars_are_the_components(votes, trace):
    drawn = artists(routing_diagram(trace, votes=votes, classes=(0, 2), num_children=4))
    chosen = select(trace, classes=(0, 2), num_children=4)
    shown = np.asarray(votes)[chosen.children][:, [0, 2]]
    unit = 0.2 / np.abs(shown).max()
    for i in chosen.children:
        for j in (0, 2):
            np.testing.assert_allclose(bars(drawn[f"vote-{i}-{j}"]), unit * votes[i, j], atol=1e-6)
    sums = np.einsum("ij,ijd->jd", trace.coupling[-1], votes)[[0, 2]]
    for name, vectors in (("s", sums), ("v", np.asarray(trace.poses[-1])[[0, 2]])):
        for n, j in enumerate((0, 2)):
            expected = 0.2 * vectors[n] / np.abs(vectors).max()
            np.testing.assert_allclose(bars(drawn[f"{name}-{j}"]), expected, atol=1e-6)
    others = np.einsum("ij,ijd->jd", trace.coupling[-1][chosen.rest], votes[chosen.rest])[[0, 2]]
    for n, j in enumerate((0, 2)):
        expected = 0.2 * others[n] / np.abs(others).max()
        np.testing.assert_allclose(bars(drawn[f"rest-{j}"]), expected, atol=1e-6)


def test_lengths_are_drawn_and_written(votes, trace):
    figure = routing_diagram(trace, votes=votes)
    first = int(np.argmax(trace.activations[-1]))
    value = float(trace.activations[-1, first])
    bar = next(p for p in figure.axes[0].patches if p.get_gid() == f"length-{first}")
    np.testing.assert_allclose(bar.get_width(), 0.95 * value, rtol=1e-6)
    assert f"{value:.3f}" in [text.get_text() for text in figure.axes[0].texts]


def test_children_have_the_largest_couplings(trace):
    chosen = select(trace, classes=(4,), num_children=5)
    coupling = np.asarray(trace.coupling[-1, :, 4])
    assert set(chosen.children) == set(np.argsort(-coupling)[:5])
    among = [3, 9, 27]
    assert set(select(trace, classes=(4,), children=among).children) == set(among)
    assert select(trace, iterations=[2]).iterations == (1,)
    both = select(trace, classes=(0, 1), num_children=2)
    tops = {int(np.argmax(trace.coupling[-1, :, j])) for j in (0, 1)}
    assert len(tops) == 1 or set(both.children) == tops


def test_files(votes, trace, tmp_path):
    figure = routing_diagram(trace, votes=votes)
    for name in ("diagram.svg", "diagram.png"):
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000
    assert "coupling-3-rest-" in (tmp_path / "diagram.svg").read_text()


def test_without_votes_neither_they_nor_sums_are_drawn(trace):
    drawn = artists(routing_diagram(trace))
    assert not any(gid.startswith(("vote", "s-", "child")) for gid in drawn)
    assert any(gid.startswith("coupling") for gid in drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": (0, 9)}, "classes must be from 0 to 4, got 9"),
        ({"classes": (1, 1)}, "one class or two different ones"),
        ({"iterations": (4,)}, "iterations must be from 1 to 3, got 4"),
        ({"among": (40,)}, "children must be from 0 to 39, got 40"),
        ({"num_children": 0}, "num_children must be at least 1, got 0"),
        (
            {"votes": np.zeros((CHILDREN, J))},
            r"votes must have shape \[40, 5, 6\], got shape \(40, 5\)",
        ),
        ({"class_names": ["a"]}, "class_names must be 5 names, got 1"),
        ({"theme": "pink"}, "theme must be one of light, dark, got 'pink'"),
    ],
)
def test_bad_input(trace, options, message):
    with pytest.raises(ValueError, match=message):
        routing_diagram(trace, **options)


def test_a_batch_is_refused(votes):
    with pytest.raises(ValueError, match="trace must be of one example"):
        routing_diagram(routing_trace(votes[None]))


def test_dissecting_gives_what_the_network_computes(loaded, image):
    anatomy = dissect(loaded.network, image)
    prediction = jax.jit(loaded.network)(image)
    np.testing.assert_allclose(anatomy.poses, prediction.poses, atol=1e-5)
    np.testing.assert_allclose(anatomy.lengths, prediction.scores, atol=1e-5)
    coupling = jax.jit(loaded.network.route)(image).coupling
    np.testing.assert_allclose(anatomy.trace.coupling[-1], coupling, atol=1e-5)
    children = jax.jit(loaded.network.primary_capsules)(image)
    np.testing.assert_allclose(length(anatomy.children), length(children))
