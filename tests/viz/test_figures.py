"""The figures draw the numbers that they were given."""

import io

import jax
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

from capsjax import routing_trace, viz
from capsjax.cli import main
from capsjax.training import load_network
from capsjax.training.run_directory import RunDirectory
from capsjax.viz.draw import DrawConfig, make_figure


@pytest.fixture(scope="module")
def anatomy(loaded, image):
    return viz.dissect(loaded.network, image)


def test_coupling_maps(loaded, anatomy):
    rows, columns = grid = loaded.network.config.grid
    figure = viz.coupling_maps(anatomy.trace, grid, classes=[2, 7], iterations=[1, 3])
    images = {im.get_gid(): im for ax in figure.axes for im in ax.images}
    assert len(images) == 2 * 2 * 3
    for t in (1, 3):
        for kind in range(3):
            # The number of the capsule at this position of the grid.
            for row, column in ((0, 0), (1, 2), (rows - 1, columns - 1)):
                child = (row * columns + column) * 3 + kind
                drawn = images[f"coupling-{t}-{kind}-7"].get_array()[row, column]
                assert drawn == anatomy.trace.coupling[t - 1, child, 7]
    with pytest.raises(ValueError, match="grid must divide"):
        viz.coupling_maps(anatomy.trace, (7, 11))


def test_agreement_and_entropy(anatomy):
    trace = anatomy.trace
    means, entropy = viz.agreement_and_entropy(trace)
    votes, coupling = np.asarray(anatomy.votes), np.asarray(trace.coupling)
    for t in range(3):
        along = np.einsum("ijd,jd->ij", votes, trace.poses[t])
        np.testing.assert_allclose(
            means[t], np.average(along, axis=0, weights=coupling[t]), rtol=1e-4, atol=1e-5
        )
    np.testing.assert_allclose(entropy[0], np.log2(10), rtol=1e-6)
    expected = np.mean([-sum(c * np.log2(c)) for c in coupling[2].astype(float)])
    np.testing.assert_allclose(entropy[2], expected, rtol=1e-5)
    lines = {
        line.get_gid(): line for ax in viz.agreement(trace, classes=[4]).axes for line in ax.lines
    }
    np.testing.assert_array_equal(lines["agreement-4"].get_ydata(), means[:, 4])
    np.testing.assert_array_equal(lines["entropy"].get_ydata(), entropy)


def test_lengths_on_given_axes(anatomy):
    figure = Figure()
    ax = figure.add_subplot()
    assert viz.lengths(anatomy.lengths, label=3, ax=ax) is figure
    heights = [patch.get_height() for patch in ax.patches]
    np.testing.assert_allclose(heights, anatomy.lengths)


def test_names_are_text_and_no_formulas(anatomy):
    names = ["$a$", "\u732b", "c", *"defghij"]  # a character that the font lacks
    figure = viz.lengths(anatomy.lengths, class_names=names, label=0)
    figure.savefig(io.BytesIO())  # warns of characters without a glyph
    (ax,) = figure.axes
    assert [tick.get_text() for tick in ax.get_xticklabels()][:3] == ["$a$", r"1 (\u732b)", "c"]
    for text in (*ax.get_xticklabels(), ax.xaxis.label):
        assert not text.get_parse_math()
    assert ax.get_title(loc="left").startswith(r"length $\|v_j\|$")
    figure = viz.routing_diagram(anatomy.trace, class_names=names, classes=[0])
    formulas = {text.get_text() for text in figure.axes[0].texts if text.get_parse_math()}
    assert "$b_{ij} = 0$" in formulas
    assert "$a$" not in formulas


def test_dimensions_move_one_component(loaded, anatomy):
    images = viz.vary_dimensions(loaded.network, anatomy.poses, 6, (-0.25, 0.0, 0.25))
    assert images.shape == (5, 3, 28, 28, 1)
    moved = anatomy.poses.at[6, 2].add(0.25)
    by_hand = jax.jit(loaded.network.decoder)(moved, np.arange(10) == 6)
    np.testing.assert_allclose(images[2, 2], by_hand, atol=1e-6)
    figure = viz.dimensions(images, (-0.25, 0.0, 0.25))
    tiles = {im.get_gid(): im.get_array() for ax in figure.axes for im in ax.images}
    np.testing.assert_allclose(tiles["tile-2-2"], by_hand[..., 0], atol=1e-6)
    with pytest.raises(ValueError, match="offsets must be 3 numbers, got 1"):
        viz.dimensions(images, [0.0])


