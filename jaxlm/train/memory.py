"""How much memory the process and its devices hold, in bytes."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import jax


def rss_bytes() -> int:
    """Resident memory of this process; where the system does not tell (macOS), its highest value so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_peak_bytes() -> int | None:
    """The highest memory use so far of the fullest local device; None where the platform does not count (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None
