"""Names of targets, what this machine cannot serve, and who may use libtpu."""

import importlib.util
import tempfile
import threading

import pytest

from capsjax.bench import GPUS, libtpu_lock, parse_target
from capsjax.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v4-32", "v4:2x2x4"),
        ("v5e-1", "v5e:1x1"),
        ("v5e-8", "v5e:2x4"),
        ("v5litepod-8", "v5e:2x4"),
        ("v5e-256", "v5e:16x16"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-2048", "v5p:8x8x16"),
        ("v6e-8", "v6e:2x4"),
        ("v6e-256", "v6e:16x16"),
        ("tpu7x-8", "tpu7x:2x2x1"),
    ],
)
def test_names_that_people_use(name, topology):
    target = parse_target(name)
    assert target.topology == topology
    assert target.is_absent
    assert target.environment["JAX_PLATFORMS"] == "cpu"


def test_slices_of_a_pod():
    pod = parse_target("v5p-128")
    assert (pod.generation, pod.shape, pod.chips) == ("v5p", (4, 4, 4), 64)
    assert (pod.resized(8).name, pod.resized(8).shape) == ("v5p-16", (2, 2, 2))
    with pytest.raises(ConfigError, match="a v5p does not come as 'v5p-6'"):
        pod.resized(3)
    assert (parse_target("cpu:8").shape, parse_target("cpu:8").chips) == ((), 1)


@pytest.mark.parametrize(
    ("name", "topology", "chips"),
    [("a100", "a100:1x1", 1), ("h100:8", "h100:1x8", 8), ("b200:16", "b200:2x8", 16)],
)
def test_gpus_that_are_not_here(name, topology, chips):
    target = parse_target(name)
    assert (target.platform, target.topology, target.chips) == ("gpu", topology, chips)
    assert target.environment == {"JAX_PLATFORMS": "cpu"}
    assert "--xla_gpu_autotune_level=0" in target.xla_flags
    assert target.resized(8).shape == (1, 8)
    assert parse_target("gpu").xla_flags == ()


def test_a_gpu_is_described_to_its_compiler():
    text = GPUS["h200"].target_config
    for line in (
        "  core_count: 132",
        "  memory_bandwidth: 4800000000000",
        "  shared_memory_per_block_optin: 232448",
        "  clock_rate_ghz: 1.98",
        "  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }",
        "dnn_version_info { major: 9 minor: 10 patch: 0 }",
        'device_description_str: "NVIDIA H200 141GB HBM3e"',
    ):
        assert f"{line}\n" in text
    assert "{ major: 8 minor: 0 }" in GPUS["a100"].target_config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9-8", "generation v4, v5e, v5p, v6e, tpu7x, or a GPU such as a100, .* got 'v9-8'"),
        ("v5e", "target must be like cpu, .*, got 'v5e'"),
        ("cpu:0", "got 'cpu:0'"),
        ("v5e-3", "a v5e does not come as 'v5e-3'; try v5e-1, v5e-4"),
        ("v4-31", "a v4 does not come as 'v4-31'; try v4-2, v4-8"),
        ("v5e-512", "does not come as 'v5e-512'"),
        ("h100:12", "must have 1 to 8 GPUs, or hosts of 8 each, got 'h100:12'"),
        ("h100-8", "or a GPU such as a100, h100, h200, b200 or h100:8, got 'h100-8'"),
        ("v100", "target must be like cpu, .* h200:8, b200:16, got 'v100'"),
    ],
)
def test_bad_names_suggest_good_ones(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_target(name)


def test_devices_of_this_machine():
    assert len(parse_target("cpu:8").devices()) == 8
    assert len(parse_target("cpu").devices()) == 1
    assert parse_target("cpu:8").xla_flags == ("--xla_force_host_platform_device_count=8",)
    with pytest.raises(ConfigError, match="'cpu:9' needs 9 devices, this machine has 8"):
        parse_target("cpu:9").devices()


def test_a_gpu_that_is_not_there_is_one_line_with_what_to_install():
    with pytest.raises(ConfigError, match=r"needs a GPU .* pip install .*\[cuda\]") as error:
        parse_target("gpu").devices()
    assert "\n" not in str(error.value)


def test_a_tpu_without_its_compiler_is_one_line_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'v5e-8' needs the TPU compiler.*\[tpu\]"):
        parse_target("v5e-8").devices()


def test_a_gpu_without_its_compiler_is_one_line_with_what_to_install(monkeypatch):
    def missing(**options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(ConfigError, match=r"'h100:8' needs the GPU compiler.*\[cuda\]") as error:
        parse_target("h100:8").devices()
    assert "\n" not in str(error.value)


def test_the_second_waits_for_the_first(tmp_path, monkeypatch):
    # The lock is of open files, not of processes: a thread stands for another process.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with libtpu_lock():
            entered.set()
            leave.wait()

    other = threading.Thread(target=hold)
    other.start()
    assert entered.wait(60)
    try:
        message = "another process has been using libtpu"
        with pytest.raises(ConfigError, match=message), libtpu_lock(timeout=0):
            pass
    finally:
        leave.set()
    with libtpu_lock():
        other.join()
