"""What tests of measurements share."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from capsjax.bench import environment
from capsjax.bench.processes import runner
from capsjax.bench.processes.roofline import Roofline

CACHE = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True, scope="session")
def of_one_commit():
    """Rows are of one commit, whatever happens to the clone during the tests."""
    commit = environment._commit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "_commit", lambda: commit)
        yield


@pytest.fixture
def in_this_process(monkeypatch):
    """Measures in the process of the test, which saves starting others."""

    def call(function, argument, environment, timeout):
        is_roofline = function is runner._measure_roofline
        return Roofline(1e10, 1e10) if is_roofline else function(argument)

    monkeypatch.setattr(runner, "_call", call)
    kept = {name: getattr(jax.config, name) for name in CACHE}
    yield
    for name, value in kept.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
