"""The devices of a TPU slice that is not here: what programs are compiled for ahead of time.

Run it in a process of its own with `ENVIRONMENT` in its environment: libtpu looks for a TPU as soon as it is loaded.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from jax.experimental import topologies

# The last one: several processes may compile at once, since none of them has a TPU to fight for.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def tpu_devices(topology: str) -> list[Any]:
    """The devices of a topology such as "v5e:2x2"; ValueError if libtpu is missing or does not know it."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs libtpu: pip install 'jaxlm[tpu]'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(topology, "tpu").devices
    except Exception as error:  # of libtpu's own kinds
        raise ValueError(f"topology {topology!r}: expected one such as v5e:2x2, v5p:2x2x1, v6e:2x2; {error}") from error
