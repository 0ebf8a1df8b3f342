"""What was used last is kept, and nothing else."""

from mpillama.backends.recent import Recent


def test_what_was_used_least_recently_goes_first(rng):
    kept, used = Recent(5), []
    for key in rng.integers(0, 12, 2000).tolist():
        value = kept.get(key)
        assert (value is not None) == (key in used[-5:])
        if value is None:
            kept.put(key, value := [key])
        assert value == [key]
        used = [*(other for other in used if other != key), key]
    assert len(kept) == 5
