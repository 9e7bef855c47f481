"""What is wrong with a file of cluster/: each checker gives a list of problems, empty where there is none."""

from __future__ import annotations

import ast
import copy
import functools
import itertools
import json
import re
import shlex
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli

from rlhf_ray.config.load import load_pipeline
from rlhf_ray.distributed.gauges import OWN, gauge_name
from rlhf_ray.submission.kuberay import PACKED, unpack_into

REPOSITORY = Path(__file__).parents[1]
CLUSTER = REPOSITORY / "cluster"
IMAGE_FOLDER = "/opt/rlhf_ray"
SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{40,}\b"
)
SECRET_NAME = re.compile(r"TOKEN$|KEY$|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)
QUANTITY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def problems(name: str, text: str) -> list[str]:
    """What is wrong with the text of the file cluster/`name`."""
    folder = name.split("/")[0]
    try:
        found = CHECKERS[folder](text)
    except yaml.YAMLError as error:
        found = [f"no YAML: {error}"]
    except json.JSONDecodeError as error:
        found = [f"no JSON: {error}"]
    return found + [f"a secret: {match.group()[:8]}..." for match in SECRET.finditer(text)]


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings name each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"twice: {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_UniqueKeys)


# Ray's command line


def ray_command_problems(arguments: list[str]) -> list[str]:
    """What Ray's own parser says of `ray ARGUMENTS`."""
    command, name = ray_cli, "ray"
    while hasattr(command, "commands"):
        if not arguments or arguments[0] not in command.commands:
            return [f"{name} has no command {arguments[:1]}"]
        name, command, arguments = f"{name} {arguments[0]}", command.commands[arguments[0]], arguments[1:]
    if name == "ray symmetric-run":
        split = arguments.index("--") if "--" in arguments else len(arguments)
        own = [each for each in arguments[:split] if not each.startswith("--disable-usage-stats")]
        if not arguments[split + 1 :]:
            return ["ray symmetric-run: no command after --"]
        others = _without(own, {"--address", "--min-nodes"})
        return ray_command_problems(["start", "--address=head:6379", *others])
    try:
        command.make_context(name, list(arguments))
    except Exception as error:
        return [f"{name}: {getattr(error, 'message', None) or error}"]
    return []


def _without(arguments: list[str], options: set[str]) -> list[str]:
    """The arguments without the options, each of which has its value in the next argument."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument in options:
            skip = not skip
        else:
            kept.append(argument)
    return kept


def _ray_starts(command: str) -> Iterator[list[str]]:
    """The arguments of each `ray ...` in a shell command."""
    for part in command.split(";"):
        words = shlex.split(part)
        if words[:1] == ["ray"]:
            yield words[1:]


def dashboard_problems(text: str) -> list[str]:
    return [
        f"the dashboard is open: {match}"
        for match in re.findall(r"dashboard-host[=: ]+[\"']?(?!127\.0\.0\.1)\S+", text)
    ]


# KubeRay


def kubernetes_problems(text: str) -> list[str]:
    """A manifest against cluster/schema/kuberay.json and against what a schema cannot say."""
    document = read_yaml(text)
    schema = json.loads((CLUSTER / "schema" / "kuberay.json").read_text())
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in ("RayCluster", "RayJob", "PersistentVolumeClaim"):
        return [f"kind: got {kind!r}"]
    part = {"$schema": schema["$schema"], "$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]}
    found = schema_problems(document, part)
    if found or kind == "PersistentVolumeClaim":
        return found
    cluster = document["spec"]["rayClusterSpec"] if kind == "RayJob" else document["spec"]
    return _cluster_problems(cluster) + (_job_problems(document["spec"]) if kind == "RayJob" else [])


def schema_problems(document: Any, schema: Mapping[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(document)]


def _cluster_problems(cluster: Mapping[str, Any]) -> list[str]:
    found = []
    if f"ray=={cluster['rayVersion']}" not in (REPOSITORY / "constraints.txt").read_text().splitlines():
        found.append(f"rayVersion {cluster['rayVersion']} is not that of constraints.txt")
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    names = [group["groupName"] for group in workers]
    found += [f"groupName {name} twice" for name in set(names) if names.count(name) > 1]
    for group in workers:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            found.append(f"{group['groupName']}: replicas are not between minReplicas and maxReplicas")
        found += _pod_problems(group["groupName"], group, head=False)
    found += _pod_problems("head", head, head=True)
    spec = head["template"]["spec"]
    command = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if command[:1] != ["stop_driver"]:
        found.append("head: preStop does not stop the driver")
    elif int(command[1]) >= spec["terminationGracePeriodSeconds"]:
        found.append("head: terminationGracePeriodSeconds is not above what stop_driver waits")
    images = {group["template"]["spec"]["containers"][0]["image"] for group in [head, *workers]}
    return found + ([f"images differ: {sorted(images)}"] if len(images) > 1 else [])


def _pod_problems(name: str, group: Mapping[str, Any], *, head: bool) -> list[str]:
    spec = group["template"]["spec"]
    (container,) = spec["containers"]
    # Pods without GPUs on a cluster that has some are for one role, whose label they have.
    may_have_gpus = not head and not container["image"].endswith("-cpu")
    found = []
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    if requests != limits:
        found.append(f"{name}: requests differ from limits")
    if "nvidia.com/gpu" in limits and not may_have_gpus:
        found.append(f"{name}: nvidia.com/gpu where no GPU is used")
    if "nvidia.com/gpu" not in limits and may_have_gpus and not group.get("labels"):
        found.append(f"{name}: nvidia.com/gpu is missing")
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    found += [f"{name}: no volume {volume}" for volume in mounts.values() if volume not in volumes]
    shm = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir")
    if shm is None:
        found.append(f"{name}: /dev/shm is no memory")
    elif size(shm["sizeLimit"]) >= size(limits["memory"]):
        found.append(f"{name}: /dev/shm is not below the memory limit")
    if "persistentVolumeClaim" not in volumes.get(mounts.get("/runs", ""), {}):
        found.append(f"{name}: /runs is no claim")
    for variable in container.get("env", []):
        if SECRET_NAME.search(variable["name"]) and "value" in variable:
            found.append(f"{name}: the secret {variable['name']} stands in the file")
    return found + ray_command_problems(
        ["start", "--address=x:1", *(f"--{key}={value}" for key, value in group["rayStartParams"].items())]
    )


def _job_problems(job: Mapping[str, Any]) -> list[str]:
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    program, pipeline, run_dir, *overrides = job["entrypoint"].split()
    if program == "run_or_resume":
        found = pipeline_problems(pipeline, [f"run_dir={run_dir}", *overrides])
    else:
        variables = {variable["name"]: variable.get("value", "") for variable in head["containers"][0]["env"]}
        found = packed_problems(variables.get(PACKED, ""), job["metadata"]["run_dir"])
    environment = read_yaml(job["runtimeEnvYAML"])["env_vars"]
    found += [
        f"runtimeEnvYAML: the secret {name} stands in the file" for name in environment if SECRET_NAME.search(name)
    ]
    wait = int(environment.get("RAY_JOB_STOP_WAIT_TIME_S", 0))
    grace = head["terminationGracePeriodSeconds"]
    if not 60 <= wait < grace:
        found.append(f"RAY_JOB_STOP_WAIT_TIME_S: got {wait}, wanted 60 to the grace period")
    return found


def size(quantity: str) -> float:
    """Bytes."""
    number, unit = re.fullmatch(r"([0-9.]+)([KMGT]i)?", quantity).groups()  # type: ignore[union-attr]
    return float(number) * QUANTITY.get(unit, 1)


def pipeline_problems(path: str, overrides: list[str]) -> list[str]:
    """A pipeline file as the images or the project's folder hold it."""
    file = REPOSITORY / path.removeprefix(IMAGE_FOLDER + "/")
    try:
        load_pipeline(file, overrides)
    except Exception as error:
        return [f"{path}: {error}"]
    return []


def packed_problems(packed: str, run_dir: str) -> list[str]:
    """A pipeline that travels in a manifest: it is unpacked and read as the job would."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(PACKED, packed)
        try:
            unpack_into(Path(folder, "upload"))
            patch.chdir(Path(folder, "upload"))
            config = load_pipeline("pipeline.yaml", elsewhere=[Path("/runs")])
        except Exception as error:
            return [f"{PACKED}: {error}"]
    return [] if config.run_dir == run_dir else [f"run_dir: {config.run_dir} in the pipeline, {run_dir} beside it"]


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses what it does not name, as the API server prunes it."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    open_ended = "additionalProperties" in made or made.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(made.get("properties"), dict) and made.get("type") == "object" and not open_ended:
        made["additionalProperties"] = False
    return made


# The cluster launcher


def launcher_problems(text: str) -> list[str]:
    """A launcher file against Ray's schema, and for token, dashboard, shared memory and shared folder."""
    config = read_yaml(text)
    try:
        prepared = prepare_config(copy.deepcopy(config))
        validate_config(prepared)
    except Exception as error:
        return [f"Ray refuses it: {getattr(error, 'message', None) or error}"]
    found = dashboard_problems(text)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = config.get(key, [])
        starts = [command for command in commands if " start " in command]
        if len(starts) != 1 or "export RAY_AUTH_MODE=token;" not in starts[0]:
            found.append(f"{key}: Ray starts without token authentication")
        for command in commands:
            for arguments in _ray_starts(command):
                found += ray_command_problems(arguments)
                if arguments[0] == "start" and ("--head" in arguments) != key.startswith("head"):
                    found.append(f"{key}: --head at the wrong node")
    if "~/.ray/auth_token" not in config.get("file_mounts", {}).values():
        found.append("file_mounts: the token does not travel")
    options = " ".join(prepared["docker"].get("run_options", []))
    found += [f"docker.run_options: no {wanted}" for wanted in ("--shm-size=", ":/runs") if wanted not in options]
    if re.search(r":latest$|^[^:]+$", prepared["docker"].get("image", "")):
        found.append("docker.image: no version")
    if not any("/mnt/runs" in command and "mount -t" in command for command in prepared["initialization_commands"]):
        found.append("initialization_commands: /runs is no shared file system")
    for name, kind in prepared["available_node_types"].items():
        if kind.get("min_workers", 0) > kind["max_workers"]:
            found.append(f"{name}: min_workers above max_workers")
    return found


# Slurm


def slurm_problems(text: str) -> list[str]:
    """An sbatch script: bash reads it, its options are those of a run that can be requeued, Ray takes its options."""
    read = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, timeout=60)
    if read.returncode:
        return [f"bash: {read.stderr.strip()}"]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))
    found = [
        f"line {line!r}: no option"
        for line in re.findall(r"^#SBATCH.*$", text, flags=re.MULTILINE)
        if not re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line)
    ]
    if not text.startswith("#!/bin/bash\n"):
        found.append("no #!/bin/bash")
    found += [f"no --{name}" for name in ("requeue", "exclusive", "nodes", "time", "output") if name not in options]
    wanted = {"ntasks-per-node": "1", "open-mode": "append"}
    found += [f"--{name}: got {options.get(name)}" for name, value in wanted.items() if options.get(name) != value]
    signal = re.fullmatch(r"B:TERM@([0-9]+)", options.get("signal", ""))
    if not signal:
        found.append("--signal: SIGTERM does not come to this shell alone ahead of the limit")
    elif int(signal[1]) <= 60:
        found.append("--signal: no time to save ahead of the limit")
    lines = ("export RAY_AUTH_MODE=token", "umask 077", "trap stop TERM", "rlhf-ray resume")
    for line in (*lines, 'kill -TERM "$(cat "$pid_file")"', "scontrol requeue"):
        if line not in text:
            found.append(f"no {line}")
    joined = text.replace("\\\n", " ")
    started = re.search(r"^srun .*?\b(ray symmetric-run .*) &$", joined, flags=re.MULTILINE)
    if not started:
        return [*found, "no ray symmetric-run in the background"]
    return found + dashboard_problems(text) + ray_command_problems(shlex.split(started[1])[1:])


