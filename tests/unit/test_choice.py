"""Which videos and clips stand for a set is a function of the seed alone."""

from collections import Counter

import pytest

from src.data.choice import order_of_videos, start_of

LABELS = [0] * 7 + [1] * 3 + [2] * 5


def test_first_middle_and_a_tick_are_what_they_say():
    assert [start_of(where, 9, 0, 3) for where in ("first", "middle", 9, 0)] == [0, 4, 9, 0]


def test_random_places_are_uniform_and_depend_on_seed_and_video_only():
    starts = [start_of("random", 3, 5, index) for index in range(4000)]
    assert starts == [start_of("random", 3, 5, index) for index in range(4000)]
    # Four places, 1,000 times each but for chance: four standard deviations are 110.
    assert sorted(Counter(starts)) == [0, 1, 2, 3]
    assert all(abs(count - 1000) < 110 for count in Counter(starts).values())
    others = [start_of("random", 3, 6, index) for index in range(4000)]
    assert abs(sum(a == b for a, b in zip(starts, others, strict=True)) - 1000) < 110
    assert {start_of("random", 0, 0, index) for index in range(20)} == {0}


def test_what_isnt_there_is_refused():
    with pytest.raises(ValueError, match="no clip begins at tick 10: the last one begins at 9"):
        start_of(10, 9, 0, 0)
    with pytest.raises(ValueError, match="unknown place 'last'"):
        start_of("last", 9, 0, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown choice of videos 'first'; choose one of: shuffled"):
        order_of_videos(LABELS, "first", 0)


@pytest.mark.parametrize("how", ["shuffled", "sorted", "balanced"])
def test_every_video_comes_once(how):
    assert sorted(order_of_videos(LABELS, how, 1)) == list(range(15))
    assert order_of_videos(LABELS, how, 1) == order_of_videos(LABELS, how, 1)
    assert (order_of_videos(LABELS, how, 1) == order_of_videos(LABELS, how, 2)) is (how == "sorted")


def test_sorted_videos_stand_as_they_do():
    assert order_of_videos(LABELS, "sorted", 9) == list(range(15))


def test_sorted_is_pythons_order_of_names():
    names = ["b/clip 2.mp4", "b/clip 10.mp4", "a.mp4", "B.mp4", "a/1.mp4"]
    order = order_of_videos([-1] * 5, "sorted", 9, names=names)
    assert [names[index] for index in order] == sorted(names)


def test_any_beginning_of_a_balanced_order_has_equally_many_of_each_class():
    order = order_of_videos(LABELS, "balanced", 3)
    for count in range(1, 10):  # until the smallest class, of three, is used up
        of_class = Counter(LABELS[index] for index in order[:count])
        assert max(of_class.values()) - min(of_class.get(label, 0) for label in range(3)) <= 1
    beginnings = [order_of_videos(LABELS, "balanced", seed)[:9] for seed in range(5)]
    assert all(Counter(LABELS[index] for index in order)[1] == 3 for order in beginnings)
