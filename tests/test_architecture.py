"""The house rules, read from the source: floors, imports, names, and how notebooks are kept."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ueba_helpers.study.pipeline import NOTEBOOKS, PARAMETERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ueba_helpers"
FLOORS = ("data", "task", "rl", "study")
TORCH = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "unsloth", "vllm"}

SOURCES = sorted(PACKAGE.rglob("*.py"))
NOTEBOOK_PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, *, at_import_time: bool) -> set[str]:
    """Return the modules a source imports; the names of `from x import y` count as x.y too."""
    found: set[str] = set()

    def visit(node):
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which floor they come from"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def floor_faults(name: str, tree: ast.AST) -> list[str]:
    """Return the imports that climb: a floor may import only itself and those before it."""
    own = name.split("/")[1]
    if own not in FLOORS:
        return []
    later = FLOORS[FLOORS.index(own) + 1:]
    return sorted(module for module in imports(tree, at_import_time=False)
                  if module.startswith(tuple(f"ueba_helpers.{floor}" for floor in later))
                  or module.startswith("ueba_helpers.cli"))


def torch_faults(name: str, tree: ast.AST) -> list[str]:
    """Return what a room outside rl/ imports at import time that would load PyTorch."""
    if name.startswith("ueba_helpers/rl/") and name != "ueba_helpers/rl/settings.py":
        return []
    return sorted(
        module for module in imports(tree, at_import_time=True)
        if module.split(".")[0] in TORCH
        or (module.startswith("ueba_helpers.rl.")
            and not module.startswith("ueba_helpers.rl.settings")))


def name_faults(tree: ast.AST) -> list[str]:
    """Return uses of `print` and `hasattr`, and anything named utils."""
    faults = []
    for node in ast.walk(tree):
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                and node.func.id in ("print", "hasattr")):
            faults.append(f"line {node.lineno}: {node.func.id}()")
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and "utils" in node.name.lower():
            faults.append(f"line {node.lineno}: {node.name}")
    return faults


def random_faults(tree: ast.AST) -> list[str]:
    """Return calls that draw from or seed NumPy's or Python's global random state."""
    legal = {"default_rng", "Generator", "SeedSequence", "Random", "PCG64"}
    return [f"line {node.lineno}: {ast.unparse(node.func)}" for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) in ("np.random", "numpy.random", "random")
            and node.func.attr not in legal]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------ the package

@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_floor_imports_only_the_floors_before_it(path):
    assert floor_faults(name_of(path), tree_of(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_rl_imports_torch_at_import_time(path):
    assert torch_faults(name_of(path), tree_of(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_library_prints_nothing_and_has_no_drawer_called_utils(path):
    assert name_faults(tree_of(path)) == []
    assert "utils" not in path.name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_room_touches_the_global_random_state(path):
    assert random_faults(tree_of(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_opens_with_a_docstring(path):
    assert ast.get_docstring(tree_of(path))


def test_rooms_of_a_floor_never_import_each_other_in_a_circle():
    for floor in FLOORS:
        rooms = {path.stem: {module.split(".")[2]
                             for module in imports(tree_of(path), at_import_time=False)
                             if module.startswith(f"ueba_helpers.{floor}.")} - {path.stem}
                 for path in (PACKAGE / floor).glob("*.py")}
        assert circle(rooms) == [], floor


def circle(rooms: dict[str, set[str]]) -> list[str]:
    """Return the rooms left when those that import nothing unread are taken away in turn."""
    left = dict(rooms)
    while free := [room for room, needs in left.items() if not needs & set(left)]:
        for room in free:
            del left[room]
    return sorted(left)


def test_package_files_import_nothing():
    for path in PACKAGE.rglob("__init__.py"):
        assert imports(tree_of(path), at_import_time=False) == set(), path


def test_reading_tables_and_asking_for_help_load_no_torch():
    modules = [name_of(path).removesuffix(".py").replace("/", ".") for path in SOURCES
               if not name_of(path).startswith("ueba_helpers/rl/")
               and path.name not in ("__init__.py", "__main__.py")]
    code = (f"import importlib, sys\nfor name in {[*modules, 'ueba_helpers.rl.settings']!r}:\n"
            "    importlib.import_module(name)\n"
            "    assert 'torch' not in sys.modules, name\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize(("check", "name", "source"), [
    (floor_faults, "ueba_helpers/task/x.py", "from ueba_helpers.rl.settings import RLSettings"),
    (floor_faults, "ueba_helpers/data/x.py", "def f():\n    import ueba_helpers.task.prompts"),
    (floor_faults, "ueba_helpers/rl/x.py", "from ueba_helpers import cli"),
    (torch_faults, "ueba_helpers/task/x.py", "import torch.nn"),
    (torch_faults, "ueba_helpers/rl/settings.py", "from trl import GRPOConfig"),
    (torch_faults, "ueba_helpers/study/x.py", "if True:\n    from ueba_helpers.rl import trainers"),
    (torch_faults, "ueba_helpers/study/x.py", "class A:\n    import datasets"),
    (lambda name, tree: name_faults(tree), "", "def f():\n    print('x')"),
    (lambda name, tree: name_faults(tree), "", "x = hasattr(f, 'y')"),
    (lambda name, tree: name_faults(tree), "", "class StringUtils: pass"),
    (lambda name, tree: random_faults(tree), "", "np.random.seed(0)"),
    (lambda name, tree: random_faults(tree), "", "import random\nx = random.choice([1])"),
])
def test_each_rule_rejects_a_source_that_breaks_it(check, name, source):
    assert check(name, ast.parse(source)) != []


@pytest.mark.parametrize(("check", "name", "source"), [
    (floor_faults, "ueba_helpers/rl/x.py", "from ueba_helpers.task import prompts"),
    (torch_faults, "ueba_helpers/study/x.py", "def f():\n    import torch"),
    (torch_faults, "ueba_helpers/study/x.py", "from ueba_helpers.rl.settings import RLSettings"),
    (lambda name, tree: random_faults(tree), "", "rng = np.random.default_rng([0, 1])"),
])
def test_each_rule_lets_a_lawful_source_pass(check, name, source):
    assert check(name, ast.parse(source)) == []


def test_the_check_for_circles_finds_one():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


# ------------------------------------------------------------ the notebooks

def notebook_faults(notebook: dict) -> list[str]:
    """Return what is wrong with a notebook as it is kept in the repository."""
    faults = []
    kernel = notebook["metadata"].get("kernelspec", {})
    if (kernel.get("name"), kernel.get("language")) != ("python3", "python"):
        faults.append("kernelspec is not python3 with language python")
    if "widgets" in notebook["metadata"]:
        faults.append("widget state is saved")
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    first = notebook["cells"][0]
    if first["cell_type"] != "markdown" or not "".join(first["source"]).startswith("# "):
        faults.append("the first cell is no title")
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        faults.append(f"{len(tagged)} cells are tagged 'parameters', not one")
    for cell in tagged:
        faults.extend(parameter_faults("".join(cell["source"])))
    lines = ["".join(cell["source"]).splitlines() for cell in code]
    faults.extend(f"code cell {number} has {len(cell)} lines, more than 20"
                  for number, cell in enumerate(lines, start=1) if len(cell) > 20)
    if (total := sum(sum(bool(line.strip()) for line in cell) for cell in lines)) > 200:
        faults.append(f"{total} lines of code, more than 200")
    faults.extend(f"code cell {number}: a line of {len(line)} characters, more than 88"
                  for number, cell in enumerate(lines, start=1) for line in cell if len(line) > 88)
    faults.extend(f"code cell {number} has an output or a count"
                  for number, cell in enumerate(code, start=1)
                  if cell["outputs"] or cell["execution_count"] is not None)
    return faults


def parameter_faults(source: str) -> list[str]:
    """Return what is wrong with a parameters cell: it assigns literals to the four names."""
    names, faults = [], []
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            faults.append("the parameters cell holds more than assignments")
            continue
        names.append(node.targets[0].id)
        try:
            ast.literal_eval(node.value)
        except ValueError:
            faults.append(f"parameter {names[-1]} is no literal: it would keep its old value")
    if sorted(names) != sorted(PARAMETERS):
        faults.append(f"parameters are {', '.join(names)}, not {', '.join(PARAMETERS)}")
    return faults


@pytest.mark.parametrize("path", NOTEBOOK_PATHS, ids=name_of)
def test_a_notebook_is_kept_clean_short_and_with_its_parameters(path):
    assert notebook_faults(json.loads(path.read_text(encoding="utf-8"))) == []


def test_the_table_of_the_runner_and_the_notebooks_folder_agree():
    assert [path.stem for path in NOTEBOOK_PATHS] == list(NOTEBOOKS)


GOOD_PARAMETERS = 'PROFILE = "laptop"\nSEED = 0\nDATA = ""\nRUNS = "../runs"'


def toy_notebook(code="x = 1", *, parameters=GOOD_PARAMETERS, outputs=(), count=None,
                 kernel="python3", tags=("parameters",), title="# A question?"):
    def cell(source, **more):
        return {"cell_type": "code", "source": source, "outputs": [], "execution_count": None,
                "metadata": {}} | more

    return {"metadata": {"kernelspec": {"name": kernel, "language": "python"}},
            "cells": [{"cell_type": "markdown", "source": [title], "metadata": {}},
                      cell(parameters, metadata={"tags": list(tags)}),
                      cell(code, outputs=list(outputs), execution_count=count)]}


def opens_the_test(notebook: dict) -> list[str]:
    """Return what a notebook's code cells ask the study about the split "test"."""
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"]
                     if cell["cell_type"] == "code")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls
            if ast.unparse(call.func).startswith("study.")
            and any(isinstance(value, ast.Constant) and value.value == "test"
                   for value in (*call.args, *(one.value for one in call.keywords)))]


