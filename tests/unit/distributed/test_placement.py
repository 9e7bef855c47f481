"""The arithmetic of placement, and the environment of a worker."""

import socket

import pytest

from rlhf_ray.distributed import placement
from rlhf_ray.distributed.bundles import Capacity, NodeShare, RoleRequest, Share, fit
from rlhf_ray.distributed.connection import Slot
from rlhf_ray.distributed.environment import worker_environment
from rlhf_ray.distributed.placement import Cluster, Growth
from rlhf_ray.distributed.rendezvous import Meeting, environment
from rlhf_ray.errors import ConfigError, PlacementError

GPU_BOX = Capacity(cpus=32, gpus=8, free_cpus=32, free_gpus=2, nodes=[NodeShare(32, 8)])
LAPTOP = Capacity(cpus=2, gpus=0, free_cpus=2, free_gpus=0, nodes=[NodeShare(2, 0)])


def shares(
    requests: list[RoleRequest], capacity: Capacity, *, strategy: str = "PACK", wait: bool = False
) -> dict[str, Share]:
    return dict(fit(requests, capacity, strategy=strategy, may_wait=wait).workers)


def test_unset_cores_are_one_each_where_they_fit() -> None:
    assert shares([RoleRequest("policy", 2)], LAPTOP) == {"policy": Share(1, 0)}


def test_unset_cores_are_equal_fractions_where_they_do_not_fit() -> None:
    roles = [RoleRequest("policy", 2), RoleRequest("critic"), RoleRequest("generator", cpus=1)]
    assert shares(roles, LAPTOP) == {"policy": Share(0.33, 0), "critic": Share(0.33, 0), "generator": Share(1, 0)}
    four = Capacity(cpus=4, gpus=0, free_cpus=4, free_gpus=0, nodes=[NodeShare(4, 0)])
    assert shares([RoleRequest("policy", 3), RoleRequest("generator", 2, cpus=1)], four)["policy"] == Share(0.66, 0)


def test_unset_gpus_are_one_each_where_there_are_any() -> None:
    assert shares([RoleRequest("policy", 2), RoleRequest("reward", gpus=0)], GPU_BOX) == {
        "policy": Share(1, 1),
        "reward": Share(1, 0),
    }


def test_unset_gpus_are_equal_fractions_where_there_are_fewer() -> None:
    one = Capacity(cpus=16, gpus=1, free_cpus=16, free_gpus=1, nodes=[NodeShare(16, 1)])
    roles = [RoleRequest(name, rendezvous=name == "policy") for name in ("policy", "reference", "generator")]
    assert set(shares(roles, one).values()) == {Share(1, 0.33)}
    assert shares([*roles, RoleRequest("critic")], GPU_BOX)["critic"] == Share(1, 0.5)


def test_unset_gpus_are_one_each_where_others_hold_all_of_them() -> None:
    """A cluster whose GPUs are taken is none without GPUs."""
    taken = Capacity(cpus=16, gpus=2, free_cpus=16, free_gpus=0, nodes=[NodeShare(16, 2)])
    with pytest.raises(PlacementError, match=r"^policy needs 1 GPU; 0 of 2 are free"):
        shares([RoleRequest("policy")], taken)
    assert shares([RoleRequest("policy")], taken, wait=True) == {"policy": Share(1, 1)}


def test_unset_gpus_are_parts_of_all_of_them_where_they_are_not_ours_alone() -> None:
    one_left = Capacity(cpus=16, gpus=2, free_cpus=16, free_gpus=1, nodes=[NodeShare(16, 2)])
    roles = [RoleRequest("policy"), RoleRequest("reference")]
    assert set(shares(roles, one_left).values()) == {Share(1, 0.5)}
    with pytest.raises(PlacementError, match=r"^policy needs 1 GPU, reference needs 1 GPU .*; 1 of 2 are free"):
        fit(roles, one_left, strategy="PACK", may_wait=False, of_all=True)


class Idle:
    """A connection of our own with two GPUs, some of them held by idle engines of one GPU each."""

    ours = True

    def __init__(self, engines: int) -> None:
        share = Share(1, 1)
        self.idle = [Slot(None, 0, share, share)] * engines  # type: ignore[arg-type]

    def capacity(self) -> Capacity:
        held = len(self.idle)
        return Capacity(16, 2, 16 - held, 2 - held, [NodeShare(16, 2)])

    def evict(self) -> None:
        self.idle = self.idle[1:]


@pytest.mark.parametrize(("engines", "workers", "kept"), [(1, 1, 1), (1, 2, 0), (2, 1, 1), (2, 2, 0), (0, 3, 0)])
def test_idle_engines_end_before_others_share_a_gpu(engines: int, workers: int, kept: int) -> None:
    connection = Idle(engines)
    found = Cluster("local")._fit(connection, [RoleRequest("reference", workers)])  # type: ignore[arg-type]
    assert found.workers["reference"] == Share(1, 1 if workers < 3 else 0.5)
    assert len(connection.idle) == kept


