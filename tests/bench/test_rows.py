"""Rows: versioned, appended, read back with their types, also after a kill."""

import json

import pytest

from capsjax.bench import (
    Alternation,
    Bound,
    Collective,
    Cost,
    Cycles,
    Deviation,
    Failure,
    Kernel,
    Loop,
    Memory,
    Profile,
    Program,
    Row,
    Run,
    append_rows,
    read_environment,
    read_rows,
)
from capsjax.errors import DataError


def row(cell="a", **fields):
    return Row(cell=cell, workload="squash", parameters={"batch": 2}, target="cpu", **fields)


WHOLE = row(
    xla_flags=("--xla_a=1",),
    stages={"compile": (1.5, 2.0)},
    hlo=Program(
        instructions=3,
        loops=(Loop("while", None), Loop("while", 3)),
        collectives={"all-reduce": Collective(2, 8)},
        cost=Cost(1.0, 2.0, None),
        cycles=Cycles(5.0, {"a.py:1": 5.0}, {"copy-start": 1.0}),
    ),
    memory=Memory(arguments=8, outputs=8),
    run=Run(
        median_seconds=0.2,
        least_seconds=0.1,
        most_seconds=0.3,
        first_seconds=(1.0,),
        medians=(0.2,),
        calls=((0.1, 0.2, 0.3),),
        roofline=Bound(flops_per_second=1e9, bytes_per_second=1e9, seconds=0.1, fraction=0.5),
    ),
    profile=Profile(seconds=0.1, launches=1.5, kernels=(Kernel("k", 0.1, 1.5),)),
    deviation=Deviation(1e-3, 1e-2),
    alternation=Alternation("b", 0.5),
)


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "rows.jsonl"
    failed = row("b", status="failed", error=Failure("compile", "E", "no"))
    append_rows(path, [WHOLE, failed])
    assert read_rows(path) == [WHOLE, failed]
    line = json.loads(path.read_text().splitlines()[0])
    assert (line["schema"], line["version"]) == ("capsjax.bench", 1)


@pytest.mark.parametrize("length", [4, 25, 300])
def test_a_line_that_a_kill_cut_off_is_left_out_and_not_continued(tmp_path, length):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row("a")])
    whole = path.read_text()
    path.write_text(whole + whole[:length])
    assert [each.cell for each in read_rows(path)] == ["a"]
    with pytest.raises(DataError, match=":2 is cut off"):
        read_rows(path, complete=True)
    append_rows(path, [row("b")])
    assert [each.cell for each in read_rows(path)] == ["a", "b"]


def test_a_cell_that_was_measured_again_counts_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row("a", repetitions=1), row("b"), row("a", repetitions=2)])
    assert [(each.cell, each.repetitions) for each in read_rows(path)] == [("a", 2), ("b", 0)]


HEADER = {"schema": "capsjax.bench", "version": 1}
RUN = {**HEADER, "cell": "a", "workload": "squash", "parameters": {}, "target": "cpu"}
DAMAGED = [
    (b"hello", ":2 is not JSON"),
    (b"\xff\xfe", ":2 is not JSON"),
    (b'{"schema": capsjax.bench"}', ":2 is not JSON"),
    (b"[" * 100_000, ":2 is not"),
    (b'{"schema": "capsjax.bench", "x": ' + b"[" * 100_000, ":2 is not a row"),
    (b"[1]", ":2 is not a row of capsjax.bench"),
    (b'{"schema": "other"}', ":2 is not a row of capsjax.bench"),
    (json.dumps({**HEADER, "version": 99}).encode(), ":2 has version 99, this capsjax reads 1"),
    (json.dumps(HEADER).encode(), ":2 .*missing required field `cell`"),
    (json.dumps({**RUN, "stages": {"run": "fast"}}).encode(), ":2 .*Expected `array`"),
    (json.dumps({**RUN, "status": "failed"}).encode(), ":2 .*status is 'failed'"),
]


@pytest.mark.parametrize(("line", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_damaged_files_are_refused_with_the_number_of_the_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row()])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=message) as error:
        read_rows(path)
    assert "\n" not in str(error.value)


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        append_rows(tmp_path / "rows.jsonl", [row(stages={"run": (float("nan"),)})])


def test_the_environment_names_versions_and_machine(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    environment = read_environment()
    assert environment.jax
    assert environment.cpu
    assert "xla_force_host_platform_device_count=8" in environment.xla_flags
    assert environment.glibc_tunables == "glibc.malloc.hugetlb=1"
    assert environment.memory_bytes is None or environment.memory_bytes > 2**28
