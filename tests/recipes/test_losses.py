"""Losses against closed forms and computations by hand."""

import math

import pytest
import torch

from mmrag_recipes.losses import (
    binary_aware,
    candidate_mask,
    distil_scores,
    distil_vectors,
    info_nce,
    matryoshka,
    scores,
    signs,
)


def test_equal_scores_give_the_logarithm_of_their_number():
    similarity = torch.zeros(3, 7)
    loss = info_nce(similarity, torch.tensor([0, 1, 2]), torch.ones(3, 7, dtype=torch.bool), 0.05)
    assert loss.tolist() == pytest.approx([math.log(7)] * 3)


def test_info_nce_by_hand():
    similarity = torch.tensor([[0.9, 0.2, 0.4]])
    allowed = torch.tensor([[True, False, True]])
    expected = -math.log(math.exp(9) / (math.exp(9) + math.exp(4)))
    assert float(info_nce(similarity, torch.tensor([0]), allowed, 0.1)) == pytest.approx(expected)


def test_documents_above_the_positive_by_the_margin_are_left_out():
    similarity = torch.tensor([[0.5, 0.59, 0.61]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    loss = info_nce(similarity, torch.tensor([0]), everything, 1.0, false_negative_margin=0.1)
    expected = -math.log(math.exp(0.5) / (math.exp(0.5) + math.exp(0.59)))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_scores_are_cosines():
    queries, documents = torch.randn(3, 5), torch.randn(4, 5)
    expected = torch.nn.functional.cosine_similarity(queries[:, None], documents[None], dim=-1)
    torch.testing.assert_close(scores(queries, documents), expected)


def test_positives_keep_their_column_and_copies_are_masked():
    """T5: with k negatives per row, the target of row i is its own positive."""
    keys = torch.tensor([10, 11, 20, 21, 10, -1])
    rows = torch.tensor([0, 0, 1, 1, 2, -1])
    targets, own_rows = torch.tensor([0, 2]), torch.tensor([0, 1])
    positives = [torch.tensor([10]), torch.tensor([20, 11])]
    allowed = candidate_mask(targets, keys, positives, rows, own_rows, in_batch=True)
    assert allowed.tolist() == [
        [True, True, True, True, False, False],  # the copy of 10 and the padding are out
        [True, False, True, True, True, False],  # 11 is another right answer of row 1
    ]
    own = candidate_mask(targets, keys, positives, rows, own_rows, in_batch=False)
    assert own.tolist() == [
        [True, True, False, False, False, False],
        [False, False, True, True, False, False],
    ]


def test_matryoshka_averages_over_prefixes():
    def loss(queries, documents):
        return (queries.sum() + documents.sum()) * queries.shape[1]

    queries, documents = torch.ones(1, 4), torch.ones(1, 4)
    value = matryoshka(loss, (slice(0, 2), slice(0, 4)))(queries, documents)
    assert float(value) == pytest.approx(((2 + 2) * 2 + (4 + 4) * 4) / 2)


def test_signs_are_those_of_the_collection_and_carry_the_gradient_of_tanh():
    vectors = torch.tensor([[3.0, -4.0, 0.0, 0.0]], requires_grad=True)
    found = signs(vectors)
    assert found.tolist() == [[1.0, -1.0, -1.0, -1.0]]
    found[0, 0].backward()
    # d tanh(2 v / |v|) / dv by hand: 2 (1 - tanh^2) (I - u u^T) / |v|, with u = (0.6, -0.8, 0, 0)
    slope = 2 * (1 - math.tanh(1.2) ** 2) / 5
    expected = [slope * (1 - 0.36), slope * 0.48, 0.0, 0.0]
    assert vectors.grad[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_a_binary_aware_loss_mixes_whole_vectors_and_signs():
    def loss(queries, documents):
        return (queries @ documents.T).sum()

    queries, documents = torch.tensor([[2.0, -3.0]]), torch.tensor([[5.0, 7.0]])
    whole = 2 * 5 - 3 * 7
    assert binary_aware(loss, 0.0, True) is loss
    both = binary_aware(loss, 0.25, True)(queries, documents)
    assert float(both) == pytest.approx(0.75 * whole + 0.25 * 0)
    asymmetric = binary_aware(loss, 0.25, False)(queries, documents)
    assert float(asymmetric) == pytest.approx(0.75 * whole + 0.25 * (2 - 3))


def test_distilled_scores_vanish_at_the_teacher_and_skip_single_documents():
    teacher = torch.tensor([[2.0, 1.0, 0.0], [5.0, 0.0, 0.0]])
    known = torch.tensor([[True, True, False], [True, False, False]])
    same = distil_scores(teacher / 10, teacher, known, 0.1, 1.0)
    assert same.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    other = distil_scores(-teacher / 10, teacher, known, 0.1, 1.0)
    p = torch.tensor([2.0, 1.0]).softmax(0)
    q = torch.tensor([-2.0, -1.0]).softmax(0)
    assert other.tolist() == pytest.approx([float((p * (p / q).log()).sum()), 0.0], rel=1e-5)
    nothing = distil_scores(teacher, teacher, torch.zeros_like(known), 0.1, 1.0)
    assert nothing.tolist() == [0.0, 0.0]


def test_distilled_vectors_by_cosine():
    vectors = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert float(distil_vectors(vectors, teacher)) == pytest.approx(0.5)


def test_mined_negatives_stay_however_high_they_score():
    """A document of the wrong modality is mined because it scores above the positive."""
    similarity = torch.tensor([[0.5, 0.9, 0.9]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    own = torch.tensor([[True, True, False]])
    loss = info_nce(similarity, torch.tensor([0]), everything, 1.0, 0.1, own)
    expected = -math.log(math.exp(0.5) / (math.exp(0.5) + math.exp(0.9)))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
