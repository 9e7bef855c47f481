"""What travels to a cluster, under which name, and what is refused for its size."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.config.load import load_pipeline
from rlhf_ray.config.schema import FunctionReward, Pipeline, Ppo
from rlhf_ray.errors import ConfigError
from rlhf_ray.submission.upload import Upload, in_words, prepare, remote_run_dir, write

PIPELINE = """\
run_dir: runs/test
placement: {address: auto}
method: ppo
iterations: 10
policy: {model: models/tiny}
reward:
  - {kind: function, name: length, function: "rewards:length", arguments: {path: prompts.jsonl}}
  - {kind: model, name: learned, model: org/on-the-hub}
data: {train: [prompts.jsonl, "synthetic:reviews"], evaluation: prompts.jsonl}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline in a folder of its own; data and model beside that folder, where the user is."""
    folder = tmp_path / "project"
    (folder / "own" / "__pycache__").mkdir(parents=True)
    (folder / "tiny.yaml").write_text(PIPELINE)
    (folder / "rewards.py").write_text("import json\nfrom own.words import count\nimport numpy\nlength = count\n")
    (folder / "unused.py").write_text("x = 1\n")
    (folder / "own" / "__init__.py").write_text("")
    (folder / "own" / "words.py").write_text("import helper\nimport rlhf_ray.errors\ncount = helper.count\n")
    (folder / "own" / "__pycache__" / "words.pyc").write_text("x" * 5000)
    (folder / "helper.py").write_text("import rewards\ndef count(prompts, responses, answers): return [1.0]\n")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    (tmp_path / "models" / "tiny" / ".hidden").write_text("x" * 5000)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    return folder


def prepared(project: Path, *, limit: int = 1 << 20, shared: tuple[Path, ...] = (), changes: str = "") -> Upload:
    config = load_pipeline(project / "tiny.yaml", changes.split(), elsewhere=shared)
    return prepare(config, pipeline_dir=project, shared=shared, limit=limit)


def at_the_cluster(upload: Upload, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Pipeline, Ppo]:
    """The pipeline as the cluster reads it; a missing file or module would be an error."""
    folder.mkdir()
    write(upload, folder)
    monkeypatch.chdir(folder)
    config = load_pipeline("pipeline.yaml")
    (stage,) = config.stages
    assert isinstance(stage, Ppo)
    return config, stage


def test_what_travels(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = prepared(project)
    config, stage = at_the_cluster(upload, tmp_path / "there", monkeypatch)
    files = {path.relative_to(tmp_path / "there").as_posix() for path in Path().resolve().rglob("*") if path.is_file()}
    (model,) = {name for name in files if name.endswith("_tiny/config.json")}
    (prompts,) = {name for name in files if name.endswith("_prompts.jsonl")}
    assert files == {
        "pipeline.yaml", "rewards.py", "helper.py", "own/__init__.py", "own/words.py", model, prompts
    }  # fmt: skip
    assert Path(prompts).read_text() == '{"prompt": "a"}\n'
    assert [source.path for source in stage.data.train] == [f"./{prompts}", "synthetic:reviews"]
    assert stage.policy.model == f"./{model.removesuffix('/config.json')}"
    (function, learned) = stage.reward
    assert isinstance(function, FunctionReward)
    assert function.arguments == {"path": "prompts.jsonl"}
    assert learned.model == "org/on-the-hub"  # type: ignore[union-attr]
    assert config.placement.address is None
    assert config.run_dir == "~/runs/test"
    assert upload.size == sum(Path(name).stat().st_size for name in files)


def test_names_follow_the_content(project: Path, tmp_path: Path) -> None:
    first = prepared(project)
    assert prepared(project) == first
    (tmp_path / "models" / "tiny" / "config.json").write_text("{ }")
    second = prepared(project)
    changed = {one.why for one, two in zip(first.items, second.items, strict=True) if one.target != two.target}
    assert changed == {"ppo.policy.model"}


def test_two_files_of_one_name(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "prompts.jsonl").write_text('{"prompt": "b"}\n')
    upload = prepared(project, changes="data.evaluation=held/prompts.jsonl")
    _, stage = at_the_cluster(upload, tmp_path / "there", monkeypatch)
    assert stage.data.evaluation is not None
    assert Path(stage.data.evaluation[0].path).read_text() == '{"prompt": "b"}\n'
    assert Path(stage.data.train[0].path).read_text() == '{"prompt": "a"}\n'


def test_what_the_cluster_sees_stays(project: Path, tmp_path: Path) -> None:
    """Also where this machine has no such folder; a path that is only like it does not."""
    far = Path("/far/away")
    upload = prepared(project, shared=(far, tmp_path / "models"), changes="data.train=/far/away/prompts.jsonl")
    assert upload.stays == (str(tmp_path / "models" / "tiny"), "/far/away/prompts.jsonl")
    assert [item.why for item in upload.items if not item.why.startswith("module")] == ["ppo.data.evaluation"]
    assert "path: /far/away/prompts.jsonl" in upload.pipeline
    with pytest.raises(ConfigError, match=r"/far/away2/prompts\.jsonl.*there is no such file"):
        prepared(project, shared=(far,), changes="data.train=/far/away2/prompts.jsonl")


def test_too_large(project: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(b"x" * (3 << 20))
    (tmp_path / "models" / "tiny" / "model.safetensors").write_bytes(b"x" * (2 << 20))
    with pytest.raises(ConfigError) as error:
        prepared(project, limit=4 << 20)
    lines = str(error.value).splitlines()
    assert lines[0] == (
        "what the pipeline names on this machine is 5.0 MiB, and a cluster takes an upload of 4.0 MiB at most:"
    )
    assert lines[1] == f"  ppo.data.train.0: {tmp_path}/prompts.jsonl, 3.0 MiB"
    assert lines[2] == f"  ppo.policy.model: {tmp_path}/models/tiny, 2.0 MiB"
    assert "--shared FOLDER" in lines[-1]
    assert prepared(project, limit=6 << 20).size < 6 << 20
    assert prepared(project, limit=4 << 20, shared=(tmp_path / "models",)).stays


@pytest.mark.parametrize(
    ("run_dir", "there"), [("runs/a", "~/runs/a"), ("./a", "~/a"), ("/mnt/a", "/mnt/a"), ("~/a", "~/a")]
)
def test_a_run_stays_out_of_the_upload(run_dir: str, there: str) -> None:
    assert remote_run_dir(run_dir) == there


@pytest.mark.parametrize(
    ("size", "words"), [(12, "12 bytes"), (1024, "1.0 KiB"), (31 << 10, "31 KiB"), (5 << 29, "2.5 GiB")]
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert in_words(size) == words
