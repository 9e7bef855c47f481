"""What every stage of a run shares: its folders, its data and tokenizer, and how its learners are saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rlhf_ray.algorithms.kl import AdaptiveKlController, FixedKlController
from rlhf_ray.config import schema
from rlhf_ray.data.collected import check_form
from rlhf_ray.data.preferences import PreferenceSet, load_preferences
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.data.texts import TextSet, load_texts, texts_for_tokenizer
from rlhf_ray.distributed.gauges import RayGauges
from rlhf_ray.distributed.groups import WorkerGroup, gather
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.models.loading import load_tokenizer, save_new_model
from rlhf_ray.trainers.durable import write_folder
from rlhf_ray.trainers.run import DATA, MODEL, RunFolder, StageResult, StageRun
from rlhf_ray.trainers.sampling import SampleStream
from rlhf_ray.trainers.turns import GpuTurns
from rlhf_ray.workers.learner import Learner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DataSet: TypeAlias = TextSet | PreferenceSet | PromptSet
_LOADERS: dict[str, Callable[..., DataSet]] = {
    "sft": load_texts,
    "reward_model": load_preferences,
    "ppo": load_prompts,
    "dpo": load_preferences,
    "collect": load_prompts,
}


@dataclass(frozen=True)
class StageData:
    """A stage's encoded data, none where it has none for evaluation, and the tokenizer that encoded it."""

    train: Any
    held_out: Any
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Site:
    """Where the stages of a run take place.

    Args:
        config: the pipeline.
        folder: the run's folder.
        cluster: where actors are started.
        recorder: what the worker groups write their calls to.
        pipeline_dir: where reward functions are looked up.
        early: data encoded before anything was started, by stage.
    """

    config: schema.Pipeline
    folder: RunFolder
    cluster: Cluster
    recorder: Recorder
    pipeline_dir: Path
    early: dict[str, StageData] = field(default_factory=dict)

    def result(self, stage: schema.Stage) -> StageResult | None:
        """The stage's result; None where there is something left to do."""
        return stage_result(self.folder, stage)

    def data(self, stage: schema.Stage, model: str) -> StageData:
        """The stage's encoded data; its tokenizer is written to where `tokenizer` says."""
        data = self.early.pop(stage.name, None) or load_data(self._located(stage), model, self.config.seed)
        write_folder(Path(self.tokenizer(stage)), lambda partial: data.tokenizer.save_pretrained(partial))
        return data

    def tokenizer(self, stage: schema.Stage) -> str:
        """The directory of the stage's tokenizer, so that every worker has the same one."""
        return str((self.folder.stage(stage.name) / "tokenizer").absolute())

    def model(self, name: str) -> str:
        """The directory or hub name behind a model's name in the pipeline file."""
        stage = name.removeprefix(schema.STAGE)
        return absolute(name if stage == name else str(self.folder.stage(stage) / MODEL))

    def version(self, model: str) -> int:
        """Iterations of the stage that made a model; 0 where no stage of this run did."""
        made_by = {schema.STAGE + stage.name: stage for stage in self.config.stages}.get(model)
        result = made_by and self.result(made_by)
        return result.iteration if result else 0

    def _located(self, stage: schema.Stage) -> schema.Stage:
        """The stage with the folders of earlier stages in place of their names in its data."""
        groups = {name: getattr(stage.data, name) for name in ("train", "evaluation")}
        found = {name: sources and tuple(map(self._source, sources)) for name, sources in groups.items()}
        return stage.model_copy(update={"data": stage.data.model_copy(update=found)})

    def _source(self, source: schema.Source) -> schema.Source:
        if source.stage is None:
            return source
        return source.model_copy(update={"path": str(self.folder.stage(source.stage) / DATA)})

    def initial_model(self, stage: schema.Stage) -> str:
        """The policy's initial model; a fresh one is made once, in the stage's folder."""
        model = stage.policy.model
        if isinstance(model, str):
            return self.model(model)
        path = self.folder.stage(stage.name) / "initial_model"
        if not (path / "config.json").exists():
            located = self._located(stage)
            assert located.method == "sft", "only supervised fine-tuning starts from a fresh model"
            texts = texts_for_tokenizer(located.data)
            write_folder(path, lambda partial: save_new_model(partial, model, texts, seed=self.config.seed))
        return absolute(str(path))

    @contextmanager
    def stage_run(self, stage: schema.Stage, *, total: int, data: StageData) -> Iterator[StageRun]:
        """The stage under way, which has said how many rows were dropped or cut."""
        with StageRun(
            self.folder,
            stage,
            total=total,
            seed=self.config.seed,
            tracking=self.config.tracking,
            recorder=self.recorder,
            trackers=[RayGauges(run=self.folder.path.name, stage=stage.name)],
            stages=[each.name for each in self.config.stages],
        ) as run:
            _report(run, "train", data.train.report)
            if data.held_out is not None:
                _report(run, "evaluation", data.held_out.report)
            yield run


