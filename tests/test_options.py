"""Options given in Python are checked like those of the command line."""

from pathlib import Path

import numpy as np
import pytest

from capsjax.bench.config import BenchConfig, CompareConfig
from capsjax.errors import ConfigError
from capsjax.reproduce import ReproduceConfig
from capsjax.training import EvaluateConfig, ExportConfig, PredictConfig, TrainConfig
from capsjax.viz.draw import DrawConfig
from capsjax.viz.explorer import ExploreConfig

RUN = Path("mnist_small")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ReproduceConfig, {"table": "nope"}, "--table must be one of mnist, .*, got 'nope'"),
        (ReproduceConfig, {"table": "small", "seeds": "3"}, "--seeds must be an integer, got '3'"),
        (ReproduceConfig, {"table": "small", "dtype": "f16"}, "--dtype must be one of float32, bf"),
        (
            ReproduceConfig,
            {"table": "small", "list": True, "seeds": 4},
            "--seeds has no effect with --list, which trains nothing",
        ),
        (DrawConfig, {"name": "nope", "runs": (RUN,)}, "--name must be one of diagram, .*'nope'"),
        (DrawConfig, {"name": "curves", "runs": "a"}, "--runs must be a tuple of paths, got 'a'"),
        (DrawConfig, {"name": "curves", "runs": (RUN,), "index": 3}, "--index has no effect on cu"),
        (ExploreConfig, {"run": 3}, "--run must be a path, got 3"),
        (
            ExploreConfig,
            {"run": RUN, "port": 1, "export": "x.html"},
            "--port has no effect with --",
        ),
        (ExploreConfig, {"run": RUN, "examples": [1]}, "--examples has no effect without --export"),
        (BenchConfig, {"suite": "nope"}, "--suite must be one of quick, .*, got 'nope'"),
        (BenchConfig, {"target": "cpu"}, "--target must be a tuple of strings, got 'cpu'"),
        (BenchConfig, {"repetitions": 0}, "--repetitions must be at least 1, got 0"),
        (BenchConfig, {"timeout": float("nan")}, "--timeout must be finite and positive, got nan"),
        (CompareConfig, {"old": "a", "new": 3}, "--new must be a path, got 3"),
        (CompareConfig, {"old": "a", "new": "b", "threshold": 0}, "--threshold must be finite and"),
        (TrainConfig, {"freeze": "conv"}, "--freeze must be a tuple of strings, got 'conv'"),
        (
            EvaluateConfig,
            {"run_dir": RUN, "driver": "tpu"},
            "--driver must be one of .*, got 'tpu'",
        ),
        (PredictConfig, {"run_dir": RUN, "images": "a"}, "--images must be a tuple of paths, got"),
        (
            ExportConfig,
            {"run_dir": RUN, "out": "out", "platforms": ("gpu",)},
            r"--platforms must be a tuple of cpu, cuda, rocm, tpu, got \('gpu',\)",
        ),
    ],
)
def test_a_wrong_option_is_named(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(**options)


def test_numbers_may_be_those_of_numpy():
    assert BenchConfig(repetitions=np.int64(3), run_seconds=np.float64(0.25)).repetitions == 3
    explored = ExploreConfig(run=RUN, export="x.html", examples=tuple(np.arange(2)))
    assert explored.examples == (0, 1)
    assert DrawConfig(name="lengths", runs=(RUN,), index=np.argmax([0, 1])).index == 1
    assert ReproduceConfig(table="small", seeds=np.int64(2)).seeds == 2
    with pytest.raises(ConfigError, match="--seeds must be an integer, got array"):
        ReproduceConfig(table="small", seeds=np.arange(2))


def test_texts_become_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    compared = CompareConfig(old="~/a", new="b")
    assert (compared.old, compared.new) == (Path("/home/of/somebody/a"), Path("b"))
    assert DrawConfig(name="curves", runs=["~/run"]).runs == (Path("/home/of/somebody/run"),)
