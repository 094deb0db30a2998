import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capsjax.bench import RoutingSizes, Times, alternate


def test_ratios_are_of_pairs():
    # The machine became ten times slower after the first round; the programs' ratio stayed.
    fast, slow = Times((1.0, 10.0, 12.0)), Times((2.0, 20.0, 24.0))
    assert slow.ratio(fast) == 2.0
    assert fast.median == 10.0
    assert fast.spread == (1.0, 12.0)


def test_programs_run_in_turn_after_a_call_that_is_not_counted():
    calls = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert "".join(calls) == "ab" + "abab"
    assert {name: len(each.seconds) for name, each in times.items()} == {"a": 2, "b": 2}


def test_times_are_seconds():
    (sleep,) = alternate({"sleep": lambda: time.sleep(0.02)}, rounds=2).values()
    assert min(sleep.seconds) >= 0.02


def test_no_rounds_are_named():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        alternate({}, rounds=0)
    with pytest.raises(ValueError, match="children must be at least 1, got 0"):
        RoutingSizes(children=0)


def test_the_script_prints_a_table_and_writes_the_rows(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "benchmark_routing.py"
    command = [
        sys.executable,
        str(script),
        "--batch",
        "2",
        "--children",
        "32",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "rows.jsonl"),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=180, check=True
    )
    assert "2 examples, 32 children of 8 to 10 parents of 16" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert "pallas_tpu: implementation 'pallas_tpu' is for tpu only" in done.stdout
    for record in records:
        assert record["children"] == 32
        if record["name"].startswith("pallas"):
            assert "only, the program is compiled for cpu" in record["reason"]
        else:
            assert f"{1e3 * record['times']['seconds'][0]:.1f}" in done.stdout
            assert record["ratio"] > 0
    lost = subprocess.run(
        [*command[:-1], str(tmp_path / "none" / "rows.jsonl")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert lost.returncode == 1
    assert lost.stderr.splitlines() == [
        f"benchmark_routing.py: error: --json: no directory {tmp_path / 'none'}"
    ]
    assert [record["name"] for record in records] == [
        "reference",
        "blocked",
        "pallas_tpu",
        "pallas_gpu",
    ] * 2
