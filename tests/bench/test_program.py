"""Counts read off compiled programs, against counts made by hand and by unrolling."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib.mlir import ir
from jax.sharding import PartitionSpec as P

from capsjax.bench import Collective, read_program
from capsjax.bench.programs.hlo import Module, shape_bytes, stablehlo_opcodes
from capsjax.bench.programs.loops import executions

ADVANCE = ir.WalkResult.ADVANCE
N, TRIPS, INNER = 24, 5, 3
X = jnp.ones((N, N))


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def looped(x, trips=TRIPS):
    return jax.lax.fori_loop(0, trips, lambda _, y: y @ x, x)


def nested(x):
    def body(_, y):
        return jax.lax.fori_loop(0, INNER, lambda _, z: jnp.tanh(z @ x), y) + 1

    return jax.lax.fori_loop(0, TRIPS, body, x)


def unrolled_nested(x):
    y = x
    for _ in range(TRIPS):
        for _ in range(INNER):
            y = jnp.tanh(y @ x)
        y = y + 1
    return y


def test_flops_of_a_loop_are_those_of_all_its_products():
    program = read_program(compiled(looped, X))
    products = TRIPS * 2 * N**3
    assert [loop.trip_count for loop in program.loops] == [TRIPS]
    # Beside the products only the counter is added to and compared.
    assert products <= program.cost.flops <= products + 4 * TRIPS


def test_nested_loops_cost_what_the_unrolled_program_does():
    loops, flat = (read_program(compiled(f, X)) for f in (nested, unrolled_nested))
    assert not flat.loops
    assert sorted(loop.trip_count for loop in loops.loops) == [INNER, TRIPS]
    counters = 4 * (TRIPS + 1) * (INNER + 1)
    assert 0 <= loops.cost.flops - flat.cost.flops <= counters
    assert loops.cost.flops == pytest.approx(TRIPS * (INNER * 2 * N**3 + N**2), abs=counters)
    assert loops.cost.transcendentals == flat.cost.transcendentals == TRIPS * INNER * N**2


def test_the_backward_loop_counts_too():
    def loss(x):
        def body(y, _):
            return y @ x, None

        return jnp.sum(jax.lax.scan(body, x, length=TRIPS)[0])

    cost = read_program(compiled(jax.grad(loss), X)).cost
    # Forward one product a step; backward two.
    assert cost.flops == pytest.approx(3 * TRIPS * 2 * N**3, rel=0.1)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    text = compiled(looped, X, jnp.int32(TRIPS))
    program = read_program(text)
    assert [loop.trip_count for loop in program.loops] == [None]
    assert not program.is_complete
    assert program.cost.flops == pytest.approx(2 * N**3, rel=0.01)


def trip_counts(text):
    return [loop.trip_count for loop in read_program(text).loops]


def counting(first, step, compare):
    """Text of a loop whose trip count has to be worked out, and the count."""
    direction, last = compare

    def cond(carry):
        i, _ = carry
        return {"<": i < last, "<=": i <= last, ">": i > last, ">=": i >= last}[direction]

    def f(x):
        return jax.lax.while_loop(cond, lambda c: (c[0] + step, jnp.sin(c[1])), (first, x))[1]

    trips, i = 0, first
    while eval(f"{i} {direction} {last}"):
        trips, i = trips + 1, i + step
    return compiled(f, X), trips


@pytest.mark.parametrize(
    ("first", "step", "compare"),
    [(0, 1, ("<", 7)), (3, 4, ("<=", 15)), (9, -2, (">", 0)), (9, -3, (">=", 0)), (5, 1, ("<", 2))],
)
def test_trip_counts_that_the_compiler_does_not_print(first, step, compare):
    text, trips = counting(first, step, compare)
    # The TPU's compiler prints none.
    stripped = re.sub(r"backend_config=\{.*known_trip_count.*\}", "", text)
    assert trip_counts(stripped) == ([trips] if trips else [])


# As XLA:CPU compiles a small loop for jax 0.12.
CALLED = """HloModule called, is_scheduled=true

%body (carry: (s32[])) -> (s32[]) {
  %carry = (s32[]) parameter(0)
  %one = s32[] constant(1)
  %before = s32[] get-tuple-element(%carry), index=0
  %after = s32[] add(%before, %one)
  ROOT %carried = (s32[]) tuple(%after)
}

%condition (tested: (s32[])) -> pred[] {
  %tested = (s32[]) parameter(0)
  %last = s32[] constant(7)
  %number = s32[] get-tuple-element(%tested), index=0
  ROOT %less = pred[] compare(%number, %last), direction=LT
}

%loop (given: (s32[])) -> (s32[]) {
  %given = (s32[]) parameter(0)
  ROOT %while = (s32[]) while(%given), condition=%condition, body=%body
}

