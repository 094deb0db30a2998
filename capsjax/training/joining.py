"""Joins processes, each with its own devices, by ``jax.distributed``."""

import dataclasses
import os
import socket
import time

import jax

from capsjax.errors import ConfigError
from capsjax.options import require, require_at_least
from capsjax.training import processes, runtime_log
from capsjax.version import __version__


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """How several processes train as one.

    JAX detects TPU VMs, GKE, SLURM, Open MPI and Kubernetes, where no option is needed.
    """

    coordinator: str | None = None
    """HOST:PORT where the other processes reach process 0; also CAPSJAX_COORDINATOR. Needed only
    where JAX detects no cluster."""

    num_processes: int | None = None
    """Number of processes; also CAPSJAX_NUM_PROCESSES. 1 trains in this process alone, even if JAX
    detects a cluster."""

    process_id: int | None = None
    """Index of this process, from 0; also CAPSJAX_PROCESS_ID."""

    heartbeat_timeout: int = 60
    """Seconds of silence after which a process counts as lost and the others end."""

    start_timeout: int = 40
    """Seconds that processes wait for each other at the start."""

    def __post_init__(self) -> None:
        """Checks the options, and completes them from the environment."""
        for name, kind in (("coordinator", str), ("num_processes", int), ("process_id", int)):
            variable = f"CAPSJAX_{name.upper()}"
            if getattr(self, name) is None and (text := os.environ.get(variable)):
                try:
                    object.__setattr__(self, name, kind(text))
                except ValueError:
                    raise ConfigError(f"{variable} must be an integer, got {text!r}") from None
        require_at_least(self, 1, "num_processes", "heartbeat_timeout", "start_timeout")
        require_at_least(self, 0, "process_id")
        values = (self.coordinator, self.num_processes, self.process_id)
        if self.num_processes == 1:
            return
        if any(value is not None for value in values) and None in values:
            names = ("--coordinator", "--num-processes", "--process-id")
            missing = [n for n, value in zip(names, values, strict=True) if value is None]
            raise ConfigError(f"several processes need {' and '.join(missing)} too")
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            known = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
            require(self, "coordinator", known, "HOST:PORT")
        if self.process_id is not None and self.num_processes is not None:
            below = self.process_id < self.num_processes
            require(self, "process_id", below, f"below --num-processes {self.num_processes}")

    @property
    def are_alone(self) -> bool:
        """Whether these options say that this process trains alone."""
        return self.num_processes == 1


_ALONE = "--num-processes 1 trains in this process alone"


def initialize(options: ProcessOptions | None = None, *, command: str | None = None) -> bool:
    """Joins this process with the others. Call it before JAX's devices are used.

    Does nothing if the processes are already joined, or if JAX detects no cluster and the options
    name no processes.

    Args:
      options: the options; taken from the environment when None.
      command: name of the command that this process runs. If given, one line replaces what JAX's
        runtime logs when it ends the process. This redirects the standard streams.

    Returns:
      Whether several processes are joined.

    Raises:
      ConfigError: an option is invalid, process 0 cannot be reached, or the processes were started
        with different options.
      ProcessError: a process does not answer.

    Example:
      >>> from capsjax.training import ProcessOptions, initialize
      >>> initialize(ProcessOptions(num_processes=1))
      False
    """
    options = options or ProcessOptions()
    if options.are_alone or jax.distributed.is_initialized():
        return processes.number() > 1
    if options.coordinator is None and not _detects_cluster():
        return False
    if command is not None:
        fields = (options.process_id, options.num_processes)
        times = (options.heartbeat_timeout, options.start_timeout)
        runtime_log.start(runtime_log.Job(command, *fields, *times))
    _reach(options)
    # The training loop handles signals: its processes agree on the step to end at.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            cluster_detection_method=None if options.coordinator is None else "deactivate",
            initialization_timeout=options.start_timeout,
            heartbeat_timeout_seconds=options.heartbeat_timeout,
        )
    except Exception as error:  # JAX and its cluster detection raise many kinds
        reason = str(error)
        if "Failed to start RPC server" in reason:
            reason = "the coordinator's port is in use; JAX_COORDINATOR_PORT sets another"
        raise ConfigError(f"processes cannot be joined: {reason}; {_ALONE}") from error
    processes.know(command or "capsjax", options.heartbeat_timeout)
    if processes.number() == 1:
        return False
    versions = {"capsjax": __version__, "jax": jax.__version__}
    processes.check_alike(
        {"command": command, "--num-processes": processes.number(), **versions}, what="start"
    )
    return True


def _detects_cluster() -> bool:
    """Whether JAX will detect a cluster. It has no public function for this."""
    from jax._src.clusters import ClusterEnv

    kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
    if "JOB_COMPLETION_INDEX" not in os.environ:  # a single pod, not one of an indexed job
        kinds = [kind for kind in kinds if kind.__name__ != "K8sCluster"]
    try:
        return any(kind.is_env_present() for kind in kinds)
    except Exception as error:  # cluster detection raises many kinds
        raise ConfigError(f"the cluster cannot be detected: {error}; {_ALONE}") from error


def describe() -> str:
    """Describes this process, its host and its devices."""
    local, every = jax.local_devices(), jax.devices()
    process = f"process {processes.index()} of {processes.number()} on {socket.gethostname()}"
    return f"{process}: {len(local)} of {len(every)} {local[0].platform} devices"


def finish() -> None:
    """Waits for the other processes and disconnects from them."""
    processes.wait_for_all("capsjax/end")
    jax.distributed.shutdown()


def _reach(options: ProcessOptions) -> None:
    """Waits until process 0 accepts connections; in process 0, checks that it can."""
    if options.coordinator is None:
        return
    host, _, port = options.coordinator.rpartition(":")
    if options.process_id == 0:
        # JAX would share the port with another job, whose processes would then join this one.
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", int(port)))
            except OSError as error:
                raise ConfigError(
                    f"the port of --coordinator {options.coordinator} cannot be used:"
                    f" {error.strerror}; each job needs its own port"
                ) from None
        return
    end, reason = time.monotonic() + options.start_timeout, ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    raise ConfigError(
        f"process {options.process_id} cannot reach process 0 at --coordinator"
        f" {options.coordinator} within {options.start_timeout} s: {reason}"
    )
