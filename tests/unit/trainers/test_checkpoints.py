import json
import logging
import os
from pathlib import Path

import pytest

from rlhf_ray.config import schema
from rlhf_ray.errors import CheckpointError
from rlhf_ray.trainers import durable
from rlhf_ray.trainers.checkpoints import (
    CheckpointHandle,
    Checkpoints,
    RunState,
    check_settings,
    flatten,
    result_settings,
)


def state(iteration: int, **settings: object) -> RunState:
    return RunState(stage="ppo", iteration=iteration, settings=settings, trainer={"kl": {"coefficient": 0.1 + 0.2}})


def parts(text: str = "weights"):
    def save(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "rank_0.bin").write_bytes(text.encode())

    return save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.write(state(10, lr=1e-5), parts())
    handle = checkpoints.newest()
    assert handle.iteration == 10
    assert handle.folder == tmp_path / "iteration_000010"
    assert handle.state == state(10, lr=1e-5)
    assert handle.state.trainer["kl"]["coefficient"] == 0.30000000000000004
    assert (handle.folder / "policy" / "rank_0.bin").read_text() == "weights"
    manifest = json.loads((handle.folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"state.json", "policy/rank_0.bin"}
    assert manifest["files"]["policy/rank_0.bin"]["size"] == 7


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "absent", keep=1).newest() is None


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for iteration in (1, 2, 3, 10):
        checkpoints.write(state(iteration), parts())
    assert names(tmp_path) == ["iteration_000003", "iteration_000010"]


def test_later_ones_of_a_course_that_was_given_up_go(tmp_path):
    Checkpoints(tmp_path, keep=5).write(state(9), parts())
    Checkpoints(tmp_path, keep=5).write(state(4), parts())
    assert names(tmp_path) == ["iteration_000004"]


def test_the_same_iteration_can_be_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.write(state(4), parts("old"))
    checkpoints.write(state(4), parts("new"))
    assert (checkpoints.newest().folder / "policy" / "rank_0.bin").read_text() == "new"
    assert names(tmp_path) == ["iteration_000004"]


def test_a_failed_write_leaves_the_earlier_one_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.write(state(1), parts())

    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoints.write(state(2), fails)
    assert checkpoints.newest().iteration == 1
    checkpoints.clean()
    assert names(tmp_path) == ["iteration_000001"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_step_leaves_an_intact_newest(tmp_path, monkeypatch, overwrite):
    """Dies at the n-th sync, rename or removal, for every n: the newest is then the old or the new one."""
    steps = {"left": 0}
    step_names = [(Path, "rename"), (Path, "replace"), (durable, "sync_path"), (durable.shutil, "rmtree")]
    originals = {(owner, name): getattr(owner, name) for owner, name in step_names}

    def dying(original):
        def call(*args, **kwargs):
            if steps["left"] == 0:
                raise Killed
            steps["left"] -= 1
            return original(*args, **kwargs)

        return call

    found = []
    for number in range(60):
        folder = tmp_path / str(number)
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.write(state(1), parts("old"))
        with monkeypatch.context() as patch:
            for (owner, name), original in originals.items():
                patch.setattr(owner, name, dying(original))
            steps["left"] = number
            try:
                checkpoints.write(state(1 if overwrite else 2), parts("new"))
                finished = True
            except Killed:
                finished = False
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.clean()
        handle = checkpoints.newest()
        content = (handle.folder / "policy" / "rank_0.bin").read_text()
        assert content in ("old", "new")
        found.append(content)
        if finished:
            break
    assert finished
    assert content == "new"
    assert len(set(found)) == 2
    assert found == sorted(found, reverse=True), "once new, a later kill does not bring the old one back"


def test_what_a_kill_left_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.write(state(1), parts())
    partial = tmp_path / "iteration_000002.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    assert checkpoints.newest().iteration == 1
    checkpoints.clean()
    assert names(tmp_path) == ["iteration_000001"]


def truncate(folder: Path) -> str:
    os.truncate(folder / "policy" / "rank_0.bin", 3)
    return "rank_0.bin: 3 bytes, the manifest says 7"


def flip(folder: Path) -> str:
    (folder / "policy" / "rank_0.bin").write_text("weightz")
    return "rank_0.bin: its SHA-256"


def remove(folder: Path) -> str:
    (folder / "policy" / "rank_0.bin").unlink()
    return "rank_0.bin: missing"


def add(folder: Path) -> str:
    (folder / "policy" / "extra.pt").write_text("payload")
    return "extra.pt: not in the manifest"


def no_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json: missing"


def torn_manifest(folder: Path) -> str:
    os.truncate(folder / "manifest.json", 20)
    return "manifest.json: cannot be read"


def link(folder: Path) -> str:
    (folder / "policy" / "link").symlink_to("/etc/hostname")
    return "link: neither a plain file nor a folder"


@pytest.mark.parametrize("damage", [truncate, flip, remove, add, no_manifest, torn_manifest, link])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, caplog, damage):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.write(state(1), parts())
    checkpoints.write(state(2), parts())
    message = damage(tmp_path / "iteration_000002")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.verify(tmp_path / "iteration_000002")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest().iteration == 1
    assert "iteration_000002" in caplog.text


