from uuid import UUID

from mmrag.store.kept_fields import KeptFields

STORED = {number: {"page": number, "file": f"{number % 2}.pdf"} for number in range(9)}


def whole(numbers):
    return [(str(UUID(int=number)), STORED[number]) for number in numbers]


class Reader:
    def __init__(self):
        self.asked = []

    def __call__(self, numbers):
        self.asked.append(sorted(numbers))
        # In another order, and equal objects of their own, as an engine makes them.
        return [(int(f"{number}"), dict(STORED[number])) for number in sorted(numbers)]


def test_each_point_is_read_once():
    read = Reader()
    kept = KeptFields(read)
    assert kept.of([2, 1]) == whole([2, 1])
    assert kept.of([3, 2]) == whole([3, 2])
    assert kept.of([1, 3]) == whole([1, 3])
    assert read.asked == [[1, 2], [3]]


def test_points_that_do_not_exist_are_none_and_asked_for_again():
    asked = []
    kept = KeptFields(lambda numbers: asked.append(numbers) or [(1, STORED[1])] * (1 in numbers))
    assert kept.of([5, 1]) == [None, *whole([1])]
    assert kept.of([1, 5]) == [*whole([1]), None]
    assert asked == [[5, 1], [5]]


def test_no_more_points_are_kept_than_allowed_and_all_are_given():
    read = Reader()
    kept = KeptFields(read, most=3)
    for first in range(6):
        asked = list(range(first, first + 3))
        assert kept.of(asked) == whole(asked)
        assert len(kept) <= 3
    assert kept.of(list(STORED)) == whole(STORED)
    assert len(kept) <= 3


def test_those_read_first_are_dropped_for_others():
    read = Reader()
    kept = KeptFields(read, most=3)
    kept.of([0, 1, 2])
    assert kept.full
    kept.of([3])
    kept.of([1, 2, 3])
    assert read.asked == [[0, 1, 2], [3]]


def test_what_is_forgotten_is_read_again_and_the_rest_is_kept():
    read = Reader()
    kept = KeptFields(read)
    kept.of([1, 2, 3])
    kept.forget([str(UUID(int=2)), str(UUID(int=8))])
    kept.of([1, 2, 3])
    assert read.asked == [[1, 2, 3], [2]]


def test_what_was_read_before_a_write_is_not_kept_after_it():
    stored, writes = {1: {"page": 1}}, []

    def read(numbers):
        before = [(number, stored[number]) for number in numbers]
        if not writes:  # another thread writes while this one reads
            writes.append(1)
            stored[1] = {"page": 2}
            kept.forget([str(UUID(int=1))])
        return before

    kept = KeptFields(read)
    kept.of([1])
    assert kept.of([1]) == [(str(UUID(int=1)), {"page": 2})]


def test_strings_that_many_points_share_are_kept_once():
    kept = KeptFields(lambda numbers: [(n, {"file": "".join(["a", ".pdf"])}) for n in numbers])
    (_, one), (_, other) = kept.of([1, 2])
    assert one["file"] is other["file"]