# Docker


def docker_problems(text: str) -> list[str]:
    """A Dockerfile, instruction by instruction: what it takes exists, versions are tested ones, nobody is root."""
    found, instructions = [], list(_instructions(text))
    known = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD"}
    found += [f"{word}: not an instruction that is used here" for word, _ in instructions if word not in known]
    if [word for word, _ in instructions][:1] != ["FROM"]:
        found.append("FROM does not come first")
    for word, rest in instructions:
        if word == "FROM" and re.search(r":latest$|^[^:]+$", rest.split()[0]):
            found.append(f"FROM {rest}: no version")
        if word == "COPY":
            *sources, _ = rest.split()
            found += [f"COPY {source}: no such file" for source in sources if not (REPOSITORY / source).exists()]
        if word == "ENV":
            found += [f"ENV {name}: a secret" for name in re.findall(r"(\w+)=", rest) if SECRET_NAME.search(name)]
        if word == "RUN":
            found += _run_problems(rest)
        if word == "CMD" and not _is_exec_form(rest):
            found.append(f"CMD {rest}: not a list of words, so signals do not arrive")
    users = [rest for word, rest in instructions if word == "USER"]
    if not users or users[-1] in ("root", "0"):
        found.append("runs as root")
    if not any(word == "ENV" and "RAY_AUTH_MODE=token" in rest for word, rest in instructions):
        found.append("no RAY_AUTH_MODE=token")
    copied = " ".join(rest for word, rest in instructions if word == "COPY")
    scripts = (
        "cluster/run_or_resume.sh /usr/local/bin/run_or_resume",
        "cluster/stop_driver.sh /usr/local/bin/stop_driver",
    )
    return found + [f"no {script}" for script in scripts if script not in copied]


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        yield word, " ".join(rest.split())


