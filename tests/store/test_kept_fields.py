from mmrag.store.kept_fields import KeptFields

STORED = {f"n{number}": {"page": number, "file": f"{number % 2}.pdf"} for number in range(9)}


class Reader:
    def __init__(self):
        self.asked = []

    def __call__(self, ids):
        self.asked.append(sorted(ids))
        # Equal strings of their own, as an engine makes them.
        copy = {"".join(id_): {**STORED[id_], "file": STORED[id_]["file"][:]} for id_ in ids}
        return list(copy.items())


def test_each_point_is_read_once():
    read = Reader()
    kept = KeptFields(read)
    assert kept.of(["n1", "n2"]) == {id_: STORED[id_] for id_ in ("n1", "n2")}
    assert kept.of(["n3", "n2"]) == {id_: STORED[id_] for id_ in ("n3", "n2")}
    assert kept.of(["n1", "n3"]) == {id_: STORED[id_] for id_ in ("n1", "n3")}
    assert read.asked == [["n1", "n2"], ["n3"]]


def test_ids_that_do_not_exist_are_left_out_and_asked_for_again():
    asked = []
    kept = KeptFields(lambda ids: asked.append(ids) or [])
    assert kept.of(["gone"]) == kept.of(["gone"]) == {}
    assert asked == [["gone"], ["gone"]]


def test_no_more_points_are_kept_than_allowed_and_all_are_given():
    read = Reader()
    kept = KeptFields(read, most=3)
    for first in range(6):
        asked = [f"n{number}" for number in range(first, first + 3)]
        assert kept.of(asked) == {id_: STORED[id_] for id_ in asked}
        assert len(kept) <= 3
    everything = list(STORED)
    assert kept.of(everything) == STORED
    assert len(kept) <= 3


def test_those_read_first_are_dropped_for_others():
    read = Reader()
    kept = KeptFields(read, most=3)
    kept.of(["n0", "n1", "n2"])
    assert kept.full
    kept.of(["n3"])
    kept.of(["n1", "n2", "n3"])
    assert read.asked == [["n0", "n1", "n2"], ["n3"]]


def test_what_is_forgotten_is_read_again_and_the_rest_is_kept():
    read = Reader()
    kept = KeptFields(read)
    kept.of(["n1", "n2", "n3"])
    kept.forget(["n2", "n8"])
    kept.of(["n1", "n2", "n3"])
    assert read.asked == [["n1", "n2", "n3"], ["n2"]]


def test_what_was_read_before_a_write_is_not_kept_after_it():
    stored, writes = {"n1": {"page": 1}}, []

    def read(ids):
        before = [(id_, stored[id_]) for id_ in ids]
        if not writes:  # another thread writes while this one reads
            writes.append(1)
            stored["n1"] = {"page": 2}
            kept.forget(["n1"])
        return before

    kept = KeptFields(read)
    kept.of(["n1"])
    assert kept.of(["n1"]) == {"n1": {"page": 2}}


def test_strings_that_many_points_share_are_kept_once():
    kept = KeptFields(lambda ids: [(id_, {"file": "".join(["a", ".pdf"])}) for id_ in ids])
    one, other = kept.of(["n1", "n2"]).values()
    assert one["file"] is other["file"]
