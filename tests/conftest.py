"""What every test stands on: no network, one thread, fixed seeds, reproducible property tests on CI."""

import os
import tempfile

# Read by huggingface_hub and transformers when they are imported, so set before anything imports them.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")  # the code of repositories that tests load

import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support.hub_server import hub as hub  # a fixture

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported

settings.register_profile("local", deadline=None)
settings.register_profile("continuous", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("continuous" if os.environ.get("CI") else "local")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of goldens and data beside the checkout, or where HF_STEPFLOW_SHARED points."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("HF_STEPFLOW_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"no goldens at {folder}: set HF_STEPFLOW_SHARED to the folder that holds them")
    return folder