ENTRY %main (x: f32[]) -> s32[] {
  %x = f32[] parameter(0)
  %zero = s32[] constant(2)
  %start = (s32[]) tuple(%zero)
  %call = (s32[]) call(%start), to_apply=%loop
  ROOT %end = s32[] get-tuple-element(%call), index=0
}
"""


def test_a_loop_in_a_computation_of_its_own_starts_where_its_caller_says():
    assert trip_counts(CALLED) == [5]
    twice = CALLED.replace(
        "  ROOT %end", "  %again = (s32[]) call(%start), to_apply=%loop\n  ROOT %end"
    )
    assert trip_counts(twice) == [None, None]


def test_backward_loops_without_printed_trip_counts():
    def loss(x):
        return jnp.sum(jax.lax.scan(lambda y, _: (jnp.sin(y @ x), None), x, length=TRIPS)[0])

    text = compiled(jax.grad(loss), X)
    known = trip_counts(text)
    assert known == [TRIPS, TRIPS]
    stripped = re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"gone":{}', text)
    assert "known_trip_count" not in stripped
    assert trip_counts(stripped) == known


def test_collectives_count_what_each_device_hands_in():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def f(x):
        def body(y, _):
            return jax.lax.psum(y, "d") * 0.1, None

        y = jax.lax.scan(body, jax.lax.pcast(x[0], "d", to="varying"), length=3)[0]
        return jax.lax.all_gather(y, "d")[None]

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    program = read_program(compiled(mapped, jnp.ones((8, 16, 4))))
    assert program.collectives["all-reduce"] == Collective(3, 3 * 16 * 4 * 4)
    assert program.collectives["all-gather"] == Collective(1, 16 * 4 * 4)


TPU = """HloModule jit_f, is_scheduled=true

FileNames
1 "/home/user/project/model.py"

FunctionNames
1 "layer"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=3 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%fused (p.1: f32[8,128]) -> f32[8,128] {
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %sine.1 = f32[8,128]{1,0:T(8,128)} sine(%p.1)
}

%body (arg.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %arg.1 = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %x.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%arg.1), index=1
  %one.1 = s32[]{:T(128)} constant(1)
  %next.1 = s32[]{:T(128)} add(%i.1, %one.1)
  %fusion.1 = f32[8,128]{1,0:T(8,128)} fusion(%x.1), kind=kLoop, calls=%fused, metadata={op_name="sin" stack_frame_id=1}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %call.1 = f32[8,128]{1,0:T(8,128)} custom-call(%fusion.1), custom_call_target="tpu_custom_call"
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%next.1, %call.1)
}

%condition (arg.2: (s32[], f32[8,128])) -> pred[] {
  %arg.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %last.1 = s32[]{:T(128)} constant(6)
  ROOT %less.1 = pred[]{:T(512)} compare(%i.2, %last.1), direction=LT
}

ENTRY %main (x.2: f32[8,128]) -> f32[8,128] {
  %x.2 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero.1 = s32[]{:T(128)} constant(0)
  %space.1 = f32[8,128]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %none.1 = f32[]{:T(128)} constant(0)
  %wide.1 = f32[16,128]{1,0:T(8,128)S(1)} pad(%x.2, %none.1), padding=0_8x0_0
  %tuple.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero.1, %x.2)
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%tuple.2), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %y.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_cycles_of_a_tpu_count_loops_and_say_what_they_leave_out():
    cycles = read_program(TPU).cycles
    assert cycles.total == 6 * 100
    assert cycles.by_source == {"/home/user/project/model.py:12 (layer)": 600}
    # The cycles of a kernel or a pad are not known, and are not taken for none.
    assert cycles.without_estimate == {"custom-call tpu_custom_call": 6, "pad": 1}
    assert read_program(TPU).custom_calls == {"tpu_custom_call": 6}


def test_other_compilers_estimate_no_cycles():
    assert read_program(compiled(looped, X)).cycles is None


def test_opcodes_and_fusions_are_counted():
    program = read_program(TPU)
    assert program.fusions == {"kLoop": 1}
    assert program.opcodes["get-tuple-element"] == 4
    assert list(program.opcodes.values()) == sorted(program.opcodes.values(), reverse=True)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[3,4]{1,0}", 48),
        ("bf16[]", 2),
        ("(s32[2], (pred[3]{0}, f64[1]))", 19),
        ("s4[10]", 5),
        ("f8e4m3fn[7]", 7),
        ("c64[2]", 16),
        ("token[]", 0),
        ("f32[0,5]", 0),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert shape_bytes(shape) == size


def test_stablehlo_is_counted_as_the_module_holds_it():
    lowered = jax.jit(lambda x: jnp.sum(jnp.sin(x @ x)) + 1).lower(X)
    expected = {}
    lowered.compiler_ir("stablehlo").operation.walk(
        lambda op: expected.__setitem__(op.name, expected.get(op.name, 0) + 1) or ADVANCE
    )
    counted = stablehlo_opcodes(lowered.as_text())
    for name in ("stablehlo.dot_general", "stablehlo.sine", "stablehlo.reduce", "func.func"):
        assert counted[name] == expected[name] >= 1


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="text must be that of an HLO module, got 'module"):
        read_program("module @jit_f {}")
    with pytest.raises(ValueError, match="ENTRY"):
        read_program("HloModule m\n")


def test_sources_are_found_in_a_real_program():
    name = "jax_traceback_in_locations_limit"  # 0 in these tests, which saves time
    limit = getattr(jax.config, name)
    jax.config.update(name, 10)
    try:
        module = Module(compiled(lambda x: jnp.tanh(x @ x).sum(), X))
    finally:
        jax.config.update(name, limit)
    sources = {module.source(each) for each, *_ in executions(module)}
    assert any("test_program.py:" in source for source in sources), sources
    assert np.all([isinstance(source, str) for source in sources])
