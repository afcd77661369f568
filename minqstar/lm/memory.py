"""How much memory a machine has, and a refusal before more than that is asked for.

A process that asks for too much gets no error: the system kills it later, without a word.
"""

import functools
import math
import os
import sys
from pathlib import Path

import torch

from minqstar.errors import require

CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # versions 2 and 1


@functools.cache
def memory_of(device: torch.device) -> float:
    """Bytes of memory of a GPU, or of this machine or container; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if sys.platform == "win32":
        return math.inf
    limits = [Path(file).read_text().strip() for file in CONTAINER if Path(file).is_file()]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(int(n) for n in limits if n.isdigit())])


def held() -> int:
    """The most bytes of memory that this program has held so far; 0 where the system does not say."""
    status = Path("/proc/self/status")  # getrusage would count what the process held that started this one
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines.get("VmHWM", "0").split()[0])
    if sys.platform != "darwin":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def require_memory(needed: float, what: str, lower: str, device: torch.device):
    """UserError, which names what to `lower`, if `what` need more bytes than the device has."""
    there = memory_of(device)
    enough = f"{needed / 1e9:,.1f} GB of memory; this machine has {there / 1e9:,.1f}"
    require(needed <= there, f"{what} need {enough}: lower {lower}")


def mask_bytes(B: int, T: int, W: int) -> int:
    """At the least, for T tokens to see W each in B rows: a bias of four bytes, and as much for the masks before it."""
    return 8 * B * T * W
