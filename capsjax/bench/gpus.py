"""Published figures of GPUs, for which programs can be compiled without having one.

The compiler of the CUDA plugin accepts a description of the chip instead of the chip. The same
figures give the least time of a library's matrix product and of an all-reduce over several GPUs.
"""

import dataclasses
from collections.abc import Mapping

HOST = 8  # GPUs per host, connected by NVLink


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """Published figures of a GPU.

    Attributes:
      name: as CUDA reports it.
      capability: compute capability, such as ``(9, 0)``.
      cores: number of streaming multiprocessors.
      units: float32 units per core.
      shared_bytes: shared memory per core.
      l2_bytes: size of the L2 cache.
      hertz: clock rate.
      memory_bytes: memory of the chip.
      bytes_per_second: bandwidth of this memory.
      cudnn: version of cuDNN that the compiler assumes.
      peaks: operations per second of dense matrix products, by the operands' dtype in HLO;
        ``"tf32"`` is float32 at default precision.
      link_bytes_per_second: bandwidth of NVLink, in one direction.
      network_bytes_per_second: bandwidth of InfiniBand to other hosts, in one direction.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    units: int = 128
    shared_bytes: int = 233472
    l2_bytes: int
    hertz: float
    memory_bytes: int
    bytes_per_second: float
    cudnn: tuple[int, int, int]
    peaks: Mapping[str, float]
    link_bytes_per_second: float
    network_bytes_per_second: float = 5e10

    def peak(self, dtype: str, *, is_precise: bool = False) -> float | None:
        """Returns the peak of dense matrix products, in operations per second.

        Args:
          dtype: dtype of the operands, as in HLO, such as ``"bf16"``.
          is_precise: whether float32 has the highest precision, without TF32.

        Returns:
          The peak, or None if no figure is published.
        """
        return self.peaks.get("tf32" if dtype == "f32" and not is_precise else dtype)

    @property
    def target_config(self) -> str:
        """The chip's description for the compiler, a ``GpuTargetConfigProto`` in text form."""
        major, minor = self.capability
        # Newer chips have instructions that are specific to their capability.
        feature = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        numbers = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "threads_per_core_limit": 2048,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared_bytes,
            "shared_memory_per_block_optin": self.shared_bytes - 1024,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
            "block_dim_limit_x": 2147483647,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "core_count": self.cores,
            "fpus_per_core": self.units,
            "memory_bandwidth": round(self.bytes_per_second),
            "l2_cache_size": self.l2_bytes,
            "clock_rate_ghz": self.hertz / 1e9,
            "device_memory_size": self.memory_bytes,
        }
        lines = "\n".join(f"  {name}: {number}" for name, number in numbers.items())
        cudnn = "major: {} minor: {} patch: {}".format(*self.cudnn)
        return (
            f"gpu_device_info {{\n{lines}\n"
            f"  cuda_compute_capability {{ major: {major} minor: {minor}{feature} }}\n}}\n"
            f'platform_name: "CUDA"\n'
            f"dnn_version_info {{ {cudnn} }}\n"
            "runtime_version { major: 12 minor: 8 patch: 0 }\n"
            f'device_description_str: "{self.name}"\n'
        )


def _peaks(
    f64: float, f32: float, tf32: float, bf16: float, bits8: float, *, f8: bool
) -> dict[str, float]:
    rates = {"f64": f64, "f32": f32, "tf32": tf32, "bf16": bf16, "f16": bf16, "s8": bits8}
    if f8:
        rates |= {"f8e4m3fn": bits8, "f8e5m2": bits8}
    return {dtype: tera * 1e12 for dtype, tera in rates.items()}


# From NVIDIA's data sheets of A100, H100, H200 and HGX B200, without sparsity. The figures of the
# cores for the compiler are from XLA's own descriptions of these chips. Hosts have one InfiniBand
# adapter per GPU: HDR for A100, NDR for the others.
_H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    l2_bytes=52428800,
    hertz=1.98e9,
    memory_bytes=84942979072,
    bytes_per_second=3.35232e12,
    cudnn=(9, 10, 0),
    peaks=_peaks(67, 67, 494.5, 989.5, 1979, f8=True),
    link_bytes_per_second=4.5e11,
)
GPUS = {
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        units=64,
        shared_bytes=167936,
        l2_bytes=41943040,
        hertz=1.41e9,
        memory_bytes=85100068864,
        bytes_per_second=2.03904e12,
        cudnn=(8, 9, 4),
        peaks=_peaks(19.5, 19.5, 156, 312, 624, f8=False),
        link_bytes_per_second=3e11,
        network_bytes_per_second=2.5e10,
    ),
    "h100": _H100,
    "h200": dataclasses.replace(  # more and faster memory
        _H100,
        name="NVIDIA H200 141GB HBM3e",
        memory_bytes=151397597184,
        bytes_per_second=4.8e12,
    ),
    "b200": Gpu(
        name="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        l2_bytes=132644864,
        hertz=1.965e9,
        memory_bytes=191514411008,
        bytes_per_second=7.67232e12,
        cudnn=(9, 7, 0),
        peaks=_peaks(37, 75, 1125, 2250, 4500, f8=True),
        link_bytes_per_second=9e11,
    ),
}


def known_gpu(device_kind: str) -> Gpu | None:
    """Returns the GPU of a present or absent device; None if its figures are not known.

    Example:
      >>> from capsjax.bench.gpus import known_gpu
      >>> known_gpu("NVIDIA H200").capability
      (9, 0)
    """
    found = (gpu for gpu in GPUS.values() if device_kind and gpu.name.startswith(device_kind))
    return next(found, None)
