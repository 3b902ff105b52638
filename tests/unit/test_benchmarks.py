"""The scripts that measure speed do what they say; that their calls fit the code, mypy checks."""

from benchmarks import loop


def test_the_loop_is_measured_beside_a_bare_one() -> None:
    told = loop.measure(3, 1)["milliseconds_a_step"]
    assert told.keys() == {"bare", "ours", "ours_logging_every_50"} and min(told.values()) > 0
