"""What a sweep's report says of cells whose drift is known."""

import json
from pathlib import Path
from typing import Any

import pytest

from src.model_folder import load_diffusion
from src.reporting.sweeps import SCORED, Cell, cell_of, gathered, page, plot, verdict

EXPECTED: dict[str, Any] = {
    "question": "Does it?",
    "claim": "It does.",
    "source": "somebody",
    "training": "train",
    "command": "evaluate",
    "cells": "runs/x",
    "conditions": {"a": "without", "b": "with"},
    "worse": "a",
    "better": "b",
}


def cell(condition: str, seed: int, first: float, last: float) -> Cell:
    shares = [first] * 4 + [(first + last) / 2] * 8 + [last] * 4
    return Cell(condition, seed, shares, {}, {"created": "2026-01-01", "num_videos": 8, "num_real": 9})


def cells(worse: list[tuple[float, float]], better: list[tuple[float, float]]) -> list[Cell]:
    return [cell("a", i, *pair) for i, pair in enumerate(worse)] + [
        cell("b", i, *pair) for i, pair in enumerate(better)
    ]


@pytest.mark.parametrize(
    ("worse", "better", "expected"),
    [
        ([(0.1, 0.5)] * 3, [(0.1, 0.3)] * 3, "reproduced: b drifts less in all 3 seeds, by 0.20"),
        ([(0.1, 0.3)] * 3, [(0.1, 0.5)] * 3, "contradicted: b drifts more in all 3 seeds, by 0.20"),
        (
            [(0.1, 0.5)] * 3,
            [(0.1, 0.3)] * 2 + [(0.1, 0.6)],
            "not reproduced at this scale: the differences are",
        ),
        ([(0.1, 0.5)] * 3, [(0.1, 0.46)] * 3, "not reproduced at this scale"),
        ([(0.1, 0.5)] * 2, [(0.1, 0.3)] * 3, "undecided: 2 of 3 seeds"),
        ([(0.3, 0.8)] + [(0.1, 0.5)] * 2, [(0.1, 0.3)] * 3, "undecided: the model isn't good enough, 0.30"),
        ([(0.1, 0.15)] + [(0.1, 0.5)] * 2, [(0.1, 0.1)] * 3, "undecided: there is nothing to hold down"),
    ],
)
def test_the_verdict_follows_the_rule(worse: list, better: list, expected: str) -> None:
    assert expected in verdict(cells(worse, better), "a", "b")


def record(shares: list[float]) -> dict[str, Any]:
    curve = {"share_outside": shares, "median": [1.0] * len(shares), "band": [0.5, 1.5]}
    return {
        "created": "2026-01-02T03:04:05+00:00",
        "generated": {"samples": {"weights_sha256": "ab"}},
        "drift": {
            "num_videos": 8,
            "num_real": 9,
            "statistics": {name: curve for name in (*SCORED, "freeze_rate")},
        },
    }


def test_drift_is_what_the_share_outside_has_grown_by() -> None:
    found = cell_of("a", 3, record([0.1, 0.2, 0.1, 0.2] + [0.4] * 8 + [0.5, 0.6, 0.7, 0.8]))
    assert found.at_first == pytest.approx(0.15) and found.drift == pytest.approx(0.65 - 0.15)
    with pytest.raises(ValueError, match="no drift over at least 8 clip positions"):
        cell_of("a", 3, record([0.1] * 7))
    with pytest.raises(ValueError, match="num_positions"):
        cell_of("a", 3, {"drift": None})


def test_cells_of_other_machines_are_kept_and_new_ones_replace_them(tmp_path: Path) -> None:
    for name, share in (("a_0", 0.2), ("b_1", 0.4), ("other_0", 0.9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps(record([share] * 16)))
    old = [cell("a", 0, 0.1, 0.1), cell("a", 5, 0.1, 0.3)]
    (tmp_path / "kept.json").write_text(json.dumps([vars(one) for one in old]))
    found = {(one.condition, one.seed): one for one in gathered(EXPECTED, [tmp_path], tmp_path / "kept.json")}
    assert set(found) == {("a", 0), ("a", 5), ("b", 1)}
    assert found["a", 0].shares == [0.2] * 16 and found["a", 5].drift == pytest.approx(0.2)


def test_the_page_tells_claim_verdict_numbers_and_what_is_missing() -> None:
    text = page("x", EXPECTED, cells([(0.1, 0.5)] * 3, []), {"a": "x_a.png"})
    assert "It does. (somebody)" in text and "undecided: 0 of 3 seeds" in text
    assert (
        "| a | | mean | 0.100 | 0.500 | **+0.400** |" in text and "| b | with | | not measured | | |" in text
    )
    assert "![a](x_a.png)" in text and "2026-01-01" in text
    assert plot(EXPECTED, cells([(0.1, 0.5)] * 3, [])).startswith(b"<?xml")


def test_a_missing_model_of_a_sweep_is_told_with_what_trains_it() -> None:
    with pytest.raises(FileNotFoundError, match=r"train \+experiment=drift_clean seed=7\n"):
        load_diffusion("runs/drift_clean_7/model")
    with pytest.raises(FileNotFoundError, match=r"train \+experiment=sky_prediction\n"):
        load_diffusion("runs/sky_prediction/model")
