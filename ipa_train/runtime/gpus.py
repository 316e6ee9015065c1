"""What known GPUs can do."""

from dataclasses import dataclass

from ipa_train.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class GPU:
    """One model."""

    name: str
    tflops: float
    """Peak TFLOP/s of dense matrix products in bf16, summed in fp32; in fp16 where there is no bf16 (V100)."""
    memory_gib: float
    """What torch finds on it."""


GPUS = (
    GPU("V100-16GB", 125.0, 15.8),
    GPU("V100-32GB", 125.0, 31.7),
    GPU("A100-40GB", 312.0, 39.4),
    GPU("A100-80GB", 312.0, 79.2),
    GPU("A10", 125.0, 22.0),
    GPU("A40", 149.7, 44.4),
    GPU("L4", 121.0, 22.0),
    GPU("L40S", 362.0, 44.4),
    GPU("H100", 989.0, 79.1),
    GPU("H100-PCIe", 756.0, 79.1),
    GPU("H100-NVL", 835.0, 93.1),
    GPU("H200", 989.0, 139.8),
    GPU("B200", 2250.0, 178.3),
    GPU("RTX-3090", 71.0, 23.6),
    GPU("RTX-4090", 165.2, 23.6),
    GPU("RTX-A6000", 154.8, 47.4),
)
"""TFLOP/s by NVIDIA's data sheets and white papers, without sparsity, of the SXM module where there is one.

Memory is what the driver leaves of the nominal size, to within a per cent or two.
"""


def find_gpu(device_name: str) -> GPU | None:
    """The GPU that CUDA calls ``device_name``, e.g. "NVIDIA H100 80GB HBM3"; None for one that is not known.

    Neither are parts of a GPU (MIG) nor laptops' versions, which are slower than their names say.
    """
    words = _words(device_name)
    if words & {"mig", "laptop"}:
        return None
    fitting = [gpu for gpu in GPUS if _words(gpu.name) <= words]
    return max(fitting, key=lambda gpu: len(_words(gpu.name)), default=None)


def named_gpu(name: str) -> GPU:
    """The GPU that a user names, e.g. ``h100``.

    Raises:
        ConfigError: none of the table.
    """
    known = {gpu.name.lower(): gpu for gpu in GPUS}
    if name.lower() not in known:
        raise ConfigError(f"--gpu {name}: known are {', '.join(known)}.{did_you_mean(name.lower(), known)}")
    return known[name.lower()]


def _words(name: str) -> set[str]:
    return set(name.lower().replace("-", " ").split())