def _is_exec_form(rest: str) -> bool:
    try:
        words = json.loads(rest)
    except json.JSONDecodeError:
        return False
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


def _run_problems(command: str) -> list[str]:
    found = []
    read = subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True, timeout=60)
    if read.returncode:
        found.append(f"RUN: {read.stderr.strip()}")
        return found
    if "apt-get install" in command and not all(word in command for word in ("--yes", "rm -rf /var/lib/apt/lists")):
        found.append("RUN apt-get: asks, or leaves its lists")
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = dict(
        line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for part in command.split("&&"):
        words = shlex.split(part)
        if words[:2] != ["pip", "install"]:
            continue
        if ("--constraint", "constraints.txt") not in itertools.pairwise(words):
            found.append("RUN pip: not the tested versions")
        for word in words:
            extra = re.fullmatch(r"\.\[(\w+)\]", word)
            if extra and extra[1] not in extras:
                found.append(f"RUN pip: pyproject.toml has no extra {extra[1]}")
            name, exact, version = word.partition("==")
            if exact and pinned.get(name) != version.split("+")[0]:
                found.append(f"RUN pip: {word} is not that of constraints.txt")
    return found


# Monitoring


def monitoring_problems(text: str) -> list[str]:
    """Prometheus's configuration or rules, or a Grafana dashboard."""
    document = json.loads(text) if text.lstrip().startswith("{") else read_yaml(text)
    if "panels" in document:
        return _grafana_problems(document)
    return _rules_problems(document) if "groups" in document else _prometheus_problems(document)


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h|d)$"}
_RULES = _closed(
    ["groups"],
    groups={
        "type": "array",
        "items": _closed(
            ["name", "rules"],
            name=_TEXT,
            interval=_DURATION,
            rules={
                "type": "array",
                "items": {
                    "oneOf": [
                        _closed(
                            ["record", "expr"], record={"type": "string", "pattern": "^[a-z_]+(:[a-z_]+)+$"}, expr=_TEXT
                        ),
                        _closed(
                            ["alert", "expr", "labels", "annotations"],
                            alert={"type": "string", "pattern": "^[A-Z][A-Za-z]+$"},
                            expr=_TEXT,
                            labels=_closed(["severity"], severity={"enum": ["warning", "critical"]}),
                            annotations=_closed(["summary"], summary=_TEXT),
                            **{"for": _DURATION},
                        ),
                    ]
                },
            },
        ),
    },
)
_PROMETHEUS = _closed(
    ["global", "rule_files", "scrape_configs"],
    **{"global": _closed(["scrape_interval"], scrape_interval=_DURATION, evaluation_interval=_DURATION)},
    rule_files={"type": "array", "items": _TEXT},
    scrape_configs={
        "type": "array",
        "items": _closed(
            ["job_name", "file_sd_configs"],
            job_name=_TEXT,
            file_sd_configs={"type": "array", "items": _closed(["files"], files={"type": "array", "items": _TEXT})},
        ),
    },
)
_PANEL = {
    "type": "object",
    "required": ["id", "type", "title", "datasource", "gridPos", "fieldConfig", "targets"],
    "properties": {
        "id": {"type": "integer"},
        "type": {"const": "timeseries"},
        "title": _TEXT,
        "gridPos": _closed(["x", "y", "w", "h"], **{side: {"type": "integer", "minimum": 0} for side in "xywh"}),
        "fieldConfig": {
            "properties": {
                "defaults": {
                    "properties": {"unit": {"enum": ["none", "s", "percent", "percentunit", "bytes", "gbytes"]}}
                }
            }
        },
        "targets": {
            "type": "array",
            "minItems": 1,
            "items": _closed(
                ["refId", "datasource", "expr", "legendFormat"],
                refId=_TEXT,
                datasource={},
                expr=_TEXT,
                legendFormat=_TEXT,
            ),
        },
    },
}
_GRAFANA = {
    "type": "object",
    "required": ["uid", "title", "schemaVersion", "templating", "panels", "time"],
    "properties": {"panels": {"type": "array", "minItems": 1, "items": _PANEL}, "schemaVersion": {"type": "integer"}},
}


