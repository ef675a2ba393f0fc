"""The device as part of a measurement's identity: its name at launch, for evaluations whose number it decides."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from kbit.evaluation.spec import EvalSpec
from sweeps.errors import OtherDeviceError, UserError


def local_device_name(device: str) -> str:
    """Return the name of this machine's device; torch isn't loaded.

    Args:
        device: 'cpu' or 'cuda'.

    Raises:
        UserError: the GPUs that may be used are of several kinds, or can't be named.
    """
    return cpu_name() if device == "cpu" else _gpu_name()


def check_device(spec: EvalSpec, device: str) -> None:
    """Refuse to measure on another device than the one that the measurement names.

    Args:
        spec: the evaluation.
        device: 'cpu' or 'cuda': what this process computes on.

    Raises:
        OtherDeviceError: the device is another.
    """
    if spec.device is None:
        return
    actual = measured_device(device)
    if not is_device(spec.device, actual):
        raise OtherDeviceError(
            f"eval {spec.name} is a measurement of the device {spec.device!r}, and this is {actual!r}: run it there, "
            "or launch the study again to measure this device"
        )


def is_device(named: str, actual: str) -> bool:
    """Tell whether a device has a name: its own, or a type such as 'a100_80gb', all of whose words its own name has."""
    return _words(named) <= _words(actual)


def measured_device(device: str) -> str:
    """Return the name of the device that this process computes on."""
    if device == "cpu":
        return cpu_name()
    import torch

    return str(torch.cuda.get_device_name())


def cpu_name() -> str:
    """Return 'cpu (AMD EPYC 7B13)', or its architecture where the kernel says no more."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"cpu ({model.group(1).strip() if model else platform.machine()})"


def _gpu_name() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = ["-i", visible.replace(" ", "")] if visible else []
    output = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", *chosen, "--query-gpu=name", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    names = sorted({line.strip() for line in output.splitlines() if line.strip()})
    if len(names) == 1:
        return names[0]
    found = f"{len(names)} kinds of GPUs ({', '.join(names)})" if names else "no GPU that nvidia-smi can name"
    raise UserError(
        f"CUDA_VISIBLE_DEVICES={visible!r} is not valid with an evaluation whose number depends on the device: it "
        f"leaves {found}. Set it to GPUs of one kind"
    )


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9.]+", name.lower()))
