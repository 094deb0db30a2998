"""To add an algorithm is to add one file: all else reads its record."""

import inspect

import forking
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import capsjax
from capsjax import nn, routing

TOY = '''
import jax
import jax.numpy as jnp

from capsjax import length, routing, squash


def passes(votes, *, pull, where=None):
    """Children turn to the parents that lie in the direction of their votes' first component."""
    votes = votes if where is None else jnp.where(where[..., None, None], votes, 0)

    def update(number, logits):
        return logits + pull * votes[..., 0]

    def finish(number, logits):
        coupling = jax.nn.softmax(logits)
        poses = squash(jnp.sum(coupling[..., None] * votes, axis=-3))
        return routing.Routed(poses, length(poses), coupling), logits

    return routing.Passes(votes, jnp.zeros_like(votes[..., 0]), update, finish)


def toy_routing(votes, *, num_iterations=2, **arguments):
    return passes(votes, **arguments).run(num_iterations)


routing.register(
    routing.Algorithm(
        name="toy",
        function=toy_routing,
        paper="this test",
        passes=passes,
        parameters=lambda sizes: {
            "pull": routing.Parameter((sizes.out_capsules,), jax.nn.initializers.ones)
        },
        options=("num_iterations",),
        squash=squash,
    )
)
'''
USES = """
import sys
from pathlib import Path

import capsjax.training  # an algorithm may be registered later
import toy

import jax, jax.numpy as jnp
from flax import nnx

import capsjax
from capsjax import models, nn
from capsjax.bench import make_workload
from capsjax.cli import main
from capsjax.training import load_network
from capsjax.viz import dissect, routing_diagram

layer = nn.DenseCapsules(6, 4, 3, 5, routing="toy", num_iterations=3, rngs=nnx.Rngs(0))
poses = jax.random.normal(jax.random.key(0), (2, 6, 4))
routed = nnx.jit(layer)(poses)
assert layer.router.pull.shape == (3,)
conv = nn.ConvCapsules(2, 4, 3, 5, kernel_size=2, routing="toy", rngs=nnx.Rngs(0))
assert nnx.eval_shape(conv, jnp.ones((3, 3, 2, 4))).poses.shape == (2, 2, 3, 5)

votes = capsjax.dense_votes(poses, layer.kernel[...])
trace = capsjax.routing_trace(votes, routing="toy", num_iterations=3, pull=jnp.ones(3))
assert jnp.allclose(trace.poses[-1], routed.poses)
assert not jnp.allclose(trace.coupling[0], trace.coupling[1])

sizes = {"batch": 2, "children": 6, "parents": 3}
for loop in ("fori_loop", "scan"):
    workload = make_workload("routing", {"algorithm": "toy", "loop": loop, **sizes})
    built = workload.build(jax.devices()[:1])
    arguments = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), built.arguments)
    assert jax.eval_shape(built.function, *arguments).shape == (2, 3, 16)

run = Path(sys.argv[1])
main(["train", "--routing", "toy", "--num-iterations", "2", "--steps", "1", "--validation", "0",
      "--batch-size", "100", "--driver", "jit", "--run-dir", str(run),
      "--override", "conv_features=8", "primary_types=1", "decoder_features=8"])
loaded = load_network(run)
assert loaded.network.config.routing == "toy"
anatomy = dissect(loaded.network, jnp.ones((28, 28, 1)))
figure = routing_diagram(anatomy.trace, votes=anatomy.votes, routing="toy")
figure.savefig(run / "diagram.svg")
main(["train", "--routing", "toys"])
"""


