"""The house keeps its shape: no import points up, there is no cycle, and the README's commands are the ones that CI runs."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOUSE = (
    (
        "ground",
        "errors devices files fonts progress events processes memory watch mini.shapes",
    ),
    (
        "pure parts",
        "buckets captions images noise loss averaging deltas lora_names lora_metadata int8 lora_adapters lora_fused lora_flat "
        "lora lora_attention recorded winograd optimizer picture_checks recipes amounts model_card charts report_blocks "
        "report_style report_markdown verdict prompts png_settings mini.world",
    ),
    (
        "disk and models",
        "config config_tables linked counts share_checks report_page report_settings dataset data_folders caption_tables "
        "kohya_toml views caption_findings picture_findings weights_file lora_formats lora_layouts lora_file base_model "
        "base_kinds base_parts base_sources base_files checkpoint_keys checkpoint_configs hub tokenizer_files text "
        "text_embeddings latents lora_notes samplers request mini.tokens mini.reader mini.lead",
    ),
    (
        "rooms",
        "cache generate voices picture_settings run_folder run_lock checkpoint resuming samples validation report_facts report_curves runs "
        "dataset_report contact_sheet material adapters result regularisation base_tensors lora_tools lora_merge lora_extract "
        "bake shelf lora_moves chosen captioner job_states job_line mini.pretrain mini.examples",
    ),
    (
        "stories",
        "report proof prepare pausing course train excerpt trial trial_process forecast plan share comparison many compare "
        "jobs sheets mini.evaluate",
    ),
    (
        "roof",
        "ui demo cli_tools cli_train cli_runs cli __main__",
    ),
)
FLOORS = {name: floor for floor, (_, names) in enumerate(HOUSE) for name in names.split()}


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


def test_every_room_has_a_floor_and_no_import_points_up() -> None:
    rooms = {name: goals for name, goals in imports().items() if name not in ("", "mini", "mini.__init__")}
    assert set(rooms) <= set(FLOORS), "a new file needs a floor"
    assert [(name, goal) for name, goals in rooms.items() for goal in goals if FLOORS[goal] > FLOORS[name]] == []


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
