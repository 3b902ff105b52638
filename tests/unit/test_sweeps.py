"""What a sweep's report says of cells whose drift is known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src.metrics.drift import LASTING
from src.model_folder import load_diffusion
from src.reporting.sweeps import SCORED, Cell, cell_of, gathered, page, plot, verdict

EXPECTED: dict[str, Any] = {
    "question": "Does it?",
    "claim": "It does.",
    "source": "somebody",
    "training": "train one\ntrain two\n",
    "command": "evaluate",
    "folder": "runs/x",
    "cells": {"a": "plan-1.0", "b": "plan-1.0-other"},
    "conditions": {"a": "without", "b": "with"},
    "worse": "a",
    "better": "b",
}
GOOD, BAD = 0.2, 0.3


def cell(condition: str, seed: int, outside: float, changed: float) -> Cell:
    """Of 16 positions: what lies outside, in the last quarter twice; and what has changed on average."""
    return Cell(
        condition,
        seed,
        outside=[outside] * 12 + [2 * outside] * 4,
        changed=[0.0] + [changed / 2] * 5 + [1.25 * changed] * 10,
        changed_in={},
        real_changed=[0.05] * 16,
        distances={"kernel": [0.1] * 4 + [0.2] * 8 + [0.4] * 4},
        blocks={
            "num_frames": 64,
            "motion": [0.4, 1.0],
            "share_slow": 0.01,
            "nearest": [0.02, 0.1],
            "real_nearest": [0.03, 0.2],
        },
        made={"created": "2026-01-01"},
        setting={"videos": 8, "clips": 16, "frames of a clip": 4, "sampler": {"num_sampling_steps": 3}},
    )


def cells(worse: list[tuple[float, float]], better: list[float]) -> list[Cell]:
    return [cell("a", i, *pair) for i, pair in enumerate(worse)] + [
        cell("b", i, GOOD, changed) for i, changed in enumerate(better)
    ]


@pytest.mark.parametrize(
    ("worse", "better", "expected"),
    [
        ([(GOOD, 0.5)] * 3, [0.3] * 3, "reproduced: b drifts less in all 3 seeds, by 0.20"),
        ([(GOOD, 0.3)] * 3, [0.5] * 3, "contradicted: b drifts more in all 3 seeds, by 0.20"),
        ([(GOOD, 0.5)] * 3, [0.3, 0.3, 0.6], "not reproduced at this scale: the differences are +0.20"),
        ([(GOOD, 0.5)] * 3, [0.46] * 3, "not reproduced at this scale"),
        ([(GOOD, 0.5)] * 2, [0.3] * 3, "undecided: 2 of 3 seeds"),
        ([(BAD, 0.8)] + [(GOOD, 0.5)] * 2, [0.3] * 3, "undecided: the model isn't good enough, 0.30"),
        ([(GOOD, 0.14)] + [(GOOD, 0.5)] * 2, [0.1] * 3, "undecided: there is nothing to hold down, a drifts"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_rule(worse: list, better: list, expected: str) -> None:
    assert expected in verdict(cells(worse, better), EXPECTED, "departure")


def test_quality_has_a_verdict_of_its_own() -> None:
    same = 3 * [0.5]
    worse = [cell("a", seed, 0.2, 0.5) for seed in range(3)]
    for outside, said in (
        (0.1, "reproduced: b drifts less in all 3 seeds, by 0.10"),
        (0.19, "not reproduced at this scale: the differences are +0.01, +0.01, +0.01"),
        (0.3, "contradicted: b drifts more in all 3 seeds, by 0.10"),
    ):
        better = [cell("b", seed, outside, 0.5) for seed in range(3)]
        assert said in verdict(worse + better, EXPECTED, "loss")
        assert "not reproduced" in verdict(worse + better, EXPECTED, "departure")
        asked = EXPECTED | {"baseline": "c"}
        assert said in verdict(worse + better, asked, "loss"), "a baseline is only asked to depart"
    still = [cell("a", seed, 0.05, 0.5) for seed in range(3)]
    assert "nothing to hold down, a drifts by 0.05" in verdict(still + cells([], same), EXPECTED, "loss")


def test_where_there_is_a_baseline_it_must_drift_too() -> None:
    measured = cells([(GOOD, 0.5)] * 3, [0.3] * 3)
    asked = EXPECTED | {"baseline": "c"}
    assert "undecided: 0 of 3 seeds" in verdict(measured, asked, "departure")
    still = [cell("c", seed, GOOD, 0.1) for seed in range(3)]
    assert "nothing to hold down, c drifts by 0.05" in verdict(measured + still, asked, "departure")
    drifting = [cell("c", seed, GOOD, 0.9) for seed in range(3)]
    assert "reproduced: b drifts less in all 3 seeds" in verdict(measured + drifting, asked, "departure")


def record(outside: list[float], changed: list[float]) -> dict[str, Any]:
    """Every trait as given; one that has no part in the numbers is quite different."""
    return {
        "created": "2026-01-02T03:04:05+00:00",
        "generated": {"samples": {"weights_sha256": "ab", "num_frames": 64, "sampler": {"steps": 3}}},
        "drift": {
            "num_videos": 8,
            "num_frames": 4,
            "num_real": 9,
            "statistics": {name: {"share_outside": outside, "median": outside} for name in SCORED}
            | {"freeze_rate": {"share_outside": [1.0] * len(outside), "median": outside}},
            "changes": {
                name: {"share_beyond": changed, "real_share_beyond": [0.0, 0.1, 0.1, 0.1]} for name in LASTING
            },
            "distances": {"kernel": {"values": [0.12345] * len(outside), "floor": 0.1}},
            "blocks": None,
        },
    }


def test_drift_is_what_has_changed_beyond_what_changes_in_real_videos() -> None:
    told = record([0.1, 0.2, 0.1, 0.2] + [0.4] * 8 + [0.5] * 4, [0.0] * 12 + [0.5, 0.6, 0.7, 0.8])
    told["drift"]["changes"]["colour"]["share_beyond"] = [0.0] * 12 + [1.0] * 4
    found = cell_of("a", 3, told)
    assert found.outside_at_first == pytest.approx(0.15) and found.outside_at_end == pytest.approx(0.5)
    assert found.loss == pytest.approx(0.35)
    assert found.departure == pytest.approx((4 * 2.6 + 4.0) / 5 / 15 - 0.05)
    assert found.changed_in["colour"][-1] == 1.0 and found.real_changed == [0.0, 0.1, 0.1, 0.1]
    for lacking in (record([0.1] * 7, [0.1] * 7), {"drift": None}):
        with pytest.raises(ValueError, match=r"no drift over at least 8 clip positions .* num_positions"):
            cell_of("a", 3, lacking)
    for change in told["drift"]["changes"].values():
        change["real_share_beyond"] = [0.0, 0.1]
    with pytest.raises(ValueError, match="real videos reach only 2 clips far, at least 4"):
        cell_of("a", 3, told)
    told["drift"]["changes"] = {}
    with pytest.raises(ValueError, match="real videos of more than one clip"):
        cell_of("a", 3, told)


def test_cells_of_other_machines_are_kept_and_new_ones_replace_them(tmp_path: Path) -> None:
    for name, share in (("plan-1.0_0", 0.2), ("plan-1.0-other_1", 0.4), ("elsewhere_0", 0.9)):
        (tmp_path / name).mkdir()
        text = json.dumps(record([share] * 16, [share] * 16))
        (tmp_path / name / "evaluation.json").write_text(text)
    same = cell_of("b", 1, record([0.4] * 16, [0.4] * 16)).setting
    old = [replace(cell("a", seed, 0.1, changed), setting=same) for seed, changed in ((0, 0.1), (5, 0.35))]
    (tmp_path / "kept.json").write_text(json.dumps([vars(one) for one in old]))
    found = {(one.condition, one.seed): one for one in gathered(EXPECTED, [tmp_path], tmp_path / "kept.json")}
    assert set(found) == {("a", 0), ("a", 5), ("b", 1)}
    assert found["a", 0].outside == [0.2] * 16 and found["a", 5].departure == pytest.approx(0.3)


def test_cells_that_were_measured_in_other_ways_are_refused(tmp_path: Path) -> None:
    few = record([0.2] * 16, [0.2] * 16)
    few["drift"]["num_videos"] = 3
    for name, told in (("plan-1.0_0", record([0.2] * 16, [0.2] * 16)), ("plan-1.0_7", few)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"a 0: videos 8, [\s\S]*a 7: videos 3, [\s\S]*runs=\[FOLDER\]"):
        gathered(EXPECTED, [tmp_path], tmp_path / "kept.json")
    (tmp_path / "kept.json").write_text('[{"condition": "a", "seed": 0, "shares": []}]')
    with pytest.raises(ValueError, match=r"kept.json holds no cells as this version .* output=FOLDER"):
        gathered(EXPECTED, [], tmp_path / "kept.json")


def test_damaged_results_of_a_cell_are_told_with_their_file(tmp_path: Path) -> None:
    damaged = tmp_path / "plan-1.0_0/evaluation.json"
    damaged.parent.mkdir()
    damaged.write_text('{"drift": ')
    with pytest.raises(ValueError, match=r"plan-1\.0_0/evaluation\.json is damaged.*remove it"):
        gathered(EXPECTED, [tmp_path], tmp_path / "kept.json")
    (tmp_path / "kept.json").write_text("")
    with pytest.raises(ValueError, match=r"kept\.json is damaged.*copy it again"):
        gathered(EXPECTED, [], tmp_path / "kept.json")


def test_the_page_tells_claim_verdict_numbers_and_what_is_missing() -> None:
    text = page("x", EXPECTED, cells([(GOOD, 0.5)] * 3, []), {"a": "x_a.png"})
    assert "It does. (somebody)" in text and "undecided: 0 of 3 seeds" in text and "\ntrain two\n" in text
    assert "| **a** |  | mean | 0.200 | 0.400 | +0.200 | 0.1000, 0.4000 | +0.450 |" in text
    assert "| b | with | not measured | | | | | |" in text
    assert "1.0% move less than half as much" in text and "0.020 apart, in real videos 0.030" in text
    assert "![a](x_a.png)" in text and "2026-01-01" in text
    assert plot(EXPECTED, cells([(GOOD, 0.5)] * 3, [])).startswith(b"<?xml")


def test_a_missing_model_of_a_sweep_is_told_with_what_trains_it() -> None:
    with pytest.raises(FileNotFoundError, match=r"train \+experiment=drift_clean seed=7\n"):
        load_diffusion("runs/drift_clean_7/model")
    with pytest.raises(FileNotFoundError, match=r"train \+experiment=sky_prediction\n"):
        load_diffusion("runs/sky_prediction/model")
