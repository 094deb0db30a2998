"""What a run says it takes before it begins: memory from shapes, time from its first seconds."""

import io

import jax
import optax
import pytest
from rich.console import Console

from capsjax import machine, models
from capsjax.training import Memory, estimate_memory, make_driver
from capsjax.training import memory as module
from capsjax.training.reporting import Report


def test_memory_is_that_of_parameters_and_of_what_the_backward_pass_needs(tiny):
    one, four = (
        estimate_memory(tiny, make_driver("jit"), batch_size=batch, examples=100)
        for batch in (1, 4)
    )
    # Adam keeps two moments and counts its steps.
    assert one.state == one.num_parameters * 16 + 4
    assert one.state == four.state
    assert 3 < four.activations / one.activations < 4.1
    assert one.total == one.state + one.activations + 100
    assert one.fits
    plain = estimate_memory(tiny, make_driver("jit"), batch_size=1, optimizer=optax.sgd(0.1))
    assert plain.state == one.num_parameters * 8
    # Two devices of a CPU have copies of all but the batch.
    two = estimate_memory(
        tiny,
        make_driver("pmap", devices=jax.devices()[:2]),
        batch_size=2,
        examples=100,
        num_seeds=3,
    )
    assert (two.state, two.activations, two.examples) == (
        6 * one.state,
        6 * one.activations,
        200,
    )


def test_a_network_that_does_not_fit_is_said_before_it_is_built(monkeypatch):
    model = models.configure("small", image_shape=(200, 200, 3), decoder_features=())
    monkeypatch.setattr(module, "machine_memory", lambda: 10**9)
    memory = estimate_memory(model, make_driver("jit"), batch_size=8)
    assert memory.num_parameters > 80e6
    assert not memory.fits
    line, warning = str(memory).splitlines()
    assert line.startswith(f"{memory.num_parameters:,} parameters; training takes about")
    assert "of 1.00 GB of memory, estimated from shapes" in line
    assert "warning: this does not fit" in warning


def test_an_unknown_limit_is_not_compared():
    memory = Memory(10, 160, 100, 50, None)
    assert memory.fits
    assert len(str(memory).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "expected"), [("max\n", 2**40), ("1000\n", 1000), (None, 2**40)]
)
def test_the_memory_of_a_machine_is_that_of_its_container(content, expected, tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    if content is not None:
        limit.write_text(content)
    monkeypatch.setattr(machine, "_CGROUP", limit)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 2**20)
    assert machine.machine_memory() == expected


def test_the_whole_time_is_said_once_and_without_the_compilation():
    text = io.StringIO()
    report = Report(
        [], total_steps=9400, step=20, tensorboard=False, console=Console(file=text, width=200)
    )
    for number, seconds in ((1, 500.0), (1, 1.5), (3, 2.85), (5, 100.0)):
        report.measure(number, seconds)
    assert text.getvalue() == "training: about 2 h 50 min for 9,380 steps\n"