def test_an_algorithm_in_one_file_is_known_everywhere(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    done = forking.run("-c", USES, "run", folder=tmp_path)
    # Its last line asks for an algorithm that there is not.
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert "--routing must be one of attention, dynamic, " in error
    assert "variational, toy, or one that your program has registered, got 'toys'" in error
    assert (tmp_path / "run" / "diagram.svg").stat().st_size > 10_000


def test_a_name_is_registered_once():
    record = routing.Algorithm(name="once", function=capsjax.kmeans_routing, paper="")
    routing.register(record)
    try:
        with pytest.raises(ValueError, match="'once' is already registered"):
            routing.register(record)
    finally:
        routing.unregister("once")
    assert "once" not in routing.algorithms()


@pytest.fixture
def register():
    """Registers algorithms for one test."""
    names = []

    def register(**fields):
        names.append(routing.register(routing.Algorithm(paper="", **fields)).name)

    yield register
    for name in names:
        routing.unregister(name)


def taking(*names, **fields):
    """Fields of an algorithm with these learned parameters."""
    parameter = routing.Parameter((), jax.nn.initializers.zeros)
    return {"parameters": lambda sizes: dict.fromkeys(names, parameter), **fields}


UNUSABLE = {
    "no name": ({"name": ""}, ValueError, "name must be a string that is not empty, got ''"),
    "number": ({"name": 1}, ValueError, "name must be a string that is not empty, got 1"),
    "function": ({"function": None}, TypeError, "function must be a function, got None"),
    "parameters": ({"parameters": {}}, TypeError, "parameters must be a function, got {}"),
    "fused": ({"fused": "yes"}, TypeError, "fused must be a function, got 'yes'"),
    "string": ({"options": "scale"}, TypeError, "options must be a tuple of names, got 'scale'"),
    "set": ({"options": {1}}, TypeError, "options must be a tuple of names, got {1}"),
    "not a dict": ({"parameters": lambda _: None}, TypeError, "return a dict, got NoneType"),
    "where": (taking("where"), ValueError, "'own' has parameter 'where', a name that layers use"),
    "options": (taking("options"), ValueError, "parameter 'options', a name that layers use"),
    "kernel": (taking("kernel"), ValueError, "parameter 'kernel', a name that layers use"),
    "dtype": ({"options": ("dtype",)}, ValueError, "option 'dtype', a name that layers use"),
    "both": (taking("a", options=("a",)), ValueError, "'a', a name that its parameters may use"),
    "initialiser": (taking(options=("a_init",)), ValueError, "option 'a_init', a name that its"),
}


@pytest.mark.parametrize(("fields", "error", "match"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_layers_cannot_use_is_not_registered(fields, error, match, register):
    with pytest.raises(error, match=match):
        register(**{"name": "own", "function": capsjax.kmeans_routing, **fields})
    assert "own" not in routing.algorithms()


@pytest.mark.parametrize("record", [None, {}, "em"])
def test_only_records_are_registered(record):
    with pytest.raises(TypeError, match=r"record must be a capsjax.routing.Algorithm, got "):
        routing.register(record)
    with pytest.raises(ValueError, match="name must be one of .*em, .* got 'nope'"):
        routing.unregister("nope")


@pytest.mark.parametrize("name", ["Dense", "Conv", "Grid", "MatrixConv", "MatrixGrid"])
def test_no_algorithm_takes_the_name_of_an_argument_of_a_layer(name, register):
    layer = getattr(nn, f"{name}Capsules")
    for method in (layer.__init__, layer.__call__):
        for argument in list(inspect.signature(method).parameters):
            with pytest.raises(ValueError, match="a name that layers use"):
                register(name="own", function=layer, options=(argument,))


def test_no_parameter_takes_the_name_of_an_attribute_of_a_router(register):
    router = nn.DenseCapsules(6, 4, 3, 8, rngs=nnx.Rngs(0)).router
    for attribute in (name for name in vars(router) if not name.startswith("_")):
        with pytest.raises(ValueError, match="a name that layers use"):
            register(name="own", function=capsjax.kmeans_routing, **taking(attribute))


RESULTS = {
    "an array": (lambda v: v.sum(-3), TypeError, "must return a capsjax.Routed, got "),
    "a tuple": (lambda v: (v.sum(-3), v[..., 0, :, 0], None), TypeError, "Routed, got tuple"),
    "nothing": (lambda v: None, TypeError, "Routed, got NoneType"),
    "no activations": (
        lambda v: routing.Routed(v.sum(-3), None, None),
        TypeError,
        "activations of routing 'own' must be an array, got None",
    ),
    "children": (
        lambda v: routing.Routed(v.sum(-2), v[..., 0, :, 0], None),
        ValueError,
        r"poses of routing 'own' must have shape \[..., J, D\] = \(.*, 3, 8\), got \(.*, 8\)",
    ),
    "one axis too many": (
        lambda v: routing.Routed(v.sum(-3), v[..., 0, :, :1], None),
        ValueError,
        r"activations of routing 'own' must have shape \[..., J\] = \(.*, 3\), got \(.*, 3, 1\)",
    ),
}


@pytest.mark.parametrize(("result", "error", "match"), RESULTS.values(), ids=RESULTS)
def test_what_an_algorithm_returns_to_a_layer_is_checked(result, error, match, register):
    register(name="own", function=lambda votes, *, where=None: result(votes))
    dense = nn.DenseCapsules(6, 4, 3, 8, routing="own", rngs=nnx.Rngs(0))
    conv = nn.ConvCapsules(2, 4, 3, 8, kernel_size=2, routing="own", rngs=nnx.Rngs(0))
    grid = nn.GridCapsules(2, 4, 3, 8, routing="own", rngs=nnx.Rngs(0))
    for layer, shape in ((dense, (5, 6, 4)), (conv, (5, 3, 3, 2, 4)), (grid, (5, 3, 3, 2, 4))):
        with pytest.raises(error, match=match):
            nnx.eval_shape(layer, jnp.ones(shape))


def test_what_an_algorithm_fuses_is_checked(register):
    def fused(poses, weights, **options):
        return routing.Routed(jnp.einsum("...ik,ikjd->...ijd", poses, weights), poses, None)

    register(name="own", function=capsjax.kmeans_routing, fused=fused)
    layer = nn.DenseCapsules(6, 4, 3, 8, routing="own", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"poses of routing 'own' .*, got \(5, 6, 3, 8\)"):
        nnx.eval_shape(layer, jnp.ones((5, 6, 4)))


@pytest.mark.parametrize("name", routing.algorithms())
def test_a_record_says_what_its_function_takes(name):
    """The function runs with what the record lists, and with nothing else."""
    record = routing.algorithm(name)
    sizes = routing.Sizes(6, 4, 3, 5)
    poses = jnp.linspace(-1, 1, 48).reshape(2, 6, 4)
    weights = jnp.linspace(-1, 1, 360).reshape(sizes)
    votes = None if record.makes_votes else capsjax.dense_votes(poses, weights)
    given = {n: jnp.ones(p.shape) for n, p in record.parameters(sizes).items()}
    if record.has_bias:
        given["bias"] = jnp.ones((3, 5))
    if record.iterates:
        given["num_iterations"] = 2
    children = routing.Children(poses, where=jnp.arange(6) > 0)
    routed = jax.jit(lambda: record.route(votes, children, given))()
    assert (routed.poses.shape, routed.activations.shape) == ((2, 3, 5), (2, 3))
    if record.squash is not None:
        lengths = capsjax.length(routed.poses)
        assert jnp.allclose(routed.activations, lengths, atol=1e-6)
    assert (record.passes is not None) <= record.iterates
    unknown = {**given, "temperature": 1.0}
    with pytest.raises(TypeError, match="temperature"):
        record.route(votes, children, unknown)