def _rules_problems(document: Mapping[str, Any]) -> list[str]:
    found = schema_problems(document, _RULES)
    if found:
        return found
    rules = [rule for group in document["groups"] for rule in group["rules"]]
    names = [rule.get("alert") or rule["record"] for rule in rules]
    found += [f"{name} twice" for name in set(names) if names.count(name) > 1]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for name, rule in zip(names, rules, strict=True):
        found += [f"{name}: {problem}" for problem in query_problems(rule["expr"], recorded)]
    return found


def _prometheus_problems(document: Mapping[str, Any]) -> list[str]:
    found = schema_problems(document, _PROMETHEUS)
    missing = [name for name in document.get("rule_files", []) if not (CLUSTER / "monitoring" / name).exists()]
    return found + [f"rule_files: no {name}" for name in missing]


def _grafana_problems(document: Mapping[str, Any]) -> list[str]:
    found = schema_problems(document, _GRAFANA)
    if found:
        return found
    panels = document["panels"]
    numbers = [panel["id"] for panel in panels]
    found += [f"panel {number} twice" for number in set(numbers) if numbers.count(number) > 1]
    variables = {variable["name"] for variable in document["templating"]["list"]}
    for variable in document["templating"]["list"]:
        asked = re.findall(r"label_values\((\w+)", json.dumps(variable))
        found += [f"variable {variable['name']}: no metric {name}" for name in asked if not is_metric(name)]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        if cells & taken or place["x"] + place["w"] > 24:
            found.append(f"{panel['title']}: over another panel or out of the page")
        taken |= cells
        for target in panel["targets"]:
            found += [f"{panel['title']}: {problem}" for problem in query_problems(target["expr"], set())]
            used = set(re.findall(r'"\$(\w+)"', target["expr"])) - {"1"}
            found += [f"{panel['title']}: no variable {name}" for name in used - variables]
    return found


