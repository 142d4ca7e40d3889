"""The house keeps its shape: imports point down, there is no cycle, and the README's commands are the ones that CI runs."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = {
    "errors": 0, "devices": 0, "files": 0, "progress": 0, "mini.shapes": 0,
    "buckets": 1, "captions": 1, "images": 1, "noise": 1, "loss": 1, "deltas": 1, "lora_names": 1, "lora": 1, "optimizer": 1,
    "mini.world": 1,
    "config": 2, "dataset": 2, "data_folders": 2, "base_model": 2, "base_files": 2, "text": 2, "latents": 2, "lora_file": 2,
    "mini.tokens": 2, "mini.reader": 2, "mini.lead": 2,
    "cache": 3, "generate": 3, "run_folder": 3, "dataset_report": 3, "contact_sheet": 3, "evaluate": 3, "lora_tools": 3,
    "mini.pretrain": 3,
    "train": 4, "compare": 4, "mini.examples": 4, "mini.evaluate": 4,
    "ui": 5, "demo": 5,
    "cli": 6,
    "__main__": 7,
}  # fmt: skip
ROOMS_OF_ONE_FLOOR = {
    "errors",
    "config",
    "base_model",
    "lora_file",
    "deltas",
    "dataset",
    "ui",
}  # may be imported by neighbours of their own floor


def room(module: str) -> str:
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[:1] == ["mini"] else ".".join(parts[:1])


def imports() -> dict[str, set[str]]:
    """Which rooms each room of the package imports."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "sdlora").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        here = found.setdefault(room(module), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                here |= {room(alias.name) for alias in node.names if alias.name.startswith("sdlora.")}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sdlora":
                here |= {room(f"{node.module}.{alias.name}") for alias in node.names}
    return {name: {goal for goal in goals if goal not in ("", name)} for name, goals in found.items()}


def test_every_room_has_a_floor_and_imports_point_down() -> None:
    rooms = {name: goals for name, goals in imports().items() if name not in ("", "mini", "mini.__init__")}
    assert set(rooms) <= set(FLOORS), "a new file needs a floor"
    arrows = [(name, goal) for name, goals in rooms.items() for goal in goals]
    wrong = [(name, goal) for name, goal in arrows if FLOORS[goal] >= FLOORS[name] and goal not in ROOMS_OF_ONE_FLOOR]
    assert wrong == []


def test_there_is_no_import_cycle() -> None:
    graph = imports()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' → '.join([*path, name])}"
        if name not in done:
            for goal in graph.get(name, ()):
                visit(goal, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_ci_runs_exactly_the_readme_test_command() -> None:
    readme_lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "tests.check" in line and "venv" in line]
    ci_lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if "tests.check" in line]
    assert readme_lines == ci_lines
    assert len(ci_lines) == 1


def test_the_example_folders_hold_no_code() -> None:
    assert not list((ROOT / "datasets").rglob("*.py"))