def test_overlaps_are_tinted(image):
    parts = np.stack([image, 0 * image])[None]
    figure = viz.overlaps(image[None], parts)
    tiles = {im.get_gid(): np.asarray(im.get_array()) for ax in figure.axes for im in ax.images}
    np.testing.assert_allclose(tiles["tile-1-0"], tiles["tile-2-0"])
    np.testing.assert_allclose(tiles["tile-2-0"][..., 2], image[..., 0], atol=1e-6)
    assert not tiles["tile-3-0"].any()


def test_confusion():
    labels = np.array([0, 1, 2, 2, 1])
    scores = np.eye(3)[[0, 1, 1, 2, 0]] * np.array([[1.0], [1], [0.6], [1], [0.9]])
    np.testing.assert_array_equal(
        viz.confusion_matrix(labels, scores), [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    )
    assert viz.worst_errors(labels, scores).tolist() == [4, 2]
    figure = viz.confusion(labels, scores, images=np.zeros((5, 4, 4, 1)))
    titles = [ax.get_title(loc) for ax in figure.axes for loc in ("left", "center")]
    assert "2 of 5 wrong (40.00%)" in titles
    assert "1 → 0\n0.00  0.90" in titles
    with pytest.raises(ValueError, match="labels must be 5 integers"):
        viz.confusion(labels[:2], scores)


def test_curves_hold_the_records(run):
    records = RunDirectory(run).read_metrics()
    figure = viz.training_curves({"a": records, "b": records})
    lines = {line.get_gid(): line for ax in figure.axes for line in ax.lines}
    losses = [r["loss"] for r in records if r["split"] == "train"]
    assert losses
    np.testing.assert_array_equal(lines["b-train-loss"].get_ydata(), losses)
    with pytest.raises(ValueError, match="got none of c"):
        viz.training_curves({"c": []})


def test_curves_show_what_is_zero_or_single():
    records = [
        {"split": "train", "step": 5, "loss": 0.5, "error": 0.25},
        *({"split": "validation", "step": n, "loss": 0.5, "error": 0.1 / n - 0.02} for n in (1, 5)),
        {"split": "test", "step": 5, "loss": 0.5, "error": 0.0},
    ]
    figure = viz.training_curves({"a": [{"split": "test", "step": 5, "loss": 1.0}], "b": records})
    loss, error = figure.axes
    assert (loss.get_yscale(), error.get_yscale()) == ("log", "symlog")
    bottom, top = error.get_ylim()
    for line in error.lines:
        assert bottom < min(line.get_ydata()) <= max(line.get_ydata()) < top
        assert line.get_marker() != "None"
    labels = [label.get_text() for label in error.get_xticklabels() if label.get_text()]
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ((np.nan, 2.0), "log"),
        ((np.inf,), "log"),
        ((0.0, 0.0), "symlog"),
        ((-3.0, 2.0), "symlog"),
        ((-1234.5, -1200.0, -1190.0), "linear"),
    ],
)
def test_curves_of_any_losses(losses, scale):
    records = [{"split": "train", "step": n, "loss": loss} for n, loss in enumerate(losses)]
    figure = viz.training_curves({"a": records})
    figure.savefig(io.BytesIO())
    (ax,) = figure.axes
    bottom, top = ax.get_ylim()
    assert all(bottom < loss < top for loss in losses if np.isfinite(loss))
    assert ax.get_yscale() == scale
    assert any(bottom <= tick <= top for tick in ax.get_yticks())


def test_long_names_and_many_classes_can_be_read():
    names = [f"{n} is a long name of a class" for n in range(40)]
    labels, scores = np.arange(40), np.roll(np.eye(40), 1, axis=1)
    figure = viz.confusion(labels, scores, images=np.zeros((40, 4, 4, 1)), class_names=names)
    ticks = figure.axes[0].get_xticklabels()
    assert {tick.get_rotation() for tick in ticks} == {45}
    assert ticks[0].get_text() == "0 is a long name of a c…"
    assert figure.get_figwidth() > viz.confusion(labels[:10], scores[:10, :12]).get_figwidth() * 2
    most = viz.confusion(np.arange(200), np.eye(200)).get_size_inches()
    assert max(most) < 20
    assert max(len(x) for ax in figure.axes[1:] for x in ax.get_title().splitlines()) <= 16
    (bars,), (few,) = (
        viz.lengths(np.ones(number), class_names=given).axes
        for number, given in ((40, names), (10, None))
    )
    assert {tick.get_rotation() for tick in bars.get_xticklabels()} == {45}
    assert {tick.get_rotation() for tick in few.get_xticklabels()} == {0}
    # With images, the matrix has half of the figure.
    images = np.zeros((10, 4, 4, 1))
    nine = [f"category{n}" for n in range(10)]
    half = viz.confusion(labels[:10], scores[:10, :10], images=images, class_names=nine)
    assert {tick.get_rotation() for tick in half.axes[0].get_xticklabels()} == {45}
    # There may be no space below the caller's axes.
    own = Figure().add_subplot()
    viz.lengths(np.ones(10), class_names=nine, ax=own)
    assert {tick.get_rotation() for tick in own.get_xticklabels()} == {0}
    images = np.zeros((2, 4, 4, 1))
    grid = viz.reconstructions(images, images, titles=["Sandal → Ankle boot", "0\n→ 1"])
    assert [ax.get_title() for ax in grid.axes[:2]] == ["Sandal →\nAnkle boot", "0\n→ 1"]


