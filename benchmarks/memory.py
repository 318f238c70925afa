"""Peak memory of one side on one network, in its own process: ``python memory.py attrim ResNet-50`` prints JSON."""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from networks import CHAINS, DENSE, NETWORKS
from sides import SIDES, warm_up

__all__ = ["measure"]

MEBI = 1024 * 1024


def peak() -> float:
    """High-water mark of resident memory in MiB.

    Linux starts ``ru_maxrss`` at the parent's memory, so the process' own mark is read where there is one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark / (MEBI if sys.platform == "darwin" else 1024)


def measure(side: str, network: str) -> dict[str, float]:
    """MiB above the libraries: ``forward`` for the network and one forward pass, ``work`` once the side has run."""
    command = [sys.executable, str(Path(__file__).resolve()), side, network]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"{side} on {network}: {reason}")
    marks: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return marks


def main() -> None:
    """Run in the process that is measured."""
    side, network = sys.argv[1:]
    case = {**CHAINS, **DENSE, **NETWORKS}[network]
    warm_up(side)
    gc.collect()
    base = peak()
    model, inputs = case.make()
    with torch.no_grad():
        model(inputs)
    forward = peak()
    SIDES[side](model, inputs, case.classifier)
    print(json.dumps({"forward": forward - base, "work": peak() - base}))


if __name__ == "__main__":
    main()