_FUNCTIONS = {"sum", "max", "min", "avg", "by", "without", "changes", "rate", "label_replace", "on", "and", "or"}


def query_problems(query: str, recorded: set[str]) -> list[str]:
    """A PromQL query: brackets close, functions are known, every metric is one that a run or Ray publishes."""
    found = []
    names = re.findall(r'__name__=~"([^"]+)"', query)
    for pattern in names:
        if not any(re.fullmatch(pattern, name) for name in _examples()):
            found.append(f"no metric matches {pattern}")
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', query)
    if any(bare.count(a) != bare.count(b) for a, b in ("()", "[]", "{}")) or query.count('"') % 2:
        return [*found, f"brackets or quotes stay open: {query}"]
    for span in re.findall(r"\[([^\]]*)\]", bare):
        if not re.fullmatch(r"[0-9]+(s|m|h|d)", span):
            found.append(f"no time: [{span}]")
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|without|on)\s*\([^)]*\)", " ", bare)
    for word in re.findall(r"[A-Za-z_:][A-Za-z0-9_:]*", bare):
        if word not in _FUNCTIONS | recorded and not is_metric(word):
            found.append(f"no metric {word}")
    if not names and not re.search(r"[A-Za-z_]{4,}", bare):
        found.append("no metric at all")
    return found


