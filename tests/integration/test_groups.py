"""Groups of real Ray actors: order, errors, deadlines, placement, reuse, ending."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
import torch
from torch import Tensor

from rlhf_ray.data.batches import Batch
from rlhf_ray.distributed.groups import Place, arrivals, gather
from rlhf_ray.distributed.placement import Cluster, RoleRequest, Share
from rlhf_ray.errors import DataError, PlacementError, WeightSyncError, WorkerError

held: list[str] = []


@dataclass(frozen=True)
class Numbers(Batch):
    values: Tensor
    names: list[str]


class OddError(WeightSyncError):
    """An error whose constructor takes other arguments than its message."""

    def __init__(self, tensor: str, *, off_by: float) -> None:
        super().__init__(f"{tensor} is off by {off_by}")


class UnpicklableError(Exception):
    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__(function, "cannot travel")


class Worker:
    def __init__(self, place: Place, *, factor: float = 1.0, broken_rank: int = -1) -> None:
        if place.rank == broken_rank:
            raise ValueError("no such model")
        self.place = place
        self.factor = factor

    def scale(self, numbers: Numbers, offset: float = 0.0) -> tuple[Tensor, list[str]]:
        return numbers.values * self.factor + offset, [f"{name}@{self.place.rank}" for name in numbers.names]

    def rank(self) -> int:
        return self.place.rank

    def total(self, numbers: Numbers) -> float:
        return float(numbers.values.sum())

    def pid(self) -> int:
        return os.getpid()

    def environment(self, names: list[str]) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in names}

    def die(self, rank: int, seconds: float) -> None:
        if self.place.rank == rank:
            os.write(2, b"about to die\n")
            os._exit(7)
        time.sleep(seconds)

    def fail(self, kind: str) -> None:
        if kind == "value":
            raise ValueError("three is not a number of legs")
        if kind == "data":
            raise DataError("prompts.jsonl:3: got a list, wanted a string")
        if kind == "unpicklable":
            raise UnpicklableError(lambda: None)
        raise OddError("lm_head.weight", off_by=0.5)

    def unsendable(self) -> object:
        return threading.Lock()

    def nap(self, rank: int, seconds: float) -> None:
        if self.place.rank == rank:
            time.sleep(seconds)

    def speak(self) -> list[str]:
        """Prints and logs; where that went."""
        print("in brief", flush=True)
        logging.getLogger("somebody").warning("at length")
        return [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)]

    def hold(self, name: str) -> None:
        held.append(name)

    def held(self) -> list[str]:
        return list(held)

    def close(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def reduce(self) -> float:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo")
        value = torch.tensor([float(self.place.rank + 1)])
        dist.all_reduce(value)
        return float(value)


NUMBERS = Numbers(torch.arange(5.0), list("abcde"))


def test_split_cuts_rows_in_order_and_merges_them(cluster: Cluster) -> None:
    with cluster.reserve([RoleRequest("policy", 2, reuse="tests")]) as placement:
        group = placement.start("policy", Worker, factor=2.0)
        scaled, names = group.split(Worker.scale, NUMBERS, offset=1.0).result()
        assert scaled.tolist() == [1, 3, 5, 7, 9]
        assert names == ["a@0", "b@0", "c@0", "d@1", "e@1"]
        _, names = group.split(Worker.scale, NUMBERS.select([0])).result()
        assert names == ["a@0"]
        _, names = group.split_groups(2, Worker.scale, NUMBERS.select(range(4))).result()
        assert names == ["a@0", "b@0", "c@1", "d@1"]
        assert group.all(Worker.total, NUMBERS).result() == [10.0, 10.0]
        assert group.first(Worker.rank).result() == 0
        assert gather(group.all(Worker.rank), group.first(Worker.total, NUMBERS)) == ([0, 1], 10.0)


def test_results_in_the_order_of_arrival(cluster: Cluster) -> None:
    """A worker answers in the order of its calls; the other one does not wait for it."""
    with cluster.reserve([RoleRequest("policy", 2, reuse="tests")]) as placement:
        group = placement.start("policy", Worker)
        calls = [group.one(0, Worker.nap, 0, 0.3), group.one(0, Worker.rank), group.one(1, Worker.rank)]
        assert list(arrivals(*calls, group.all(Worker.rank))) == [(2, 1), (0, None), (1, 0), (3, [0, 1])]
        late = group.one(1, Worker.nap, 1, 60)
        with pytest.raises(WorkerError, match=r"policy rank 0, fail: ValueError: three"):
            list(arrivals(late, group.one(0, Worker.fail, "value")))


def test_a_collective_group_calls_every_rank(cluster: Cluster) -> None:
    with cluster.reserve([RoleRequest("policy", 2, rendezvous=True, reuse="tests")]) as placement:
        group = placement.start("policy", Worker)
        cluster.recorder.drain()
        _, names = group.split(Worker.scale, NUMBERS.select([4])).result()
        assert names == ["e@0"]
        assert [(span.rank, span.method) for span in cluster.recorder.drain()] == [(0, "scale"), (1, "scale")]


def test_workers_of_a_rendezvous_meet(cluster: Cluster) -> None:
    with cluster.reserve([RoleRequest("policy", 2, rendezvous=True, reuse="tests")]) as placement:
        group = placement.start("policy", Worker)
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
        zero, one = group.all(Worker.environment, names).result()
        assert (zero["RANK"], one["RANK"]) == ("0", "1")
        assert zero["WORLD_SIZE"] == one["WORLD_SIZE"] == "2"
        assert (zero["LOCAL_RANK"], one["LOCAL_RANK"]) == ("0", "1")
        assert zero["LOCAL_WORLD_SIZE"] == one["LOCAL_WORLD_SIZE"] == "2"
        assert zero["MASTER_PORT"] == one["MASTER_PORT"]
        assert zero["MASTER_ADDR"] == one["MASTER_ADDR"]
        assert group.all(Worker.reduce).result() == [3.0, 3.0]


def test_lines_of_a_worker_carry_its_role_and_rank(cluster: Cluster) -> None:
    for role in ("policy", "critic"):
        with cluster.reserve([RoleRequest(role, 2, reuse="tests")]) as placement:
            spoken = placement.start(role, Worker).all(Worker.speak).result()
        for rank, files in enumerate(spoken):
            out, err = (Path(file).read_text().splitlines()[-1] for file in files)
            assert (out, err) == (f"[{role} {rank}] in brief", f"[{role} {rank}] at length")


def test_a_dead_worker_is_named_and_the_others_are_not_waited_for(cluster: Cluster) -> None:
    with cluster.reserve([RoleRequest("critic", 2, reuse="tests")]) as placement:
        group = placement.start("critic", Worker)
        gather(group.ready)
        start = time.monotonic()
        with pytest.raises(
            WorkerError, match=r"critic rank 1, die: the worker died: its worker process has died"
        ) as caught:
            group.all(Worker.die, 1, 60.0).result()
        assert time.monotonic() - start < 3
        assert "about to die" in str(caught.value)


def test_a_death_ends_the_wait_for_another_group(cluster: Cluster) -> None:
    with cluster.reserve([RoleRequest("critic", reuse="tests"), RoleRequest("reward", reuse="tests")]) as placement:
        critic, reward = placement.start("critic", Worker), placement.start("reward", Worker)
        gather(critic.ready, reward.ready)
        start = time.monotonic()
        with pytest.raises(WorkerError, match=r"reward rank 0, die"):
            gather(critic.all(Worker.nap, 0, 60.0), reward.all(Worker.die, 0, 0.0))
        assert time.monotonic() - start < 3
        assert cluster.recorder.active() == []


def test_a_constructor_that_raises_is_named(cluster: Cluster) -> None:
    with cluster.reserve([RoleRequest("policy", 2, reuse="tests")]) as placement:
        group = placement.start("policy", Worker, broken_rank=1)
        with pytest.raises(WorkerError, match=r"policy rank 1, start: ValueError: no such model") as caught:
            gather(group.ready)
        assert 'raise ValueError("no such model")' in str(caught.value)
        with pytest.raises(WorkerError, match=r"policy rank 1, rank: ValueError: no such model"):
            group.all(Worker.rank).result()


def test_errors_of_this_package_keep_their_class(cluster: Cluster) -> None:
    with cluster.reserve([RoleRequest("reward", reuse="tests")]) as placement:
        group = placement.start("reward", Worker)
        with pytest.raises(DataError, match=r"^reward rank 0, fail: prompts.jsonl:3: got a list, wanted a string$"):
            group.first(Worker.fail, "data").result()
        with pytest.raises(OddError, match=r"^reward rank 0, fail: lm_head.weight is off by 0.5") as caught:
            group.first(Worker.fail, "odd").result()
        assert "raise OddError" in caught.value.__notes__[0]
        with pytest.raises(WorkerError, match=r"reward rank 0, fail: ValueError: three is not") as worker_error:
            group.first(Worker.fail, "value").result()
        assert "in fail" in str(worker_error.value)
        with pytest.raises(WorkerError, match=r"reward rank 0, fail: UnpicklableError: .*cannot travel"):
            group.first(Worker.fail, "unpicklable").result()
        with pytest.raises(WorkerError, match=r"reward rank 0, unsendable: .*pickle"):
            group.first(Worker.unsendable).result()
        assert group.first(Worker.rank).result() == 0


def test_a_missed_deadline_names_who_is_late(cluster: Cluster) -> None:
    with (
        Cluster(call_timeout_s=0.5, start_timeout_s=60) as impatient,
        impatient.reserve([RoleRequest("critic", 2, reuse="tests")]) as placement,
    ):
        group = placement.start("critic", Worker)
        gather(group.ready)
        with pytest.raises(
            WorkerError, match=r"critic rank 1, nap: no answer within 0.5 s \(placement.call_"
        ) as caught:
            group.all(Worker.nap, 1, 30.0).result()
    assert re.search(r"It is here\. .*line \d+ in nap", str(caught.value), re.DOTALL)
    assert ray.is_initialized()


def test_a_shortage_is_an_error_at_once(cluster: Cluster) -> None:
    start = time.monotonic()
    with pytest.raises(PlacementError, match=r"policy needs 4 GPUs; 0 of 0 are free"):
        cluster.reserve([RoleRequest("policy", 4, gpus=1), RoleRequest("reward")])
    with (
        cluster.reserve([RoleRequest("policy", 3)]),
        pytest.raises(PlacementError, match=r"critic needs 2 CPUs; 1 of 4 are free"),
    ):
        cluster.reserve([RoleRequest("critic", 2, cpus=1)])
    assert time.monotonic() - start < 5


def test_cores_are_shared_by_fractions(cluster: Cluster) -> None:
    with cluster.reserve(
        [RoleRequest("policy", 4), RoleRequest("generator", cpus=2), RoleRequest("reward")]
    ) as placement:
        assert placement.share("policy") == Share(0.4, 0.0)
        assert placement.share("generator") == Share(2.0, 0.0)
        assert len(set(placement.nodes("policy"))) == 1
        generator = placement.start("generator", Worker)
        reward = placement.start("reward", Worker)
        names = ["OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"]
        two, one = gather(
            generator.first(Worker.environment, names),
            reward.first(Worker.environment, names),
        )
        assert two["OMP_NUM_THREADS"] == "2"
        assert one["OMP_NUM_THREADS"] == "1"
        assert one["MALLOC_TRIM_THRESHOLD_"] == "268435456"
        assert one["CUDA_VISIBLE_DEVICES"] == ""
        assert one["DS_ACCELERATOR"] == "cpu"


def test_a_kept_host_serves_the_next_group(cluster: Cluster) -> None:
    labels = {"pool": "!other"}
    request = RoleRequest("generator", 1, env={"COLOUR": "red"}, reuse="test", node_labels=labels)
    with cluster.reserve([request, RoleRequest("policy")]) as placement:
        first = placement.start("generator", Worker, factor=2.0)
        first.first(Worker.hold, "engine").result()
        pid = first.first(Worker.pid).result()
    with cluster.reserve([request]) as placement:
        second = placement.start("generator", Worker, factor=3.0)
        assert second.first(Worker.pid).result() == pid
        assert second.first(Worker.held).result() == ["engine"]
        assert second.first(Worker.scale, Numbers(torch.ones(1), ["a"])).result()[0].tolist() == [3.0]
    with cluster.reserve([RoleRequest("generator", 2, env={"COLOUR": "blue"}, reuse="test")]) as placement:
        assert pid not in placement.start("generator", Worker).all(Worker.pid).result()
    # Four cores wanted: the idle hosts give way.
    with cluster.reserve([RoleRequest("policy", 4, cpus=1)]):
        assert not psutil.pid_exists(pid)


def test_no_process_is_left(cluster: Cluster) -> None:
    with cluster.reserve([RoleRequest("policy", 2), RoleRequest("reward")]) as placement:
        policy, reward = placement.start("policy", Worker), placement.start("reward", Worker)
        pids, more = gather(policy.all(Worker.pid), reward.all(Worker.pid))
        reward.first(Worker.nap, 0, 60.0)
        assert all(psutil.pid_exists(pid) for pid in pids + more)
    assert not any(psutil.pid_exists(pid) for pid in pids + more)
    policy.close()
    with cluster.reserve([RoleRequest("policy", 4, cpus=1)]):
        pass
