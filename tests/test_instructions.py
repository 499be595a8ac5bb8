"""Tests of the named task instructions."""

import pytest

from mmrag.errors import ConfigError
from mmrag.instructions import TASKS, resolve


def test_names_become_sentences_and_sentences_stay():
    assert resolve("page_for_question") == "Find a document page that answers the question."
    assert resolve("  Find the plan that covers it. ") == "Find the plan that covers it."
    assert resolve("找到回答问题的页面") == "找到回答问题的页面"


def test_nothing_is_no_instruction_and_blank_one_says_nothing():
    """An empty instruction marks a query, where a family marks them; none marks a document."""
    assert resolve(None) is None
    assert resolve("") == resolve("  \n") == ""


@pytest.mark.parametrize("word", ["Identify", "Re-identify", "zzz", "Retrieve"])
def test_a_bare_word_is_an_instruction(word):
    assert resolve(word) == word


@pytest.mark.parametrize("name", ["page_for_questions", "page-for-question", "Page_For_Question"])
def test_misspelt_name_is_told_with_the_nearest(name):
    with pytest.raises(ConfigError, match="page_for_question"):
        resolve(name)


def test_unlike_name_is_told_with_all_names():
    with pytest.raises(ConfigError) as error:
        resolve("zzz_qqq")
    assert all(name in str(error.value) for name in TASKS)


def test_every_task_is_one_sentence_and_resolves_to_itself():
    assert len(set(TASKS.values())) == len(TASKS)
    for name, sentence in TASKS.items():
        assert name.isidentifier()
        assert sentence.endswith(".")
        assert resolve(sentence) == resolve(name) == sentence
