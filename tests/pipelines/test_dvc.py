"""dvc.yaml lists what its cells read: the conf files that Hydra composes and the modules that the script imports."""

import ast
from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

ROOT = Path(__file__).parents[2]
# It watches runs and changes no result; neither do the choices of the tracker in conf/logger.
WATCHES = {"src/attnlens/tracking.py", "conf/logger/wandb.yaml"}


@cache
def cells():
    """(stage, cell name, resolved stage) for every cell, as DVC itself resolves them."""
    from dvc.repo import Repo

    repo = Repo(str(ROOT))
    found = []
    for stage in repo.index.stages:
        files = {Path(dep.def_path).as_posix() for dep in stage.deps}
        found.append((stage.name.split("@")[0], stage.name, stage.cmd, files))
    return found


def names():
    return [cell[1] for cell in cells()]


def composed_files(command: str) -> set[str]:
    """The files of conf/ that Hydra reads for this command line."""
    words = command.split()
    script, overrides = Path(words[1]).stem, words[2:]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list(script, overrides, RunMode.RUN).defaults
        compose(script, overrides)
    paths = {f"conf/{item.config_path}.yaml" for item in defaults if not item.is_self or item.config_path}
    return {path for path in paths if (ROOT / path).exists()}


def module_file(name: str) -> Path | None:
    base = ROOT / "src" / Path(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


@cache
def imported(path: Path) -> frozenset[Path]:
    """Files of attnlens that `path` imports, function bodies included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        wanted = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            wanted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {file for name in wanted if name.startswith("attnlens") and (file := module_file(name))}
    return frozenset(found)


def closure(start: set[Path]) -> set[str]:
    """Files of attnlens that running the start files can import; what only watches is not followed."""
    seen, queue = {ROOT / path for path in WATCHES}, list(start)
    while queue:
        path = queue.pop()
        if path not in seen:
            seen.add(path)
            queue += imported(path) - seen
    return {
        path.relative_to(ROOT).as_posix() for path in seen if path.name != "__init__.py" or path.stat().st_size > 600
    }


def targets(files: set[str]) -> set[Path]:
    """Modules that the `_target_`s of the composed files name."""
    found = set()
    for file in files:
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if "_target_: attnlens." in line.split("#")[0]:
                name = line.split("_target_:")[1].split("#")[0].strip().rsplit(".", 1)[0]
                found.add(module_file(name) or pytest.fail(f"{file} names {name}, which does not exist"))
    return found


@pytest.mark.parametrize("name", names())
def test_a_cell_lists_every_conf_file_that_hydra_composes(name):
    _, _, command, listed = next(cell for cell in cells() if cell[1] == name)
    missing = composed_files(command) - listed - WATCHES
    assert not missing, f"{name} reads {sorted(missing)} without depending on them"


def test_no_stage_lists_a_conf_file_that_none_of_its_cells_reads():
    for stage in {cell[0] for cell in cells()}:
        listed = set().union(*(cell[3] for cell in cells() if cell[0] == stage))
        read = set().union(*(composed_files(cell[2]) for cell in cells() if cell[0] == stage))
        idle = {path for path in listed if path.startswith("conf/")} - read
        assert not idle, f"{stage} depends on {sorted(idle)} and reads none of them"


@pytest.mark.parametrize("name", names())
def test_a_cell_lists_every_module_it_imports(name):
    _, _, command, listed = next(cell for cell in cells() if cell[1] == name)
    script = ROOT / command.split()[1]
    # Training composes conf/data for the record and reads what `prepare` made of it: it builds no generator.
    built = {file for file in composed_files(command) if script.stem == "prepare" or not file.startswith("conf/data/")}
    needed = closure({script} | targets(built - WATCHES)) - WATCHES
    covered = {path for path in needed if any(path == dep or path.startswith(f"{dep}/") for dep in listed)}
    assert needed == covered, f"{name} imports {sorted(needed - covered)} without depending on them"


def test_the_axes_name_existing_files():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for axis, folder in (("attention", "attention"), ("data", "data"), ("data", "experiment"), ("source", "source")):
        for name in params[axis]:
            assert (ROOT / "conf" / folder / f"{name}.yaml").exists(), f"params.yaml: {axis} {name}"
    assert params["reference"] in params["attention"]


def test_dvc_leaves_composition_to_the_scripts():
    """With DVC's own Hydra support `dvc repro` never composes, and a stale params.yaml would go unnoticed."""
    config = (ROOT / ".dvc" / "config").read_text()
    assert "hydra" not in config
    assert "analytics = false" in config
