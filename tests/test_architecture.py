"""The layer law: imports go only downward or sideways; and what the package never does."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_ray"
LAYERS = [
    ("errors", "shapes"),
    ("config", "algorithms"),
    ("data", "models"),
    ("engines", "distributed"),
    ("workers",),
    ("trainers",),
    ("stages", "pipeline", "plan", "inference", "responses"),
    ("bench", "report"),
    (
        *("cli", "bench_commands", "plan_command", "scale_command", "options", "terminal", "doctor", "start"),
        *("submit", "submission", "status", "__main__"),
    ),
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
OWNERS = {
    "vllm": {
        "engines/vllm_generation.py",
        "engines/vllm_kernels.py",
        "engines/vllm_loading.py",
        "engines/vllm_scheduler.py",
        "engines/vllm_worker_extension.py",
        "bench/bare_vllm.py",
    },
    "deepspeed": {"engines/deepspeed_training.py", "bench/bare_training.py"},
    "ray": {path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "distributed").glob("*.py")},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            yield node.module or ""
            if node.module == "rlhf_ray":
                yield from (f"rlhf_ray.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_errors(room: str, source: str) -> list[str]:
    rooms = [name.split(".")[1] for name in imported_modules(ast.parse(source)) if name.startswith("rlhf_ray.")]
    return [f"{room} imports {other}" for other in rooms if other in LEVEL and LEVEL[other] > LEVEL[room]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_downward(path: Path) -> None:
    if path != PACKAGE / "__init__.py":
        assert room_of(path) in LEVEL, f"{path.name} stands in no layer"
        assert layer_errors(room_of(path), path.read_text()) == []


def test_an_upward_import_is_found() -> None:
    assert layer_errors("workers", "def f():\n    from rlhf_ray.trainers.ppo import train_ppo") == [
        "workers imports trainers"
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_third_parties_stay_in_their_rooms(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    roots = {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}
    strangers = {library for library, owners in OWNERS.items() if library in roots and name not in owners}
    assert strangers == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_peft_is_imported_only_when_an_adapter_is_there(path: Path) -> None:
    """It takes two seconds, which driver and scorers do not need."""
    statements = ast.Module([each for each in ast.parse(path.read_text()).body if not is_definition(each)], [])
    assert "peft" not in {module.split(".")[0] for module in imported_modules(statements)}


def is_definition(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def test_algorithms_are_torch_alone() -> None:
    allowed = {"torch", "rlhf_ray", "collections", "dataclasses", "typing", "math", "__future__"}
    for path in (PACKAGE / "algorithms").glob("*.py"):
        modules = set(imported_modules(ast.parse(path.read_text())))
        assert {module.split(".")[0] for module in modules} <= allowed, path
        assert all(
            m.startswith(("rlhf_ray.algorithms", "rlhf_ray.shapes")) for m in modules if m.startswith("rlhf_ray")
        )


def unsafe_calls(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unsafe = name in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}
        unsafe |= name == "torch.load" and keywords.get("weights_only") != "True"
        unsafe |= keywords.get("trust_remote_code", "False") != "False"
        if unsafe:
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    assert unsafe_calls(path.read_text()) == []


def test_unsafe_calls_are_found() -> None:
    source = "torch.load(f)\ntorch.load(f, weights_only=True)\nyaml.load(f)\nload(x, trust_remote_code=True)"
    assert [line.split(":")[0] for line in unsafe_calls(source)] == ["line 1", "line 3", "line 4"]
