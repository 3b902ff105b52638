"""What several tests share: the folder of reference material beside the project, if it is there."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[2] / "shared"))

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Gives the path of a reference file; the test is skipped, saying so, where it isn't there."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"reference material {name} isn't at {SHARED} (set SHARED_DIR)")
        return path

    return find
