"""A KubeRay RayJob of a pipeline: one run with a Ray cluster of its own, on the nodes of its plan.

The pipeline file, the modules of its reward functions and the small files that it names travel inside the manifest,
packed, as a variable of the head's container. The job unpacks them on the volume that all pods share, so that a retry
and every worker find them there. KubeRay 1.7 takes the manifest.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import shlex
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rlhf_ray.errors import ConfigError, UserError
from rlhf_ray.plan.cluster import parse_cluster
from rlhf_ray.submission.nodes import GIB_PER_GPU, NodeGroup, node_groups, on_groups, with_planned_memory
from rlhf_ray.submission.order import Order
from rlhf_ray.submission.upload import SHOWN, Upload, contents, in_words, job_metadata, job_words, prepare

MOUNT = "/runs"
"""Where all pods have the shared volume."""
PACKED = "RLHF_RAY_UPLOAD"
"""Variable of the head's container that holds the packed upload."""
LIMIT_BYTES = 96 << 10
"""Of the packed upload: Linux takes a variable of 128 KiB, and `kubectl apply` a manifest of 256 KiB."""
PID_FILE = "/tmp/rlhf-ray.pid"
"""Where `stop_driver` of the images looks for the driver."""
TOKEN_SECRET = "rlhf-ray-token"
KEYS_SECRET = "rlhf-ray-keys"
CLAIM = "rlhf-ray-runs"
PLACEHOLDER = "registry.example.org/rlhf-ray"
RETRIES = 3
_UPLOADS = f"{MOUNT}/.uploads"
_HEAD_CPUS, _HEAD_GIB = 4, 16
_STOP_MARGIN_S = 30
_WORKER_GRACE_S = 120
_ENDED_KEPT_S = 600
_START_S = 3600
_NAME_LENGTH = 47
_METRICS = "8080"


def render_job(order: Order, *, cluster: str | None, image: str | None, claim: str | None) -> str:
    """The manifest of a pipeline as YAML; what it asks for is said on standard error.

    Args:
        order: what is submitted.
        cluster: the nodes, as `nodes_for` takes them; None: a group of them for each role.
        image: of the pods; None: a name that says what to put there.
        claim: the shared volume; None: that of cluster/kuberay/storage.yaml.

    Raises:
        ConfigError: run_dir is not on the shared volume, nodes or manifest are too small, or the pipeline is wrong.
    """
    config = order.load(elsewhere=[Path(MOUNT)])
    run_dir = run_dir_of(config.run_dir)
    groups = node_groups(config, cluster)
    unplanned = ""
    if cluster is None or parse_cluster(cluster).host_gib is None:
        try:
            groups = with_planned_memory(config, groups)
        except UserError as error:
            unplanned = f"memory of the pods: {GIB_PER_GPU} GiB for each GPU, since there is no plan here: {error}"
    here = on_groups(config, groups).model_copy(update={"run_dir": run_dir})
    packed = pack(prepare(here, pipeline_dir=order.pipeline.resolve().parent, shared=[Path(MOUNT)]))
    own = version("rlhf_ray")
    image = image or f"{PLACEHOLDER}:{own}-{'gpu' if any(group.nodes.gpus for group in groups) else 'cpu'}"
    name = job_name(run_dir)
    manifest = ray_job(
        name,
        entrypoint(name, packed, secrets=order.secrets),
        groups,
        image=image,
        claim=claim or CLAIM,
        ray_version=version("ray"),
        save_s=order.save_s,
        secrets=order.secrets,
        head_variables={PACKED: packed},
        metadata=job_metadata(order.pipeline, run_dir),
    )
    notes = [
        *(f"workers{_whose(group)}: {group.nodes.in_words()}" for group in groups),
        f"head: {_HEAD_CPUS} CPU cores and {_HEAD_GIB} GiB",
        f"run_dir: {run_dir}, on the volume of the claim {claim or CLAIM}",
        *([unplanned] if unplanned else []),
        *([f"image: {image} has to be changed, or named by --image"] if image.startswith(PLACEHOLDER) else []),
    ]
    print("\n".join(notes), file=sys.stderr, flush=True)
    return f"# {order.pipeline.name} as one run of its own, by rlhf_ray {own}.\n{as_yaml(manifest)}"


