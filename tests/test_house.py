"""The rules of the house: what imports what, and how long a file and a function may be."""

import ast
import graphlib

from conftest import ROOT

OTHERS = ("tests", "bench", "notebooks")
FILES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not path.relative_to(ROOT).parts[0].startswith((".", *OTHERS)) and "venv" not in str(path.parent)
]
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in FILES}
PURE = ("rewards", "answers", "curate", "grpo")  # know nothing of models, files, processes or devices


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_circle_of_imports():
    graph = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("loop") > order.index("grpo") and len(order) > 25


def test_the_equations_know_nothing_of_the_machinery():
    known = {*PURE, "engine.latex"}
    for name in PURE:
        assert imports(MODULES[name]) & MODULES.keys() <= known, name
    assert not any("engine.run" in imports(MODULES[name]) for name in ("vlm", "generate", "packing", "cache"))


def test_files_and_functions_are_short():
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 600, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 60, (name, node.name)


def test_a_phase_speaks_of_the_algorithm_only():
    """No word of processes, parking, retries, files or bars in the phases of loop.py."""
    tree = ast.parse((ROOT / "loop.py").read_text())
    phases = ("visplay", "train_questioner", "curate_questions", "train_reasoner", "update")
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in phases]
    assert len(found) == len(phases)
    for phase in found:
        names = {n.id for n in ast.walk(phase) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(phase) if isinstance(n, ast.Attribute)}
        assert not names & {"ranks", "rank", "park", "unpark", "present", "device", "folder", "tqdm", "open"}