def test_only_notebook_07_opens_the_test_users_and_only_09_reads_on():
    opened = {path.stem: opens_the_test(json.loads(path.read_text(encoding="utf-8")))
              for path in NOTEBOOK_PATHS}
    assert {name for name, calls in opened.items() if calls} == {"07_comparison",
                                                                 "09_error_analysis"}
    assert any(".judged(" in call for call in opened["07_comparison"])
    assert not any(".judged(" in call for call in opened["09_error_analysis"])
    for code in ("study.judged('ppo', split='test')", "x = study.sample(\"test\")",
                 "study.evaluate(names, split='test')"):
        assert opens_the_test(toy_notebook(code=code)) != [], "the broken twin opens it"


def test_a_clean_notebook_passes():
    assert notebook_faults(toy_notebook()) == []


@pytest.mark.parametrize(("spoiled", "fault"), [
    ({"code": "x = 1\n" * 21}, "more than 20"),
    ({"code": "x = " + "1" * 90}, "more than 88"),
    ({"outputs": [{"output_type": "stream"}]}, "has an output"),
    ({"count": 3}, "has an output or a count"),
    ({"kernel": "my-env"}, "kernelspec"),
    ({"tags": ()}, "0 cells are tagged"),
    ({"title": "no heading"}, "no title"),
    ({"parameters": GOOD_PARAMETERS + "\nSTEPS = 3"}, "parameters are"),
    ({"parameters": GOOD_PARAMETERS.replace("0", "1 if DATA else 2")}, "SEED is no literal"),
    ({"parameters": GOOD_PARAMETERS + "\nimport os"}, "more than assignments"),
])
def test_a_spoiled_notebook_does_not(spoiled, fault):
    assert any(fault in found for found in notebook_faults(toy_notebook(**spoiled)))


def test_two_hundred_lines_are_the_limit():
    notebook = toy_notebook()
    notebook["cells"] += [notebook["cells"][-1] | {"source": "x = 1\n" * 20}] * 10
    assert any("more than 200" in fault for fault in notebook_faults(notebook))


# ------------------------------------------------------------ what is installed

def test_every_requirement_is_pinned_once_and_torch_by_its_very_version():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line and " " not in line for line in pins)
    names = [line.split("==")[0].lower().replace("_", "-") for line in pins]
    assert len(names) == len(set(names))
    assert "torch==2.13.0" in pins


def test_what_the_package_declares_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {line.split("==")[0].lower() for line in
              (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if "==" in line}
    assert set(project["dependencies"]) <= pinned
