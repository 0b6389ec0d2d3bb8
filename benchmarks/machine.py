"What the figures were measured on."
import platform
from pathlib import Path


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{names[0]} x {len(names)}" if names else platform.processor() or platform.machine()