def is_metric(name: str) -> bool:
    """Whether a run of this package publishes the metric, or Ray's own dashboards know it."""
    own = name.removeprefix("ray_") if name.startswith("ray_rlhf_ray_") else None
    if own is None:
        return name in ray_metrics()
    return any(re.fullmatch(pattern, own) for pattern in own_metrics())


@functools.cache
def ray_metrics() -> set[str]:
    """The metrics in the queries of the dashboards that Ray ships."""
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return set(re.findall(r"\bray_[a-z0-9_]+", "".join(path.read_text() for path in folder.glob("*.py"))))


@functools.cache
def own_metrics() -> frozenset[str]:
    """Patterns of the gauges of all metrics whose names stand in the package's source, f-strings included."""
    patterns = set(map(gauge_name, OWN))
    # What benchmarks measure is no metric of a run.
    for path in (path for path in (REPOSITORY / "rlhf_ray").rglob("*.py") if path.parent.name != "bench"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            else:
                continue
            name = "".join(parts)
            # A hole alone after the slash would match any name.
            if re.fullmatch(r"[a-z0-9_\0]+(/[a-z0-9_\0]+)+", name) and re.search(r"/\0?[a-z0-9_]{2,}", name):
                patterns.add(gauge_name(name.replace("\0", "HOLE")).replace("HOLE", "[a-z0-9_]+"))
    return frozenset(patterns)


@functools.cache
def _examples() -> frozenset[str]:
    """A name for each pattern of this package's metrics, as Prometheus sees it."""
    return frozenset("ray_" + pattern.replace("[a-z0-9_]+", "generator") for pattern in own_metrics())


def own_metrics_named() -> tuple[set[str], set[str]]:
    """This package's metrics in the queries: those that are written out, and the patterns of the others."""
    asked = "\n".join(queries())
    patterns = set(re.findall(r'__name__=~"([^"]+)"', asked))
    return set(re.findall(r"\bray_rlhf_ray_[a-z0-9_]+", re.sub(r'"[^"]*"', "", asked))), patterns


def queries() -> list[str]:
    """Every query of the rules and of the dashboard."""
    rules = read_yaml((CLUSTER / "monitoring/rules.yaml").read_text())
    dashboard = json.loads((CLUSTER / "monitoring/dashboard.json").read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return found + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


CHECKERS = {
    "kuberay": kubernetes_problems,
    "launcher": launcher_problems,
    "slurm": slurm_problems,
    "docker": docker_problems,
    "monitoring": monitoring_problems,
}
