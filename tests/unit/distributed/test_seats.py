"""A worker on another node or GPU than it was placed on is found, and named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_ray.distributed.bundles import Share
from rlhf_ray.distributed.seats import Found, Seat, check_seats
from rlhf_ray.distributed.tracing import Span, places_by_role
from rlhf_ray.errors import PlacementError


def seat(role: str, rank: int, *gpus: str, share: float = 1.0, node: str = "a", bundle: int = 0) -> Seat:
    found = Found(node, "10.0.0.1", gpus, gpus)
    return Seat(role, rank, Share(1, share), role == "policy", ("group", bundle), node, found)


def test_workers_in_their_places() -> None:
    check_seats(
        [
            seat("policy", 0, "3", share=0.5),
            seat("policy", 1, "5", share=0.5, bundle=1),
            seat("policy", 2, "3", node="b", bundle=2),
            seat("reference", 0, "3", share=0.5),
            seat("generator", 0, "6", "7", share=2, bundle=3),
            replace(seat("rule", 0, share=0, bundle=4), found=Found("a", "10.0.0.1", (), None)),
        ]
    )


def test_what_is_wrong_is_named() -> None:
    one = seat("policy", 0, "3")
    wrong = {
        r"policy rank 0 .* got node b; wanted node a": replace(one, found=replace(one.found, node="b")),
        r"policy rank 0 .* got GPUs 3, 4; wanted 1 GPU": seat("policy", 0, "3", "4"),
        r"policy rank 0 .* got no GPU; wanted 1 GPU": seat("policy", 0),
        r"generator rank 1 .* got GPU 3; wanted 2 GPUs": seat("generator", 1, "3", share=2),
        r"rule rank 0 .* got GPU 3; wanted 0 GPUs": seat("rule", 0, "3", share=0),
        r"policy rank 0 .* got CUDA_VISIBLE_DEVICES with GPUs 3, 4; wanted GPU 3": replace(
            one, found=replace(one.found, visible=("3", "4"))
        ),
        r"policy rank 0 .* got CUDA_VISIBLE_DEVICES with all GPUs; wanted GPU 3, which Ray": replace(
            one, found=replace(one.found, visible=None)
        ),
    }
    for message, found in wrong.items():
        with pytest.raises(PlacementError, match=message):
            check_seats([found])


def test_ranks_of_one_group_on_one_gpu() -> None:
    with pytest.raises(
        PlacementError, match=r"policy rank 1 .* got node 10.0.0.1, GPU 3; wanted another GPU .* rank 0"
    ):
        check_seats([seat("policy", 0, "3"), seat("policy", 1, "3", bundle=1)])


def test_a_guest_on_another_gpu_than_its_host() -> None:
    with pytest.raises(
        PlacementError, match=r"critic rank 1 .* got GPU 4; wanted GPU 3, which it shares with policy rank"
    ):
        check_seats([seat("policy", 0, "3"), seat("critic", 1, "4")])


def test_places_in_the_log() -> None:
    def placed(role: str, rank: int, place: str) -> Span:
        return Span(role, rank, "placed", 0.0, 0.0, place=place)

    other = Span("policy", 0, "start", 0.0, 1.0)
    laptop = "node 10.0.0.1, no GPU"
    assert places_by_role([placed("policy", 0, laptop), placed("rule", 0, laptop), other]) == []
    assert places_by_role(
        [
            placed("policy", 0, "node 10.0.0.1, GPU 3"),
            placed("policy", 1, "node 10.0.0.2, GPU 3"),
            placed("rule", 0, laptop),
            placed("rule", 1, laptop),
        ]
    ) == ["policy 0: node 10.0.0.1, GPU 3; 1: node 10.0.0.2, GPU 3", f"rule 0, 1: {laptop}"]