def test_when_all_are_broken_nothing_starts_from_scratch(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.write(state(1), parts())
    flip(tmp_path / "iteration_000001")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact"):
        checkpoints.newest()


def test_a_renamed_folder_is_found(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.write(state(1), parts())
    (tmp_path / "iteration_000001").rename(tmp_path / "iteration_000007")
    with pytest.raises(CheckpointError, match="renamed"):
        checkpoints.verify(tmp_path / "iteration_000007")


def test_a_state_of_another_version_is_a_plain_error(tmp_path):
    with pytest.raises(CheckpointError, match="not the state of a run of this version"):
        RunState.from_json({"stage": "ppo", "unheard_of": 1}, source=tmp_path)


def test_other_settings_are_refused_by_name(tmp_path):
    handle = CheckpointHandle(1, tmp_path, state(1, lr=1e-5, seed=1, old=True))
    check_settings(handle, {"lr": 1e-5, "seed": 1, "old": True})
    with pytest.raises(CheckpointError) as raised:
        check_settings(handle, {"lr": 2e-5, "seed": 1, "new": None})
    text = str(raised.value)
    assert "lr: was 1e-05, is 2e-05" in text
    assert "old: was true, is not set" in text
    assert "seed" not in text


def ppo(**changes: object) -> schema.Ppo:
    values = {
        "method": "ppo",
        "iterations": 10,
        "policy": {"model": "m"},
        "reward": [{"kind": "function", "function": "a:b"}],
        "data": {"train": "x.jsonl"},
    }
    return schema.Ppo.model_validate(values | changes)


def test_flatten():
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": None, "e": []}) == {"a.b.0": 1, "a.b.1.c": 2, "d": None, "e": []}


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"iterations": 20}, True),
        ({"generator": {"workers": 4}}, True),
        ({"policy": {"model": "m", "gpus": 0.5}}, True),
        ({"policy": {"model": "m", "micro_batch_tokens": 99}}, True),
        ({"policy": {"model": "m", "node_labels": {"pool": "large", "example.org/zone": "!a"}}}, True),
        ({"checkpoints": {"every": 3}}, True),
        ({"reward": [{"kind": "function", "function": "a:b", "workers": 3}]}, True),
        ({"policy": {"model": "m", "workers": 2}}, False),
        ({"policy": {"model": "m", "zero": 2}}, False),
        ({"prompts_per_iteration": 9}, False),
        ({"epochs": 3}, False),
        ({"reward": [{"kind": "function", "function": "a:b", "weight": 3.0}]}, False),
    ],
)
def test_which_settings_may_change_on_resume(change, allowed):
    assert (result_settings(ppo(), seed=1) == result_settings(ppo(**change), seed=1)) is allowed


def test_where_the_reference_is_remembered_may_change():
    values = {"method": "dpo", "policy": {"model": "m"}, "data": {"train": "x.jsonl"}}
    before = result_settings(schema.Dpo.model_validate(values), seed=1)
    assert before == result_settings(schema.Dpo.model_validate(values | {"cache_dir": "elsewhere"}), seed=1)
    assert before == result_settings(schema.Dpo.model_validate(values | {"cache": False}), seed=1)
    assert before != result_settings(schema.Dpo.model_validate(values | {"loss": {"beta": 0.2}}), seed=1)


def test_the_seed_may_not_change():
    assert result_settings(ppo(), seed=1) != result_settings(ppo(), seed=2)


def test_the_length_counts_where_the_learning_rate_depends_on_it():
    linear = {"policy": {"model": "m", "optimizer": {"schedule": "linear"}}}
    assert result_settings(ppo(**linear), seed=1) != result_settings(ppo(**linear, iterations=20), seed=1)
