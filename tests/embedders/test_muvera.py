"""MUVERA against a slow implementation of the paper's definitions, and against its bound."""

import numpy as np
import pytest

from mmrag.embedders.late import max_sim
from mmrag.embedders.muvera import Muvera, _final, _partitions
from mmrag.errors import ConfigError


def tokens(count, dim=24, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def slow(muvera, points, is_query):
    """Section 2 of the paper, cluster by cluster and token by token."""
    planes, signs = _partitions(muvera, points.shape[1])
    parts = []
    for repetition in range(muvera.repetitions):
        codes = [tuple(plane @ x > 0 for plane in planes[repetition]) for x in points]
        short = [x if signs is None else signs[repetition] @ x for x in points]
        for number in range(2**muvera.k_sim):
            cluster = tuple(bool(number >> bit & 1) for bit in range(muvera.k_sim))
            inside = [v for v, code in zip(short, codes, strict=True) if code == cluster]
            if inside:
                parts.append(np.sum(inside, axis=0) / (1 if is_query else len(inside)))
            elif is_query:
                parts.append(np.zeros(len(short[0])))
            else:
                distances = [np.sum(np.not_equal(code, cluster)) for code in codes]
                parts.append(short[int(np.argmin(distances))])
    whole = np.concatenate(parts) / np.sqrt(muvera.repetitions)
    return whole if muvera.final_dim is None else _final(muvera, whole.size) @ whole


@pytest.mark.parametrize(
    "muvera",
    [
        Muvera(k_sim=3, repetitions=4, d_proj=8),
        Muvera(k_sim=1, repetitions=1, d_proj=99),
        Muvera(k_sim=4, repetitions=3, d_proj=8, final_dim=50, seed=7),
    ],
)
@pytest.mark.parametrize("count", [1, 5, 60])
def test_equals_the_definition(muvera, count):
    points = tokens(count)
    query, document = muvera.encode_query(points), muvera.encode_document(points)
    assert query.shape == document.shape == (muvera.dim(24),)
    assert query.dtype == document.dtype == np.float32
    np.testing.assert_allclose(query, slow(muvera, points, is_query=True), atol=2e-5)
    np.testing.assert_allclose(document, slow(muvera, points, is_query=False), atol=2e-5)


def test_projections_are_of_the_kind_that_the_paper_names():
    planes, signs = _partitions(Muvera(repetitions=120), 64)
    assert abs(planes.mean()) < 0.01 and planes.std() == pytest.approx(1, abs=0.01)
    assert set(np.unique(signs * np.sqrt(16)).round(5)) == {-1.0, 1.0}
    other, _ = _partitions(Muvera(repetitions=120, seed=1), 64)
    assert not np.allclose(planes, other)


def errors(muvera, pairs):
    """What 1/|Q| times the inner product is above the normalised MaxSim, for each pair."""
    return np.array(
        [
            (muvera.encode_query(q) @ muvera.encode_document(p) - max_sim(q, p)) / len(q)
            for q, p in pairs
        ]
    )


def near_pairs(count, dim=48, n_tokens=16):
    """Queries with a close match for each token among the document's, as late interaction has."""
    random = np.random.default_rng(3)
    for seed in range(count):
        document = tokens(n_tokens, dim, seed)
        near = document[random.choice(n_tokens, 8, replace=False)]
        query = near + random.normal(size=near.shape).astype(np.float32) * 0.1 / np.sqrt(dim)
        yield query / np.linalg.norm(query, axis=1, keepdims=True), document


def test_the_inner_product_stands_for_max_sim_within_epsilon():
    """Theorem 2.1, with one repetition as there: within epsilon with probability 1 - delta.

    Without an inner projection all of the error is that of the partition: a mean of cosines is
    at most their maximum, so the true value is never exceeded; and more bits bring it nearer,
    until epsilon = 0.2 holds for at least 9 of 10 pairs (delta = 0.1).
    """
    pairs = list(near_pairs(60))
    gaps = [
        errors(Muvera(k_sim=bits, repetitions=1, d_proj=48), pairs) for bits in (2, 4, 6, 8, 10)
    ]
    assert all(gap.max() <= 1e-5 for gap in gaps)
    within = [(abs(gap) < 0.2).mean() for gap in gaps]
    assert within == sorted(within)
    assert within[-1] >= 0.9


def test_more_repetitions_scatter_less():
    """The inner projection is unbiased: repetitions average its error away."""
    pairs = list(near_pairs(20))
    exact = errors(Muvera(k_sim=4, repetitions=40, d_proj=48), pairs)
    scatter = [
        (errors(Muvera(k_sim=4, repetitions=r, d_proj=8), pairs) - exact).std() for r in (1, 8, 40)
    ]
    assert scatter[0] > 2 * scatter[1] > 2 * scatter[2]


def test_finds_the_page_that_max_sim_finds():
    """With the paper's parameters the right page of 200 is among the first five."""
    muvera = Muvera()
    pages = [tokens(80, 128, seed) for seed in range(200)]
    encoded = np.stack([muvera.encode_document(page) for page in pages])
    assert encoded.shape[1] == 10240
    random = np.random.default_rng(1)
    found = 0
    for right in range(0, 200, 10):
        query = pages[right][:15] + random.normal(size=(15, 128)).astype(np.float32) * 0.06
        query /= np.linalg.norm(query, axis=1, keepdims=True)
        assert np.argmax([max_sim(query, page) for page in pages]) == right
        found += right in np.argsort(-(encoded @ muvera.encode_query(query)))[:5]
    assert found >= 19


def test_parameters_that_make_no_sense_are_refused():
    for wrong in ({"k_sim": 0}, {"repetitions": 0}, {"d_proj": -1}, {"final_dim": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            Muvera(**wrong)
    with pytest.raises(ConfigError, match="give final_dim"):
        Muvera(k_sim=10)
    assert Muvera.from_json(Muvera(seed=3).to_json()) == Muvera(seed=3)
