"""The rules of the house: what imports what, and how long a file and a function may be."""

import ast
import graphlib
import io
import tokenize

from conftest import ROOT

ROOMS = (
    "model",
    "measure",
    "training",
    "toy",
)  # folders; each file of the top level is a room of its own
FILES = sorted(
    [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
)
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in FILES
}
DOCUMENTED = (ast.Module, ast.FunctionDef, ast.ClassDef)
COMMANDS = ("loop", "evaluate", "benchmarks", "report")
PURE = (
    "rewards",
    "answers",
    "curate",
    "grpo",
)  # know nothing of models, files, processes or devices


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def graph():
    """Module -> the modules of the program that it imports."""
    return {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}


def rooms():
    """Room -> the rooms that it imports; a file of the top level is a room of its own."""
    found: dict[str, set[str]] = {}
    for name, used in graph().items():
        room = name.partition(".")[0]
        found.setdefault(room, set()).update(other.partition(".")[0] for other in used)
    return {room: others - {room} for room, others in found.items()}


def test_no_circle_of_imports():
    """Neither of files nor of rooms: what a room uses never uses the room."""
    for arrows in (graph(), rooms()):
        order = list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError
        assert order.index("loop") > order.index("grpo")
    assert len(graph()) > 40 and {"model", "measure", "training", "toy"} <= rooms().keys()


def test_what_rooms_may_not_see():
    """The answers of the toy's questions, and the commands."""
    arrows = graph()
    for name, used in arrows.items():
        others = {other.partition(".")[0] for other in used}
        if name.startswith("training."):
            assert not others & {"toy", "measure", *COMMANDS}, name
        if name.startswith(("measure.", "model.", "toy.")):
            assert not others & {*COMMANDS}, name
        if name.startswith("model."):
            assert others <= {"model"}, name


def test_the_equations_know_nothing_of_the_machinery():
    for name in PURE:
        assert graph()[name] <= {*PURE}, name


def test_files_and_functions_are_short():
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 600, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 60, (name, node.name)


def density(text):
    """Tokens of code in a line of code; comments and docstrings count for neither."""
    prose = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    tokens = [
        t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type in kinds
    ]
    lines = [line for line in tokens if line not in prose]
    return len(lines) / max(1, len(set(lines)))


def test_a_line_holds_one_thing():
    """About 9 tokens a line over all, and no file above 10.5."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    dense = {name: round(density(text), 2) for name, text in texts.items()}
    assert {name: value for name, value in dense.items() if value > 10.5} == {}
    assert density("\n".join(texts.values())) < 9.3


def test_a_docstring_says_what_it_does():
    """It begins with the subject or a verb, never with one of these words."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, DOCUMENTED) and (said := ast.get_docstring(node)):
                assert said.split()[0] not in ("What", "Whether", "How", "Of"), (name, said[:60])


def test_the_readme_names_every_file():
    """The file tree: each file of the program once, with a phrase, and none that is not there."""
    tree = (ROOT / "README.md").read_text().split("## The files\n\n```\n")[1].split("```")[0]
    lines = [line.split(None, 1) for line in tree.splitlines() if line.strip()]
    named = [path for path, phrase in lines if path.endswith(".py") and phrase]
    assert sorted(named) == sorted(path.relative_to(ROOT).as_posix() for path in MODULES.values())


def test_a_command_starts_behind_its_last_line():
    """What stands behind the start of `main` would not be defined yet when it runs."""
    for name in COMMANDS:
        *_, last = ast.parse(MODULES[name].read_text(encoding="utf-8")).body
        assert ast.unparse(last).startswith(
            "if __name__ == '__main__':"
        ) and "main()" in ast.unparse(last), name


def test_a_phase_speaks_of_the_algorithm_only():
    """No word of processes, parking, retries, files or bars in the phases of loop.py."""
    tree = ast.parse((ROOT / "loop.py").read_text())
    phases = ("visplay", "train_questioner", "curate_questions", "train_reasoner", "grpo_step")
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in phases]
    assert len(found) == len(phases)
    for phase in found:
        names = {n.id for n in ast.walk(phase) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(phase) if isinstance(n, ast.Attribute)}
        assert not names & {
            "ranks",
            "rank",
            "park",
            "unpark",
            "present",
            "device",
            "folder",
            "tqdm",
            "open",
        }