def test_entropies_that_differ_by_rounding_look_equal():
    trace = routing_trace(1e-4 * np.ones((6, 10, 4), np.float32))
    (right,) = (ax for ax in viz.agreement(trace).axes if "entropy" in ax.get_title(loc="left"))
    bottom, top = right.get_ylim()
    assert top - bottom > 0.1
    assert bottom < np.log2(10) < top


def test_curves_of_numbers_have_metrics_and_no_error():
    record = {"split": "test", "step": 1, "loss": 2.0, "error": None, "metrics": {"mean": 0.5}}
    figure = viz.training_curves({"a": [record]})
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["loss", "mean"]
    assert figure.axes[1].lines[0].get_ydata() == [0.5]


def test_loading_gives_the_network_that_was_saved(run, loaded, image):
    found = load_network(run)
    assert found.step == 2
    assert len(found.test.labels) == 1000
    apply = nnx.jit(lambda network: network(image))
    expected, came = apply(loaded.network), apply(found.network)
    np.testing.assert_array_equal(came.scores, expected.scores)
    np.testing.assert_array_equal(came.reconstruction, expected.reconstruction)


@pytest.mark.parametrize(
    "name",
    [
        "diagram",
        "couplings",
        "agreement",
        "lengths",
        "reconstructions",
        "overlaps",
        "confusion",
        "curves",
    ],
)
def test_draw_writes_a_file(run, tmp_path, name, capsys):
    out = tmp_path / "figure.png"
    index = [] if name in ("confusion", "curves") else ["--index", "2"]
    main(["draw", name, str(run), "--out", str(out), *index, "--theme", "dark"])
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_same_figure_gives_the_same_file(run, tmp_path):
    files = [tmp_path / f"{n}.svg" for n in range(2)]
    for file in files:
        main(["draw", "curves", str(run), "--out", str(file)])
    assert files[0].read_bytes() == files[1].read_bytes()


def test_draw_passes_its_options_on(run):
    config = DrawConfig(
        name="diagram", runs=(run,), classes=(8, 1), types=(2,), iterations=(1, 3), num_children=3
    )
    ids = {a.get_gid() for a in make_figure(config).axes[0].get_children() if a.get_gid()}
    lines = [gid.split("-") for gid in ids if gid.startswith("coupling")]
    assert {(t, j) for _, t, _, j in lines} == {("1", "8"), ("1", "1"), ("3", "8"), ("3", "1")}
    children = {int(i) for _, _, i, _ in lines if i != "rest"}
    assert len(children) == 3
    assert {child % 3 for child in children} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diagram", "nowhere"], "nowhere is neither a run directory nor a network in"),
        (["pie", "RUN"], "pie"),
        (["lengths", "RUN", "RUN"], "lengths takes one run, got 2"),
        (["diagram", "RUN", "--classes", "12"], "classes must be from 0 to 9, got 12"),
        (["diagram", "RUN", "--types", "9"], "types must be from 1 to 3, got 9"),
        (["diagram", "RUN", "--index", "5000"], "--index must be below 1000"),
        (["diagram", "RUN", "--num-children", "5000"], "--num-children must be at most"),
        (["dimensions", "RUN", "--classes", "1", "2"], "--classes of dimensions must be one class"),
        (["dimensions", "RUN", "--classes", "12"], "classes must be from 0 to 9, got 12"),
        (["curves", "mnist_small"], "mnist_small is a network in the package, without records"),
        (["curves", "RUN", "RUN"], "runs must be different directories"),
        (["lengths", "RUN", "--data-dir", "x"], "--data-dir has no effect on data set mnist_5k"),
        (["diagram", "RUN", "--out", "x.doc"], "--out must end in .svg, .png or .pdf"),
    ],
)
def test_draw_names_what_is_wrong(run, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["draw", *(str(run) if a == "RUN" else a for a in arguments)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