def stage_result(folder: RunFolder, stage: schema.Stage) -> StageResult | None:
    """The stage's result; None where there is something left to do."""
    match stage:
        case schema.Ppo():
            return folder.result(stage.name, total=stage.iterations)
        case schema.Collect():
            return folder.result(stage.name)
        case _:
            return folder.result(stage.name, total=stage.steps)


def known_before_start(config: schema.Pipeline) -> list[schema.Stage]:
    """The stages whose data can be encoded before anything is started: no earlier stage makes tokenizer or data."""

    def known(stage: schema.Stage) -> bool:
        sources = (*stage.data.train, *(stage.data.evaluation or ()))
        names = [stage.policy.model, *(source.path for source in sources)]
        return all(isinstance(name, str) and not name.startswith(schema.STAGE) for name in names)

    return [stage for stage in config.stages if known(stage)]


def load_data(stage: schema.Stage, model: Any, seed: int) -> StageData:
    """Encodes the stage's data with the policy's tokenizer."""
    tokenizer = load_tokenizer(stage.policy.tokenizer or model, stage.policy.tokenizer_revision)
    load = _LOADERS[stage.method]
    seed = stage_seed(stage, seed)
    train = load(stage.data, tokenizer, seed=seed, sources="train")
    if isinstance(train, PromptSet) and isinstance(stage, schema.Collect):
        check_form(train)
    held_out = load(stage.data, tokenizer, seed=seed, sources="evaluation") if stage.data.evaluation else None
    return StageData(train, held_out, tokenizer)


def stage_seed(stage: schema.Stage, seed: int) -> int:
    """The seed of a stage's data and samples: the run's; for a collect stage one of its own.

    So the rounds of a pipeline sample different responses, and shuffled prompts come in another order in each.
    """
    return derive_seed(seed, stage.name) if isinstance(stage, schema.Collect) else seed


@dataclass(frozen=True)
class LearnerParts:
    """How a stage's learners, and the KL coefficient where there is one, are saved and restored.

    Args:
        learners: the groups by role; `policy` is the one whose model is the result.
        kl: the KL coefficient.
        notes: what the model's config.json says besides, asked for at each saving.
        samples: of a stage that samples ahead of its learners.
        turns: on GPUs that they share with generators.
    """

    learners: Mapping[str, WorkerGroup[Learner]]
    kl: FixedKlController | AdaptiveKlController | None = None
    notes: Callable[[], dict[str, float]] = dict
    samples: SampleStream | None = None
    turns: GpuTurns = field(default_factory=GpuTurns)

    def state(self) -> dict[str, Any]:
        """What the trainer itself has to remember."""
        return {"kl": self.kl.state_dict()} if self.kl else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` gave."""
        if self.kl:
            self.kl.load_state_dict(state["kl"])

    def save(self, folder: Path) -> None:
        """Lets every learner write what it needs to go on."""
        if self.samples is not None:
            self.samples.save(folder)
        self.turns.learning(keep_weights=True)
        gather(*(group.all(Learner.save, folder.absolute() / role) for role, group in self.learners.items()))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        if self.samples is not None:
            self.samples.load(folder)
        gather(*(group.all(Learner.load, folder.absolute() / role) for role, group in self.learners.items()))

    def save_model(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face directory."""
        self.turns.learning(keep_weights=True)
        self.learners["policy"].all(Learner.save_model, folder.absolute(), self.notes()).result()


def absolute(name: str) -> str:
    """A local directory as a path that holds in every process; a hub name as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _report(run: StageRun, what: str, report: Mapping[str, int]) -> None:
    """Says how many rows were dropped or cut, where any were."""
    if any(report.get(name) for name in ("dropped", "cut", "exchanged")):
        counts = ", ".join(f"{count} {name}" for name, count in report.items())
        run.message(f"{what} data: {counts}")
