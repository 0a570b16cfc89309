"""What a process sets up before it touches a device: compile cache, simulated devices, debugging switches."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Settings of the process, not of the run: none of them changes a number that the run computes.

    simulated_devices: that many CPU devices in place of the real ones. debug: see `jaxlm.train.debug`. jit False:
    plain Python stepping, for print and pdb.
    """

    simulated_devices: int | None = None
    debug: bool = False
    jit: bool = True


def compile_cache_dir() -> Path:
    """Where compiled programs are kept: $JAX_COMPILATION_CACHE_DIR, or jaxlm/xla under the user's cache folder."""
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "jaxlm" / "xla"


def configure(runtime: Runtime) -> None:
    """Applies the settings; call before the first array is made, since devices cannot be added later."""
    if runtime.simulated_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", runtime.simulated_devices)
    # A second start of the same run compiles nothing; below a second it is not worth a file.
    jax.config.update("jax_compilation_cache_dir", str(compile_cache_dir()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_disable_jit", not runtime.jit)
    jax.config.update("jax_debug_nans", runtime.debug or jax.config.jax_debug_nans)  # type: ignore[attr-defined]
