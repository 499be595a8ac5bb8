"""How deep a cascade goes and in which order results come."""

import pytest

from mmrag.errors import ConfigError, ContentError
from mmrag.rerankers.cascade import Depth, filled, final_order, judge_in_steps


class Clock:
    """Seconds that pass only where a judge lets them."""

    now = 0.0

    def __call__(self):
        return self.now


def judged(scores, depth, costs=None, ms_each=0.0):
    clock, steps = Clock(), []

    def judge(indices):
        steps.append(len(indices))
        clock.now += ms_each * len(indices) / 1000
        return [scores[index] for index in indices]

    outcomes, why = judge_in_steps(judge, costs or [1] * len(scores), depth, clock)
    assert outcomes == scores[: len(outcomes)]
    return steps, why


def test_without_limits_all_are_judged_at_once():
    assert judged([0.1] * 20, Depth(top_n=2, step=4)) == ([20], None)
    assert judged([], Depth()) == ([], None)


def test_stops_when_a_whole_step_stays_far_below_the_top():
    scores = [0.9, 0.8, 0.7, 0.75, 0.4, 0.3, 0.9, 0.9]
    steps, why = judged(scores, Depth(top_n=2, step=2, settle=0.4))
    assert steps == [2, 2, 2]
    assert "settled after 6" in why
    assert judged(scores, Depth(top_n=2, step=2, settle=0.41)) == ([2, 2, 2, 2], None)


def test_settles_against_the_last_kept_score_not_the_best():
    scores = [0.9, 0.2, 0.1, 0.1, 0.1, 0.1]
    assert judged(scores, Depth(top_n=2, step=2, settle=0.5))[0] == [2, 2, 2]
    assert judged(scores, Depth(top_n=1, step=2, settle=0.5))[0] == [2, 2]


def test_does_not_settle_before_the_top_is_full_or_on_failures():
    low = [0.9, 0.9, 0.1, 0.1, 0.1, 0.1]
    assert judged(low, Depth(top_n=3, step=2, settle=0.5))[0] == [2, 2, 2]
    failed = [0.9, 0.9, ContentError("x"), 0.1, 0.1, 0.1, 0.1, 0.1]
    assert judged(failed, Depth(top_n=1, step=2, settle=0.5))[0] == [2, 2, 2]


def test_depth_is_bounded():
    assert judged([0.5] * 9, Depth(max_depth=5)) == ([5], "max_depth=5 is reached")
    assert judged([0.5] * 3, Depth(max_depth=5)) == ([3], None)


def test_time_is_predicted_from_the_pace():
    steps, why = judged([0.5] * 30, Depth(step=4, budget_ms=100), ms_each=10)
    assert steps == [4, 4, 2]
    assert "100 ms" in why
    assert judged([0.5] * 30, Depth(step=4, budget_ms=10), ms_each=10)[0] == [4]


def test_tokens_are_not_passed():
    costs = [10, 20, 30, 40, 50]
    steps, why = judged([0.5] * 5, Depth(step=2, budget_tokens=100), costs)
    assert steps == [2, 2]
    assert "100 tokens" in why
    assert judged([0.5] * 5, Depth(step=2, budget_tokens=60), costs)[0] == [2, 1]
    assert judged([0.5] * 5, Depth(step=2, budget_tokens=9), costs)[0] == []


def test_what_has_no_score_keeps_its_place():
    assert final_order([0.1, None, 0.9, 0.5]) == [2, 1, 3, 0]
    assert final_order([None, 0.1, 0.2, None]) == [0, 2, 1, 3]
    assert final_order([0.5, 0.5, None]) == [0, 1, 2]
    assert final_order([None, None]) == [0, 1]
    assert final_order([0.0, -0.0, 1.0]) == [2, 0, 1]


def test_scores_are_filled_from_above():
    assert filled([None, 0.9, None, 0.1, None]) == [0.9, 0.9, 0.9, 0.1, 0.1]
    assert filled([None, None]) == [None, None]


@pytest.mark.parametrize(
    "limits",
    [
        {"top_n": 0},
        {"step": 0},
        {"max_depth": 0},
        {"budget_ms": 0},
        {"budget_tokens": 0},
        {"settle": 0, "top_n": 1},
        {"settle": 0.5},
    ],
)
def test_senseless_limits_are_refused(limits):
    with pytest.raises(ConfigError, match=next(iter(limits))):
        Depth(**limits)
