"""Where a stage finds the data and the models of earlier stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_ray.config.schema import Pipeline
from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.errors import DataError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.plan import check_data
from rlhf_ray.stages.site import Site, known_before_start, load_data, stage_seed
from rlhf_ray.trainers.run import RunFolder
from tests.tiny_models import make_llama
from tests.unit.data.tokenizers_for_tests import CHATML


def pipeline(folder: Path, prompts: list[Any]) -> Pipeline:
    """Two rounds: pairs from a model, and DPO on them and on pairs that are there."""
    model = make_llama(folder / "llama")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    pair = {"prompt": "The film", "chosen": " was good", "rejected": " was bad"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair))
    collect = {
        "method": "collect",
        "reward": [{"kind": "function", "function": "a:b"}],
        "data": {"train": str(folder / "prompts.jsonl")},
    }
    data = {"train": [{"path": "stage:one", "rows": 2}, str(folder / "pairs.jsonl")]}
    stages = [
        collect | {"name": "one", "policy": {"model": model}},
        {"method": "dpo", "policy": {"model": model}, "data": data},
        collect | {"name": "two", "policy": {"model": "stage:dpo"}},
    ]
    return Pipeline.model_validate({"run_dir": str(folder / "run"), "stages": stages})


def site(config: Pipeline, folder: RunFolder) -> Site:
    cluster: Any = None
    return Site(config, folder, cluster, Recorder(), Path())


def test_data_of_an_earlier_stage_are_read_from_its_folder(tmp_path: Path) -> None:
    config = pipeline(tmp_path, ["The film", "The story"])
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
        (folder.path / "one/data").mkdir(parents=True)
        rows = [{"prompt": f"The {i}", "chosen": f" was {i}", "rejected": " is"} for i in range(3)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder.path / "one/data/part_000001.parquet")
        pairs = site(config, folder).data(config.stages[1], config.stages[1].policy.model)
    assert pairs.train.report["used"] == 3
    assert pairs.train.stream.steps_per_epoch(1) == 3


def test_only_what_is_there_is_checked_and_encoded_before_the_start(tmp_path: Path) -> None:
    config = pipeline(tmp_path, ["The film", "The story"])
    assert check_data(config) == {
        "one": {"train": 2, "evaluation": 0},
        "dpo": {"train": 1, "evaluation": 0},
        "two": {"train": 2, "evaluation": 0},
    }
    assert [stage.name for stage in known_before_start(config)] == ["one"]


def test_prompts_of_two_forms_are_found_before_the_start(tmp_path: Path) -> None:
    config = pipeline(tmp_path, ["The film"])
    stage = config.stages[0]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The film"}\n{"prompt": [{"role": "user", "content": "Hi"}]}\n')
    tokenizer = load_tokenizer(str(stage.policy.model))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(str(stage.policy.model))
    with pytest.raises(DataError, match="1 of 2 prompts are chat messages"):
        load_data(stage, str(stage.policy.model), 1)


def test_collect_stages_have_seeds_of_their_own(tmp_path: Path) -> None:
    one, dpo, two = pipeline(tmp_path, ["The film"]).stages
    assert stage_seed(dpo, 7) == 7
    assert len({stage_seed(one, 7), stage_seed(two, 7), stage_seed(one, 8), 7}) == 4


def test_the_version_of_a_model_is_the_length_of_its_stage(tmp_path: Path) -> None:
    config = pipeline(tmp_path, ["The film"])
    with RunFolder.create(tmp_path / "run", {"config.yaml": ""}) as folder:
        model = folder.path / "dpo/model"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        done = {"stage": "dpo", "iteration": 12, "output": "model", "best": None}
        (model.parent / "done.json").write_text(json.dumps(done | {"before": {}, "after": {}, "elapsed_s": 1.0}))
        here = site(config, folder)
        assert here.version("stage:dpo") == 12
        assert here.version("org/dpo") == 0
        assert here.model("stage:dpo") == str(model)
