"""Two files beside each other: pairs, intervals, exit codes."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from capsjax.bench import (
    Cost,
    Estimate,
    Failure,
    Kernels,
    Program,
    Row,
    append_rows,
    compare_rows,
)
from capsjax.cli import main


def row(cell="squash @ cpu", compiled=(1.0, 1.1, 0.9), flops=100.0, flags=(), failed=False):
    return Row(
        cell=cell + "".join(f" {flag}" for flag in flags),
        workload="squash",
        parameters={},
        target="cpu",
        xla_flags=tuple(flags),
        status="failed" if failed else "ok",
        error=Failure("compile", "E", "no") if failed else None,
        stages={"compile": tuple(compiled)},
        hlo=Program(cost=Cost(flops)),
        repetitions=len(compiled),
    )


def ratios(old, new):
    return {r.measure: r for r in compare_rows(old, new).ratios}


def test_the_interval_is_welch_s_of_the_logarithms():
    old, new = (1.0, 1.1, 0.9, 1.05), (1.5, 1.7, 1.6)
    found = ratios([row(compiled=old)], [row(compiled=new)])["compile"]
    expected = stats.ttest_ind(np.log(new), np.log(old), equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], np.exp(expected), rtol=1e-9)
    assert found.ratio == pytest.approx(np.exp(np.mean(np.log(new)) - np.mean(np.log(old))))
    assert found.is_worse(1.1)
    assert not found.is_worse(2.0)


def test_noise_is_not_worse_and_one_repetition_is_not_judged():
    noisy = ratios([row(compiled=(1.0, 2.0))], [row(compiled=(1.2, 2.4))])["compile"]
    assert not noisy.is_worse(1.1)
    single = ratios([row(compiled=(1.0,))], [row(compiled=(9.0,))])["compile"]
    assert single.low is None
    assert not single.is_worse(1.1)


def test_counts_are_exact():
    found = ratios([row(flops=100)], [row(flops=120)])["flops"]
    assert (found.ratio, found.low) == (1.2, 1.2)
    assert found.is_worse(1.1)


def test_cells_pair_across_flags_unless_flags_were_swept():
    flag = ("--xla_x=true",)
    assert ratios([row()], [row(flags=flag)])
    swept = [row(), row(flags=flag)]
    comparison = compare_rows(swept, swept)
    assert len({r.cell for r in comparison.ratios}) == 2


def test_what_only_one_file_holds_and_what_fails_now():
    comparison = compare_rows(
        [row(), row("a @ cpu"), row("b @ cpu")],
        [row(), row("a @ cpu", failed=True), row("c @ cpu")],
    )
    assert comparison.broken == ("a @ cpu",)
    assert comparison.only_old == ("b @ cpu",)
    assert comparison.only_new == ("c @ cpu",)


def write(path, *rows):
    append_rows(path, rows)
    return str(path)


def test_the_command_s_exit_code_tells(tmp_path, capsys):
    old = write(tmp_path / "old.jsonl", row())
    slower = write(tmp_path / "slower.jsonl", row(compiled=(2.0, 2.1, 1.9)))
    main(["bench", "compare", old, old])
    assert "1 cells in both; 0 measures worse than 1.1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["bench", "compare", old, slower])
    assert done.value.code == 3
    assert "worse" in capsys.readouterr().out
    main(["bench", "compare", old, slower, "--threshold", "3"])
    main(["bench", "compare", old, slower, "--measure", "flops"])
    broken = write(tmp_path / "broken.jsonl", row(failed=True))
    with pytest.raises(SystemExit) as done:
        main(["bench", "compare", old, broken])
    assert done.value.code == 3
    assert "now fails: squash @ cpu" in capsys.readouterr().out


def test_all_that_is_worse_is_shown_in_its_unit(tmp_path, capsys):
    def estimated(seconds, *compiled):
        kernels = Kernels({"fusion": 1.0}, seconds=Estimate(seconds))
        program = Program(cost=Cost(100.0), kernels=kernels)
        return dataclasses.replace(row(compiled=compiled), hlo=program)

    old = write(tmp_path / "old.jsonl", estimated(1.25e-3, 12e-6, 12e-6))
    new = write(tmp_path / "new.jsonl", estimated(1.2625e-3, 36e-6, 36e-6))
    with pytest.raises(SystemExit) as done:
        main(["bench", "compare", old, new, "--threshold", "1.005"])
    assert done.value.code == 3
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("1.250 ms", "1.262 ms", "1.2e-05 s", "3.6e-05 s", "2 measures worse"):
        assert text in shown


def test_bad_files_are_one_line(tmp_path, capsys):
    old = write(tmp_path / "old.jsonl", row())
    other = write(tmp_path / "other.jsonl", row("else @ cpu"))
    text = tmp_path / "text.jsonl"
    text.write_text("hello\n")
    newer = tmp_path / "newer.jsonl"
    newer.write_text(json.dumps({"schema": "capsjax.bench", "version": 99}) + "\n")
    cut = tmp_path / "cut.jsonl"
    cut.write_text(Path(old).read_text()[:-30])
    for arguments, code, message in (
        ([old, other], 2, "have no cell in common"),
        ([old, str(text)], 2, "text.jsonl"),
        ([old, str(newer)], 2, "99"),
        ([old, str(cut)], 2, "cut.jsonl:1 is cut off; --resume --output"),
        ([old, str(tmp_path / "none.jsonl")], 1, "none.jsonl"),
        ([old, str(tmp_path)], 1, f"Is a directory: {tmp_path}"),
        ([old, old, "--measure", "beauty"], 2, "--measure must be among .*, got beauty"),
        ([old, old, "--threshold", "nan"], 2, "--threshold must be finite and positive, got nan"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["bench", "compare", *arguments])
        assert done.value.code == code
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        assert re.search(message, error), error
