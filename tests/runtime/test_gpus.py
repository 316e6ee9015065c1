"""GPUs by the names that CUDA and users give them."""

import pytest

from ipa_train.errors import ConfigError
from ipa_train.runtime.gpus import find_gpu, named_gpu


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA L40", None),
    ],
)
def test_names_of_cuda(device_name, name):
    found = find_gpu(device_name)
    assert (found and found.name) == name


def test_names_of_users():
    assert named_gpu("h200").memory_gib > named_gpu("H100").memory_gib
    with pytest.raises(ConfigError, match=r"--gpu h10: known are .*a100-80gb.* Did you mean 'h100'\?"):
        named_gpu("h10")
