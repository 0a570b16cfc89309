"""What a process sets up before it touches a device: compile cache, simulated devices, debugging switches."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax

from jaxlm.ops.platform import use_kernels
from jaxlm.recipes.roll_call import roll_call


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Settings of the process, not of the run: none of them changes a number that the run computes, but by rounding.

    simulated_devices: that many CPU devices in place of the real ones. debug: see `jaxlm.train.debug`. jit False:
    plain Python stepping, for print and pdb. kernels False: no compiled kernel of token_stats and attention, only what
    XLA makes of them, to see whether one is to blame.
    """

    simulated_devices: int | None = None
    debug: bool = False
    jit: bool = True
    kernels: bool = True


JOIN_TIMEOUT = 300
"""Seconds in which all processes must have joined."""
GOOGLE = "0x1ae0"
"""What PCI devices made by Google say of their vendor."""


def compile_cache_dir() -> Path:
    """Where compiled programs are kept: $JAX_COMPILATION_CACHE_DIR, or jaxlm/xla under the user's cache folder."""
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "jaxlm" / "xla"


# What launchers of one process per host set: JAX's own variable, Slurm's, those of a TPU pod and of several slices.
_SEVERAL = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES")


def several_processes() -> bool:
    """Whether the environment says that this process is one of several.

    JAX_COORDINATOR_ADDRESS is taken as it is; the others count where they name more than one.
    """
    values = {name: os.environ.get(name, "") for name in _SEVERAL}
    if values["JAX_COORDINATOR_ADDRESS"]:
        return True
    hosts = len([host for host in values["TPU_WORKER_HOSTNAMES"].split(",") if host])
    tasks = [int(values[name]) for name in ("SLURM_STEP_NUM_TASKS", "MEGASCALE_NUM_SLICES") if values[name].isdigit()]
    return max([hosts, *tasks]) > 1


def on_tpu(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether this host has TPUs, and JAX is not told to leave them alone.

    A TPU VM's environment does not say of how many hosts it is one: JAX asks the machine's metadata, on joining.
    """
    chosen = str(jax.config.jax_platforms or "")  # type: ignore[attr-defined]
    if chosen and "tpu" not in chosen.split(","):
        return False
    return any(vendor.read_text().strip() == GOOGLE for vendor in devices.glob("*/vendor"))


def join() -> None:
    """Joins the other processes; ValueError if they do not answer or the variables are not whole.

    With JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID are needed too; on Slurm
    and TPUs JAX finds all of it by itself. Where it does not find that there are any others, there are none.
    """
    number, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and not (number and index):
        raise ValueError("JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too")
    if address:
        roll_call(address, number=int(number or 0), index=int(index or 0), timeout_s=JOIN_TIMEOUT)
    explicit = dict(coordinator_address=address, num_processes=int(number or 0), process_id=int(index or 0))
    try:
        jax.distributed.initialize(**(explicit if address else {}), initialization_timeout=JOIN_TIMEOUT)
    except ValueError:
        if several_processes():
            raise
        print("a TPU without a cluster around it: this process is the only one", flush=True)
    except RuntimeError as error:
        raise ValueError(f"not all processes have joined within {JOIN_TIMEOUT} s: {error}") from error


def configure(runtime: Runtime) -> None:
    """Applies the settings, and joins the other processes if there are any; call before the first array is made, since
    devices cannot be added later."""
    if runtime.simulated_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", runtime.simulated_devices)
    # A second start of the same run compiles nothing; below a second it is not worth a file.
    jax.config.update("jax_compilation_cache_dir", str(compile_cache_dir()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_disable_jit", not runtime.jit)
    use_kernels(runtime.kernels)
    jax.config.update("jax_debug_nans", runtime.debug or jax.config.jax_debug_nans)  # type: ignore[attr-defined]
    if several_processes() or on_tpu():
        join()
    # On CPU, a program of several devices that is read back from the cache no longer runs its collectives in one order
    # (jaxlib 0.10.2 and 0.12.0): devices, or processes, meet in different ones and wait until they are killed.
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
