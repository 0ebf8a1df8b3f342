"""Cuts: partitions in proportion, on the coarsest grain that is even enough, with nobody left empty without need."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mpillama.errors import UsageError
from mpillama.layout import Cut, apportion, check_weights, split, split_heads

weights_ = st.lists(st.floats(0.05, 20), min_size=1, max_size=9)


@given(size=st.integers(1, 5000), weights=weights_)
def test_split_is_a_partition_in_order(size, weights):
    cut = split(size, weights)
    assert cut.ranges[0][0] == 0
    assert cut.ranges[-1][1] == size
    for (_, stop), (start, _) in zip(cut.ranges, cut.ranges[1:], strict=False):
        assert stop == start


@given(size=st.integers(1, 5000), weights=weights_)
def test_nobody_is_empty_where_a_finer_cut_exists(size, weights):
    cut = split(size, weights)
    if size >= len(weights):
        assert all(cut.width(rank) > 0 for rank in range(len(weights)))
    else:
        assert sum(cut.width(rank) > 0 for rank in range(len(weights))) >= 1


@given(n_units=st.integers(0, 400), weights=weights_)
def test_apportion_is_within_one_unit_of_the_ideal_unless_it_feeds_the_empty(n_units, weights):
    counts = apportion(n_units, weights)
    assert sum(counts) == n_units
    ideal = [n_units * w / sum(weights) for w in weights]
    if all(x >= 1 for x in ideal):
        assert all(abs(count - x) < 1 for count, x in zip(counts, ideal, strict=True))


@pytest.mark.parametrize(
    ("size", "weights", "expected"),
    [
        (768, [1] * 4, (192, 192, 192, 192)),  # 256-wide grains would leave the last rank empty
        (768, [1] * 2, (384, 384)),
        (14336, [1] * 4, (3584,) * 4),
        (8192, [1] * 3, (2816, 2816, 2560)),  # 3 % off the ideal, and whole blocks
        (172, [1] * 4, (44, 44, 44, 40)),
        (384, [3, 1], (288, 96)),
        (8192, [3, 1], (6144, 2048)),
        (2, [1] * 4, (1, 1, 0, 0)),
        (10, [1, 0, 1], (5, 0, 5)),
    ],
)
def test_known_cuts(size, weights, expected):
    cut = split(size, weights)
    assert tuple(cut.width(rank) for rank in range(len(weights))) == expected


@pytest.mark.parametrize(
    ("n_head", "n_head_kv", "n_ranks", "q", "kv"),
    [
        (32, 8, 4, [(0, 8), (8, 16), (16, 24), (24, 32)], [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (32, 8, 3, [(0, 12), (12, 24), (24, 32)], [(0, 3), (3, 6), (6, 8)]),
        # More ranks than KV heads: neighbours hold the same one.
        (8, 2, 4, [(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (14, 2, 3, [(0, 5), (5, 10), (10, 14)], [(0, 1), (0, 2), (1, 2)]),
        # Whole groups would give one rank twice the work of the others.
        (32, 4, 3, [(0, 11), (11, 22), (22, 32)], [(0, 2), (1, 3), (2, 4)]),
        # Nothing finer than a head exists.
        (2, 2, 4, [(0, 1), (1, 2), (2, 2), (2, 2)], [(0, 1), (1, 2), (2, 2), (2, 2)]),
        (2, 1, 4, [(0, 1), (1, 2), (2, 2), (2, 2)], [(0, 1), (0, 1), (1, 1), (1, 1)]),
    ],
)
def test_known_head_cuts(n_head, n_head_kv, n_ranks, q, kv):
    cut_q, cut_kv = split_heads(n_head, n_head_kv, [1.0] * n_ranks)
    assert list(cut_q.ranges) == q
    assert list(cut_kv.ranges) == kv


@given(group=st.integers(1, 8), n_head_kv=st.integers(1, 16), weights=weights_)
def test_every_rank_holds_the_kv_heads_of_its_queries(group, n_head_kv, weights):
    q, kv = split_heads(group * n_head_kv, n_head_kv, weights)
    for (start, stop), (first, last) in zip(q.ranges, kv.ranges, strict=True):
        for head in range(start, stop):
            assert first <= head // group < last
        assert stop > start or first == last
    assert q.ranges[-1][1] == group * n_head_kv
    owned = [head for start, stop in kv.owned for head in range(start, stop)]
    assert owned == list(range(n_head_kv))


def test_owned_drops_overlaps_only():
    assert Cut(4, ((0, 2), (1, 3), (2, 4), (4, 4))).owned == ((0, 2), (2, 3), (3, 4), (4, 4))


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1, 2], "names 2 shares but there are 3 ranks"), ([1, -1, 1], "at least 0"), ([0, 0, 0], "one above 0")],
)
def test_wrong_weights(weights, message):
    with pytest.raises(UsageError, match=message):
        check_weights(weights, 3)


def test_weights_default_to_equal_shares():
    assert check_weights((), 3) == (1.0, 1.0, 1.0)
