"""Tests of the named task instructions."""

import pytest

from mmrag.errors import ConfigError
from mmrag.instructions import TASKS, resolve


def test_names_become_sentences_and_sentences_stay():
    assert resolve("page_for_question") == "Find a document page that answers the question."
    assert resolve("  Find the plan that covers it. ") == "Find the plan that covers it."
    assert resolve("找到回答问题的页面") == "找到回答问题的页面"


@pytest.mark.parametrize("nothing", [None, "", "  \n"])
def test_nothing_is_no_instruction(nothing):
    assert resolve(nothing) is None


@pytest.mark.parametrize("name", ["page_for_questions", "page-for-question", "Page_For_Question"])
def test_misspelt_name_is_told_with_the_nearest(name):
    with pytest.raises(ConfigError, match="page_for_question"):
        resolve(name)


def test_unlike_name_is_told_with_all_names():
    with pytest.raises(ConfigError) as error:
        resolve("zzz")
    assert all(name in str(error.value) for name in TASKS)


def test_every_task_is_one_sentence_and_resolves_to_itself():
    assert len(set(TASKS.values())) == len(TASKS)
    for name, sentence in TASKS.items():
        assert name.isidentifier()
        assert sentence.endswith(".")
        assert resolve(sentence) == resolve(name) == sentence