def pack(upload: Upload) -> str:
    """The upload as one line of text; equal uploads give equal lines.

    Raises:
        ConfigError: it is more than LIMIT_BYTES.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in contents(upload).items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED, 9)
    text = base64.b64encode(content.getvalue()).decode()
    if len(text) > LIMIT_BYTES:
        largest = sorted(upload.items, key=lambda item: item.size, reverse=True)
        lines = [f"  {item.why}: {item.source}, {in_words(item.size)}" for item in largest[:SHOWN]]
        raise ConfigError(
            f"what the pipeline names on this machine is {in_words(len(text))} when packed, and a manifest takes "
            f"{in_words(LIMIT_BYTES)}:\n" + "\n".join(lines) + "\n"
            f"Put what is large on the volume that the pods have at {MOUNT} and name it there, such as "
            f"{MOUNT}/data/train.jsonl; or name it as it is called on the Hugging Face hub."
        )
    return text


def unpack_into(folder: Path) -> None:
    """Writes what travelled in PACKED to the folder, unless an earlier try did.

    Raises:
        ConfigError: nothing did.
    """
    # Taken out, so that workers do not inherit it.
    packed = os.environ.pop(PACKED, None)
    if folder.is_dir():
        return
    if packed is None:
        raise ConfigError(f"{PACKED} is not set; wanted a job that `rlhf-ray submit --kuberay` wrote")

    def write(partial: Path) -> None:
        with zipfile.ZipFile(io.BytesIO(base64.b64decode(packed, validate=True))) as archive:
            archive.extractall(partial)

    from rlhf_ray.trainers.durable import write_folder

    write_folder(folder, write)


def run_dir_of(run_dir: str) -> str:
    """The run's folder on the shared volume: what is relative goes there.

    Raises:
        ConfigError: it is elsewhere, and would go with its pod.
    """
    path = PurePosixPath(run_dir)
    if not path.is_absolute() and not run_dir.startswith("~"):
        own = PurePosixPath(MOUNT).name
        return str(
            PurePosixPath(MOUNT, *(path.parts[1:] if path.parts[0] == own and len(path.parts) > 1 else path.parts))
        )
    if path == PurePosixPath(MOUNT) or not path.is_relative_to(MOUNT):
        raise ConfigError(
            f"run_dir: got {run_dir!r}, wanted a folder below {MOUNT}, where the pods have the volume that outlives "
            f"them: --run-dir {MOUNT}/{path.name}"
        )
    return run_dir


def job_name(run_dir: str) -> str:
    """The RayJob's name: `/runs/quickstart` gives `rlhf-ray-quickstart`."""
    word = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(run_dir).name.lower())
    return f"rlhf-ray-{word}"[:_NAME_LENGTH].strip("-")


def entrypoint(name: str, packed: str, *, secrets: Sequence[str]) -> str:
    """What the job runs on the head: it unpacks the pipeline, and starts the run or goes on with it."""
    folder = f"{_UPLOADS}/{name}-{hashlib.sha256(packed.encode()).hexdigest()[:8]}"
    return shlex.join([*job_words(secrets), "--unpack", folder, "--pid-file", PID_FILE])


