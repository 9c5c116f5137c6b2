"""What this CPU does with u8 · s8 products: x86 without VNNI adds two of them in 16 bits, where they can saturate."""

import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@cache
def adds_in_32_bits() -> bool | None:
    """Whether u8 · s8 products are added without saturating; None where the system does not say."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return True  # ARM's dot products and the others widen before they add
    try:
        flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return None
    return any(flag.startswith(("avx512_vnni", "avx_vnni")) for flag in flags)


def saturation_advice() -> str:
    """What to do about saturating products on this CPU, as a sentence; empty where they do not saturate."""
    advice = {
        True: "",
        False: "This CPU has no VNNI, and u8·s8 products saturate on it: use target 'onnxruntime-avx2'. ",
        None: "If this CPU has no VNNI, u8·s8 products saturate on it: use target 'onnxruntime-avx2'. ",
    }
    return advice[adds_in_32_bits()]
