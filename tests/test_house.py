"""The plan of the house (README, "A walk through the house"): who may import whom, and how long a file may be."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minqstar"
MAY_IMPORT = {  # a file also sees its own room, and every file sees those of the ground floor
    "errors console files text": set(),
    "theory": set(),
    "lm": set(),
    "world": {"theory", "lm"},
    "search": {"theory", "lm"},
    "training": {"theory", "lm"},
    "ask pair evaluate bellman runchecks score show page": {"theory", "lm", "world", "search", "training", "cli"},
    "pipeline options datasets": {"theory", "lm", "world", "search", "training", "evaluate"},
    "lab": set("theory lm world search training evaluate pipeline cli __init__".split()),
    "cli": set(),
    "__init__ __main__": set("theory lm world search training evaluate pipeline lab cli".split()),
}
ROOM_OF = {room: names for names in MAY_IMPORT for room in names.split()}
REST, LAB = 11_330, 5_630  # lines of the package without lab, which is to come down to 6,500, and of lab
LONG = {"model", "mcts", "evaluator"}  # one idea each: a transformer, a tree search, what is searched over
EVENING = """theory/mdp theory/qfunction theory/losses lm/model training/data training/scoring training/trainer
search/beam search/mcts pipeline"""


def modules() -> dict[str, Path]:
    """Every file of the package by its dotted name; a room's `__init__` by the room's."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(path: Path) -> set[str]:
    """Dotted names, the package's own left out, that a file imports, inside of functions too.

    A command may take `cli` where it starts as one, under `if __name__ == "__main__"`.
    """
    found, tree = set(), ast.parse(path.read_text())
    started = {id(node) for top in tree.body if isinstance(top, ast.If) and "__main__" in ast.unparse(top.test)
               for node in ast.walk(top)}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in started:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minqstar":
            module = node.module.removeprefix("minqstar").removeprefix(".")
            found |= {module} if module else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.split(".")[0] == "minqstar"}
            found |= {name.removeprefix("minqstar.") if "." in name else "__init__" for name in names}
    return found


def room(name: str) -> str:
    return ROOM_OF[name.split(".")[0]]


def test_every_file_imports_from_its_own_room_and_from_those_below():
    for name, path in modules().items():
        for other in imports(path):
            allowed = {ROOM_OF[of] for of in MAY_IMPORT[room(name)]} | {room(name), room("errors")}
            assert room(other) in allowed, f"{name} imports {other}"


def test_no_two_files_import_each_other():
    files = modules()
    below = {name: {other for other in imports(path) if other in files} for name, path in files.items()}
    while leaves := {name for name, others in below.items() if not others & below.keys()}:
        below = {name: others for name, others in below.items() if name not in leaves}
    assert not below, "a circle of imports"


def test_the_budgets_of_lines_hold():
    lines = {path: len(path.read_text().splitlines()) for path in modules().values()}
    assert {path.stem for path, count in lines.items() if count > 300} == LONG
    lab, rest = (
        sum(count for path, count in lines.items() if ("lab" in path.parts) is within and "learn" not in path.parts)
        for within in (True, False)
    )
    assert lab < LAB and rest < REST
    assert sum(lines[PACKAGE / f"{name}.py"] for name in EVENING.split()) < 2200
    for path in lines:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 65, f"{path.name}: {node.name} is long"


def test_the_table_names_no_room_that_is_not_there():
    there = {name.split(".")[0] for name in modules()} | {"__init__", "__main__"}
    assert set(ROOM_OF) <= there


def test_the_top_level_holds_what_the_design_lists():
    listed = {"pyproject.toml", "README.md", "LICENSE", "train.py", "sample.py", "minqstar", "tests", "data"}
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {line.split("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in tracked if not name.startswith(".")} == listed


def test_the_equation_table_names_what_exists():
    """Every function and every test in the table of equations is there."""
    readme = (PACKAGE / "theory/README.md").read_text()
    section = readme[readme.index("| paper | what holds") : readme.index("## The checker on a run")].strip()
    rows = re.findall(r"^\|.*\| `([\w.]+)` \| `(\w+)\.(\w+)` \|$", section, re.M)
    assert len(rows) == section.count("\n|") - 1 == 47
    for function, file, test in rows:
        module, name = function.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(f"minqstar.{module}"), name))
        assert f"\ndef {test}(" in (ROOT / "tests" / f"{file}.py").read_text()