def test_threads_share_an_arena_before_ray_has_any(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(placement, "share_one_arena", lambda: done.append("arena"))
    monkeypatch.setattr(placement, "start_ray", lambda *args: done.append("ray"))
    monkeypatch.setattr(placement.ray, "is_initialized", lambda: False)
    Cluster("local")._connect()
    assert done == ["arena", "ray"]


def test_room_that_is_not_there_yet_is_looked_for_once_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    monkeypatch.setattr(placement, "is_placed", lambda group: bool(looks.append(group)))
    monkeypatch.setattr(placement, "_NEW_ROOM_S", -1.0)
    share = Share(1, 0)
    asked = [Slot(name, 0, share, share) for name in ("a", "b")]  # type: ignore[arg-type]
    growth = Growth[object](
        None,  # type: ignore[arg-type]
        "generator",
        ready=[],
        asked=asked,
        lacking=0,
        deadline_s=60.0,
    )
    growth.build()
    growth.build()
    assert looks == ["a", "b", "a", "b"]
    assert growth.missing == 2


def test_two_ranks_of_one_group_do_not_share_a_gpu() -> None:
    with pytest.raises(PlacementError, match=r"policy has 2 workers with 0\.5 GPUs each: NCCL wants a whole GPU"):
        shares([RoleRequest("policy", 2, gpus=0.5, rendezvous=True)], GPU_BOX)


def test_a_shortage_names_role_wanted_and_free() -> None:
    with pytest.raises(PlacementError, match=r"^policy needs 4 GPUs; 2 of 8 are free\. "):
        shares([RoleRequest("policy", 4, rendezvous=True), RoleRequest("reward", gpus=0)], GPU_BOX)
    with pytest.raises(
        PlacementError, match=r"^policy needs 2 GPUs, critic needs 0.5 GPUs \(2.5 GPUs together\); 2 of 8"
    ):
        shares([RoleRequest("policy", 2, rendezvous=True), RoleRequest("critic", gpus=0.5)], GPU_BOX)
    with pytest.raises(PlacementError, match=r"^generator needs 3 CPUs; 2 of 2 are free"):
        shares([RoleRequest("generator", cpus=3)], LAPTOP)
    with pytest.raises(PlacementError, match=r"generator needs 2 CPUs, policy needs 1 CPU \(3 CPUs together\)"):
        shares([RoleRequest("generator", cpus=2), RoleRequest("policy")], LAPTOP)


def test_what_may_become_free_is_not_refused() -> None:
    assert shares([RoleRequest("policy", 4, gpus=1)], GPU_BOX, wait=True) == {"policy": Share(1, 1)}
    with pytest.raises(PlacementError, match=r"policy needs 9 GPUs; 2 of 8 are free"):
        shares([RoleRequest("policy", 9, gpus=1)], GPU_BOX, wait=True)


def test_what_no_node_can_hold_is_refused() -> None:
    two = Capacity(cpus=8, gpus=2, free_cpus=8, free_gpus=2, nodes=[NodeShare(4, 1), NodeShare(4, 1)])
    with pytest.raises(PlacementError, match=r"^policy: one worker needs 1 CPU and 2 GPUs on one node; the largest"):
        shares([RoleRequest("policy", gpus=2)], two)
    with pytest.raises(PlacementError, match=r"STRICT_SPREAD puts each worker on its own node: 3 workers, 2 nodes"):
        shares([RoleRequest("policy", 3, gpus=0)], two, strategy="STRICT_SPREAD")
    with pytest.raises(PlacementError, match=r"all roles on one node \(placement.strategy STRICT_PACK\)"):
        shares([RoleRequest("policy", 2)], two, strategy="STRICT_PACK")


def test_worker_environment_pins_threads_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "5")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    variables = worker_environment(Share(0.5, 0), {"VLLM_LOGGING_LEVEL": "WARNING"})
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["CUDA_VISIBLE_DEVICES"] == ""
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert variables["VLLM_LOGGING_LEVEL"] == "WARNING"
    assert "HF_TOKEN" not in variables
    assert variables["OMP_WAIT_POLICY"] == "passive"
    assert variables["MALLOC_TRIM_THRESHOLD_"] == "5"
    on_gpu = worker_environment(Share(4.5, 1), {})
    assert on_gpu["OMP_NUM_THREADS"] == "4"
    assert "CUDA_VISIBLE_DEVICES" not in on_gpu


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "got 'ray://head:10001', wanted HOST:PORT"),
        ("head", "got 'head', wanted HOST:PORT"),
        ("127.0.0.1:1", "got '127.0.0.1:1', but nothing answers there"),
    ],
)
def test_an_address_without_a_cluster_is_the_users_error(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a whole test run the integration tests' cluster is open, and would be joined.
    monkeypatch.setattr(placement, "_connection", None)
    monkeypatch.setattr(placement.ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=f"^placement.address: {message}"), Cluster(address):
        pass


def test_the_port_of_a_meeting_is_held_and_can_be_taken_by_a_server() -> None:
    meeting = Meeting("127.0.0.1")
    _, port = meeting.address
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    with socket.create_server(("", port)):
        meeting.release()


def test_rendezvous_variables() -> None:
    variables = environment(("10.0.0.1", 4321), rank=1, size=4, local=(1, 2), node="127.0.0.1")
    assert variables.pop("GLOO_SOCKET_IFNAME", "lo") == "lo"
    assert variables == {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "4321",
    }
