"""The GPUs on record: what each can compute, and the memory that PyTorch sees of it."""

import re
from dataclasses import dataclass

from training.errors import SettingError


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    peak_flops: float  # dense bf16, in FLOP/s, from the vendor's data sheet
    memory_gib: float


GPUS = (  # the first whose words are all in a name matches
    Gpu("B200", 2250e12, 178.0),
    Gpu("H200", 989e12, 139.8),
    Gpu("H100 PCIe", 756e12, 79.1),
    Gpu("H100", 989e12, 79.1),
    Gpu("A100 40GB", 312e12, 39.4),
    Gpu("A100", 312e12, 79.1),
    Gpu("L40S", 362e12, 44.4),
    Gpu("RTX 4090", 165e12, 23.5),
)
# Others, with such a name in theirs: "RTX 4090 Laptop GPU", "RTX 4090 D", "H100 NVL", "H100 MIG 1g.10gb".
OTHERS = re.compile(r"\b(laptop|nvl|mig|d)\b")


def find_gpu(name: str) -> Gpu | None:
    """The GPU that `name` ("h200", "rtx-4090", "NVIDIA H100 PCIe") means; None if it isn't on record."""
    name = name.lower()
    if OTHERS.search(name):
        return None
    return next((gpu for gpu in GPUS if re.search(_words(gpu), name)), None)


def _words(gpu: Gpu) -> str:
    return rf"\b{gpu.name.lower().replace(' ', '.*')}(?!\d)"


def require_gpu(name: str) -> Gpu:
    """The GPU that `name` means.

    Raises:
        SettingError: it isn't on record.
    """
    gpu = find_gpu(name)
    if gpu is None:
        names = ", ".join(gpu.name.lower().replace(" ", "-") for gpu in GPUS)
        raise SettingError(
            f"gpu={name} is unknown. Allowed: {names}. For another give the nearest of these, to "
            "scripts.plan with gpu_memory_gib."
        )
    return gpu
