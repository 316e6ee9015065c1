"""Shared by all tests: shape checks on, no network, one thread, tiny models built once."""

import os
import warnings

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("WANDB_MODE", "offline")

from beartype.roar import BeartypeDecorHintPep585DeprecationWarning
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401 - the hook finds it by name

warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)  # omegaconf's own hints
install_import_hook("ipa_train", "tests.typechecker.typechecker")

import threading

import pytest
import torch
from tqdm import tqdm

from ipa_train.bases import Flux, StableDiffusion
from ipa_train.bases.tiny import save_tiny_models, tiny_pipeline
from ipa_train.bases.tiny_encoders import save_tiny_scorers
from ipa_train.conditioning import CLIPImageEncoder

torch.set_num_threads(1)
# tqdm's own lock is shared with forked processes: one that a test kills while it holds it would block all later ones.
tqdm.set_lock(threading.RLock())


def pytest_addoption(parser):
    parser.addoption("--write-table", action="store_true", help="write what tests/compatibility finds into the docs")
    parser.addoption("--kills", type=int, default=4, help="faults in a row in tests/slurm/test_faults.py")


@pytest.fixture(scope="session")
def num_kills(request):
    """How many faults a training on a cluster has to stand."""
    return request.config.getoption("--kills")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folders of a tiny random SD 1.5 and of a tiny CLIP image encoder."""
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_scorers(tmp_path_factory):
    """Folders of a tiny random CLIP (text and image) and of a tiny DINOv2, to score pictures by."""
    return save_tiny_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture(scope="session")
def tiny_sd21(tmp_path_factory):
    """Folders of a tiny random SD 2.1 (v-prediction) and of a tiny CLIP image encoder."""
    return save_tiny_models(tmp_path_factory.mktemp("models21"), "sd21")


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """Folders of a tiny random Flux (dev) and of a tiny CLIP image encoder."""
    return save_tiny_models(tmp_path_factory.mktemp("models_flux"), "flux")


@pytest.fixture
def flux(tiny_flux):
    """A fresh tiny Flux in fp32, with captions of 32 T5 tokens."""
    return Flux.from_pretrained(str(tiny_flux[0]), dtype="float32", max_t5_tokens=32)


@pytest.fixture(scope="session", params=["sd3", "sd35m"])
def tiny_sd3(request, tmp_path_factory):
    """Folder of a tiny random SD 3.5: one built as large is, one as medium."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """Folders of a tiny random SDXL and of a tiny CLIP image encoder."""
    return save_tiny_models(tmp_path_factory.mktemp("models_xl"), "sdxl")


@pytest.fixture
def base(tiny_models):
    """A fresh tiny SD 1.5 in fp32."""
    return StableDiffusion.from_pretrained(str(tiny_models[0]), dtype="float32")


@pytest.fixture
def image_encoder(tiny_models):
    """A fresh tiny image encoder in fp32."""
    return CLIPImageEncoder.from_pretrained(str(tiny_models[1]), dtype="float32")
