"""What is kept of an interrupted job comes back as it was, or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from src.data.pieces import Pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_piece_comes_back_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    piece = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    pieces = Pieces(tmp_path / "pieces")
    assert pieces.get("a") is None
    pieces.put("a", piece.transpose(0, 2))
    found = pieces.get("a")
    assert found is not None and torch.equal(found, piece.transpose(0, 2))
    content = (tmp_path / "pieces/a.safetensors").read_bytes()
    pieces.put("a", piece.transpose(0, 2))
    assert (tmp_path / "pieces/a.safetensors").read_bytes() == content
    pieces.remove()
    assert not (tmp_path / "pieces").exists()


def _zeros_at_the_end(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-64] + bytes(64))


def _one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def _all_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_a_checksum(path: Path) -> None:
    save_file({"piece": torch.ones(100)}, path)


@pytest.mark.parametrize("damage", [_zeros_at_the_end, _one_bit, _all_zeros, _half, _without_a_checksum])
def test_a_damaged_piece_counts_as_missing(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    pieces = Pieces(tmp_path)
    pieces.put("a", torch.ones(100))
    damage(tmp_path / "a.safetensors")
    assert pieces.get("a") is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_piece_that_isnt_finite_counts_as_missing(tmp_path: Path, value: float) -> None:
    pieces = Pieces(tmp_path)
    pieces.put("a", torch.tensor([1.0, value]))
    assert pieces.get("a") is None
