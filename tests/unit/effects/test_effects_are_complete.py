"""No act on the outside world goes past the failpoints: every such call sits in a function that `@effect` marks.

Read from the source, not from a run, so that a path that no test takes is found too. A plain function counts as covered
when all of its callers in its module are: then the failpoint stands around it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = [ROOT / "dispatcher", *sorted((ROOT / "plugins").glob("*/src"))]
# The failpoints themselves; clients and shipped fakes, which are not the daemon; logging and metrics, which only speak.
# The image worker is a process of its own: the failpoint stands around starting it.
LEFT_OUT = (
    "dispatcher/effects.py",
    "plugins/images/src/dispatcher_images/unpack.py",
    "plugins/images/src/dispatcher_images/worker.py",
    "dispatcher/commands/",
    "dispatcher/testing/",
    "dispatcher/observability/",
    "dispatcher/manifest/",
)

# Names whose call acts on files, mounts, processes or engines, by how they are written in a call.
MODULE_CALLS = {
    "os": {
        "mkdir", "makedirs", "unlink", "remove", "rename", "replace", "rmdir", "symlink", "link", "mknod", "mkfifo",
        "chown", "lchown", "truncate", "ftruncate", "kill", "killpg", "setxattr", "removexattr",
    },
    "shutil": {"rmtree", "move", "copy", "copy2", "copyfile", "copytree", "chown"},
    "subprocess": {"run", "Popen", "check_call", "check_output", "call"},
    "asyncio": {"create_subprocess_exec", "create_subprocess_shell"},
    "signal": {"pidfd_send_signal"},
}  # fmt: skip
METHOD_CALLS = {"unlink", "rmdir", "symlink_to", "hardlink_to", "write_text", "write_bytes", "mkdir"}
WRITE_MODES = set("wax+")


@dataclass
class Function:
    name: str
    line: int
    decorated: bool
    acts: list[tuple[int, str]] = field(default_factory=list)
    calls: set[str] = field(default_factory=set)


def is_act(call: ast.Call) -> str | None:
    """The name of the act, when this call is one."""
    function = call.func
    if isinstance(function, ast.Attribute):
        if isinstance(function.value, ast.Name) and function.attr in MODULE_CALLS.get(function.value.id, ()):
            return f"{function.value.id}.{function.attr}"
        if function.attr in METHOD_CALLS and not (isinstance(function.value, ast.Name) and function.value.id == "os"):
            return f".{function.attr}"
        if function.attr == "open" and any(writes(a) for a in call.args):
            return ".open for writing"
    if isinstance(function, ast.Name) and function.id == "open" and any(writes(a) for a in call.args[1:]):
        return "open for writing"
    return None


def writes(argument: ast.expr) -> bool:
    return (
        isinstance(argument, ast.Constant)
        and isinstance(argument.value, str)
        and bool(WRITE_MODES & set(argument.value))
        and len(argument.value) <= 4
    )


def decorated(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(
        isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "effect" for d in node.decorator_list
    )


def functions(tree: ast.Module) -> list[Function]:
    """All outermost functions and methods; what is nested inside one belongs to it."""
    found = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(describe(child))
            elif isinstance(child, ast.ClassDef):
                visit(child)

    visit(tree)
    return found


def describe(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
    function = Function(node.name, node.lineno, decorated(node))
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and (act := is_act(inner)):
            function.acts.append((inner.lineno, act))
        # Any mention counts, since functions are also passed to threads.
        if isinstance(inner, ast.Name):
            function.calls.add(inner.id)
        elif isinstance(inner, ast.Attribute):
            function.calls.add(inner.attr)
    return function


def uncovered(source: str) -> list[tuple[int, str, str]]:
    """Acts outside every failpoint: (line, function, act)."""
    found = functions(ast.parse(source))
    covered = {f.name for f in found if f.decorated}
    grew = True
    while grew:
        grew = False
        for function in found:
            callers = [f for f in found if function.name in f.calls and f.name != function.name]
            if function.name not in covered and callers and all(f.name in covered for f in callers):
                covered.add(function.name)
                grew = True
    return [(line, f.name, act) for f in found if f.name not in covered for line, act in f.acts]


def source_files() -> Iterator[Path]:
    for folder in SOURCES:
        for path in sorted(folder.rglob("*.py")):
            if not str(path.relative_to(ROOT)).startswith(LEFT_OUT):
                yield path


@pytest.mark.parametrize("path", list(source_files()), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_act_stands_behind_failpoints(path: Path) -> None:
    missing = uncovered(path.read_text(encoding="utf-8"))
    assert not missing, "\n".join(
        f"{path}:{line}: {act} in {name}() is outside every @effect" for line, name, act in missing
    )


def test_the_search_finds_what_it_should() -> None:
    """The negative control: an act without a failpoint is found, one behind a failpoint is not."""
    bad = "import os\ndef leak(path):\n    os.unlink(path)\n"
    good = "from dispatcher.effects import effect\n@effect('a.b')\ndef act(path):\n    _do(path)\ndef _do(path):\n    path.unlink()\n"
    assert uncovered(bad) == [(3, "leak", "os.unlink")]
    assert uncovered(good) == []
    assert uncovered(good.replace("@effect('a.b')\n", "")) == [(5, "_do", ".unlink")]
