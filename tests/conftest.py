"""Every test sees eight simulated CPU devices, no accelerator, and no network."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Tests wait for compilations, not for the compiled: so they take about a quarter of the time, and half of it without
# the old emitters, which jax 0.11 and 0.12 no longer have.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
os.environ.setdefault("JAX_OPTIMIZATION_LEVEL", "O0")  # half the time for TPUs
os.environ.setdefault("JAX_MEMORY_FITTING_LEVEL", "O0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the repository; tests that need it skip where it is absent."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the real data files are not on this machine")
    return path