def ray_job(
    name: str,
    command: str,
    groups: Sequence[NodeGroup],
    *,
    image: str,
    claim: str,
    ray_version: str,
    save_s: int,
    secrets: Sequence[str],
    head_variables: Mapping[str, str],
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest.

    Args:
        name: of the RayJob.
        command: what it runs on the head.
        groups: the nodes of its workers, one pod for each.
        image: of all pods.
        claim: persistent volume claim that many nodes can write to.
        ray_version: that of the image.
        save_s: seconds to save a checkpoint when the run is stopped.
        secrets: names of further variables, which the pods take from KEYS_SECRET.
        head_variables: further variables of the head; never a secret.
        metadata: noted with Ray's job.
    """
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": command,
            "metadata": dict(metadata),
            "backoffLimit": RETRIES,
            "submissionMode": "K8sJobMode",
            "submitterConfig": {"backoffLimit": 3},
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _ENDED_KEPT_S,
            "preRunningDeadlineSeconds": _START_S,
            "runtimeEnvYAML": f'env_vars:\n  RAY_JOB_STOP_WAIT_TIME_S: "{save_s}"\n',
            "rayClusterSpec": {
                "rayVersion": ray_version,
                "authOptions": {"mode": "token", "secretName": TOKEN_SECRET},
                "headGroupSpec": _head(image, claim, save_s, secrets, head_variables),
                "workerGroupSpecs": [_workers(image, claim, group, secrets) for group in groups],
            },
        },
    }


def as_yaml(manifest: Mapping[str, Any]) -> str:
    """The manifest as `kubectl apply` reads it."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120)


def _head(image: str, claim: str, save_s: int, secrets: Sequence[str], variables: Mapping[str, str]) -> dict[str, Any]:
    stop_s = save_s + _STOP_MARGIN_S
    container = {
        "name": "ray-head",
        "image": image,
        "securityContext": {"allowPrivilegeEscalation": False},
        "ports": [_port("gcs-server", 6379), _port("dashboard", 8265), _port("metrics", int(_METRICS))],
        "env": [
            *_environment(["HF_TOKEN", "WANDB_API_KEY", *secrets]),
            *({"name": key, "value": value} for key, value in variables.items()),
        ],
        "lifecycle": {"preStop": {"exec": {"command": ["stop_driver", str(stop_s)]}}},
        **_resources({"cpu": str(_HEAD_CPUS), "memory": f"{_HEAD_GIB}Gi"}),
    }
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "metrics-export-port": _METRICS},
        "template": _pod(container, claim, grace_s=stop_s + _STOP_MARGIN_S, shared_gib=_HEAD_GIB // 2),
    }


def _whose(group: NodeGroup) -> str:
    return f" of {' and '.join(group.roles)}" if group.roles else ""


def _workers(image: str, claim: str, group: NodeGroup, secrets: Sequence[str]) -> dict[str, Any]:
    nodes = group.nodes
    gpus = {"nvidia.com/gpu": str(nodes.gpus)} if nodes.gpus else {}
    container = {
        "name": "ray-worker",
        "image": image,
        "securityContext": {"allowPrivilegeEscalation": False},
        "ports": [_port("metrics", int(_METRICS))],
        "env": _environment(["HF_TOKEN", *secrets]),
        **_resources({"cpu": str(nodes.cpus), "memory": f"{nodes.memory_gib}Gi", **gpus}),
    }
    return {
        "groupName": group.name,
        **({"labels": group.labels} if group.labels else {}),
        "replicas": nodes.count,
        "minReplicas": nodes.count,
        "maxReplicas": nodes.count,
        "rayStartParams": {"metrics-export-port": _METRICS},
        "template": _pod(container, claim, grace_s=_WORKER_GRACE_S, shared_gib=nodes.shared_gib),
    }


def _pod(container: dict[str, Any], claim: str, *, grace_s: int, shared_gib: int) -> dict[str, Any]:
    """A pod that Prometheus finds, with the shared volume and with memory as /dev/shm; nobody in it is root."""
    mounts = [{"name": "runs", "mountPath": MOUNT}, {"name": "shm", "mountPath": "/dev/shm"}]
    return {
        "metadata": {"annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": _METRICS}},
        "spec": {
            "terminationGracePeriodSeconds": grace_s,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
            "containers": [container | {"volumeMounts": mounts}],
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_gib}Gi"}},
            ],
        },
    }


def _environment(secrets: Sequence[str]) -> list[dict[str, Any]]:
    """The cache of models on the shared volume, and each secret once, where there is one."""
    keys = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": KEYS_SECRET, "key": name.lower(), "optional": True}}}
        for name in dict.fromkeys(secrets)
    ]
    return [{"name": "HF_HOME", "value": f"{MOUNT}/huggingface"}, *keys]


def _resources(quantities: dict[str, str]) -> dict[str, Any]:
    return {"resources": {"requests": quantities, "limits": quantities}}


def _port(name: str, number: int) -> dict[str, Any]:
    return {"name": name, "containerPort": number}


class _Dumper(yaml.SafeDumper):
    """Without anchors, and with texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
