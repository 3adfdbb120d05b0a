"""The GPUs on record: what each can compute, and the memory that PyTorch sees of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    peak_flops: float  # dense bf16, in FLOP/s, from the vendor's data sheet
    memory_gib: float


GPUS = {
    "B200": Gpu(2250e12, 178.0),
    "H200": Gpu(989e12, 139.8),
    "H100 PCIe": Gpu(756e12, 79.1),
    "H100": Gpu(989e12, 79.1),
    "A100": Gpu(312e12, 79.1),
    "L40S": Gpu(362e12, 44.4),
    "RTX 4090": Gpu(165e12, 23.5),
}


def find_gpu(name: str) -> str | None:
    """The key of GPUS that `name` ("h200", "NVIDIA H100 PCIe") means, or None."""
    wanted = name.lower().replace(" ", "").replace("-", "")
    return next((key for key in GPUS if key.lower().replace(" ", "") in wanted), None)
