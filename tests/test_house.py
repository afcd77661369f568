"""The plan of the house: a file imports only from floors below its own (and search/beam, mcts from decode)."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = {
    1: {"cli", "mdp", "qfunction", "attention", "model", "tokenizer", "optim", "scenarios"},
    2: {"losses", "fast", "automaton", "tldr", "data", "checkpoint"}
    | {f"search.{name}" for name in ("evaluator", "decode", "beam", "tree", "mcts")},
    3: {"scoring", "identities", "faults", "pretrained"},
    4: {"trainer", "runchecks", "bellman"},
    5: {
        f"lab.{name}"
        for name in (
            "evaluate slots credit figures findings plots studies courses bench growth levers workloads session "
            "pipeline tabular searches treeview"
        ).split()
    },
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
BESIDE = {
    ("faults", "identities"),
    ("mdp", "qfunction"),
    ("bellman", "runchecks"),
    ("model", "attention"),
    ("tldr", "automaton"),
    ("search.evaluator", "fast"),
    ("search.decode", "search.evaluator"),
    ("search.beam", "search.decode"),
    ("search.beam", "search.evaluator"),
    ("search.mcts", "search.evaluator"),
    ("search.mcts", "search.tree"),
    ("search.mcts", "search.decode"),
    ("lab.evaluate", "lab.searches"),
    ("lab.bench", "lab.workloads"),
    ("lab.levers", "lab.workloads"),
    ("lab.growth", "lab.bench"),
    ("lab.growth", "lab.workloads"),
    ("lab.pipeline", "lab.evaluate"),
    ("lab.pipeline", "lab.session"),
    ("lab.credit", "lab.plots"),
    ("lab.credit", "lab.slots"),
    ("lab.plots", "lab.credit"),
    *(("lab.studies", f"lab.{name}") for name in ("pipeline", "session")),
    *(("lab.courses", f"lab.{name}") for name in ("evaluate", "studies")),
    *(("lab.findings", f"lab.{name}") for name in ("courses", "credit", "evaluate", "searches", "studies", "tabular")),
    *(("lab.figures", f"lab.{name}") for name in ("findings", "plots", "studies")),
}
NEVER_SEES = {  # beyond the floors: search and training do not know each other; the mathematics sees no network
    "search": {"trainer", "optim", "data", "scoring"},
    "trainer": {"search.evaluator", "search.decode"},
    "losses": {"model", "scoring"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minqstar"):
            found.add(node.module.removeprefix("minqstar."))
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("minqstar.") for alias in node.names if alias.name.startswith("minqstar")}
    return found


def test_every_file_imports_from_floors_below():
    files = {
        ".".join(path.relative_to(ROOT / "minqstar").with_suffix("").parts): path
        for path in (ROOT / "minqstar").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert len(files) >= 15
    assert set(files) <= set(FLOOR), "a file has no floor"
    for name, path in files.items():
        for other in imports(path):
            if other == "cli" and name != "cli":
                continue  # the foundation: how errors reach the user
            assert FLOOR[other] < FLOOR[name] or (name, other) in BESIDE, f"{name} imports {other}"
            assert other not in NEVER_SEES.get(name.split(".")[0], set()), f"{name} must not know {other}"


def test_the_top_level_holds_what_the_design_lists():
    listed = {"pyproject.toml", "README.md", "LICENSE", "train.py", "sample.py", "minqstar", "tests", "data"}
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {line.split("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in tracked if not name.startswith(".")} == listed


def test_the_equation_table_names_what_exists():
    """Every function and every test in the README's table of equations is there."""
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## The equations") : readme.index("## Searching is optimising")]
    rows = re.findall(r"^\|.*\| `([\w.]+)` \| `(\w+)\.(\w+)` \|$", section, re.M)
    assert len(rows) == section.count("\n|") - 2 == 19
    for function, file, test in rows:
        module, name = function.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(f"minqstar.{module}"), name))
        assert f"\ndef {test}(" in (ROOT / "tests" / f"{file}.py").read_text()
