from rlhf_ray.data.seeds import derive_seed


def test_seeds_are_the_same_everywhere() -> None:
    # b2sum -l 64 of nothing is e4a6a0577479b2b4, of "i1:7s1:a" eaba7ad83229cfee; halved.
    assert derive_seed() == 0xE4A6A0577479B2B4 // 2
    assert derive_seed(7, "a") == 0xEABA7AD83229CFEE // 2


def test_every_part_its_type_and_its_position_count() -> None:
    seeds = [
        derive_seed(*p) for p in [(1, 2), (2, 1), (12,), (1,), ("1",), ("1", 2), ("a", "bc"), ("ab", "c"), (-1, 2)]
    ]
    assert len(set(seeds)) == len(seeds)


def test_seeds_fit_a_signed_64_bit_number() -> None:
    seeds = [derive_seed("x", i) for i in range(2000)]
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert max(seeds) > 2**62  # the upper half of the range is used
