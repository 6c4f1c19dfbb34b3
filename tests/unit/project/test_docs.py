"""The documentation says what the code does: links, names, tables and examples are compared with the real thing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dispatcher import api, errors
from dispatcher.api import ExecSpec
from dispatcher.commands.cli import COMMANDS, plugin_commands
from dispatcher.config import Config
from dispatcher.cri import status_codes
from dispatcher.cri.service import UNIMPLEMENTED
from dispatcher.effects import REGISTERED
from dispatcher.model import Isolation
from dispatcher.policy import RuntimeTraits, load_policy
from dispatcher.policy.schema import Match, PolicyFile, Rule, TestContainer, TestPod

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAITS = {"docker": RuntimeTraits(isolation=Isolation.SHARED_KERNEL)}


def read(name: str) -> str:
    """A page below docs/."""
    return (ROOT / "docs" / name).read_text()


def code_blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def rows_below(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a line that holds `heading`, without its first two lines."""
    after = page[page.index(heading) :]
    table = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
    assert table is not None
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def words(cell: str) -> list[str]:
    """The code words of a table's cell."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", cell)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file or folder that exists."""
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_and_targets_exist(page: Path) -> None:
    """Every `dispatcher X` and `make X` in code is one."""
    text = page.read_text()
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = {name for name, _module, _line in COMMANDS} | set(plugin_commands())
    for line in code:
        for command in re.findall(r"(?:^|&& |; )dispatcher ([a-z]+)\b", line):
            assert command in commands, line
        for target in re.findall(r"(?:^|&& |; )make ([a-z-]+)", line):
            assert target in targets, line


def test_readme_begins_with_what_a_bare_machine_needs() -> None:
    """The first command installs the tools of the second; then come the demo and the tests."""
    first, clone, demo, test = re.findall(r"^    (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)[:4]
    assert first.startswith("apt-get update && apt-get install")
    assert {"git", "make", "python3-venv", "ca-certificates"} <= set(first.split())
    assert clone.startswith("git clone")
    assert (demo, test) == ("make demo", "make test")


def test_scope_names_what_is_not_served() -> None:
    """The RPCs that answer UNIMPLEMENTED are listed, all of them and no others."""
    text = read("scope.md")
    listed = text[text.index("## Not yet") : text.index("## Promises")]
    names = {word for word in words(listed) if re.fullmatch(r"[A-Z][A-Za-z]+", word)} - {"ExecSync"}
    assert names == UNIMPLEMENTED


def test_architecture_has_the_table_of_errors() -> None:
    """Each error class with its code, as the one table in the code has it."""
    listed = {row[0]: row[1] for row in rows_below(read("architecture.md"), "## Errors")}
    assert listed == {cls.__name__: code.name for cls, code in status_codes.CODES.items()}
    assert all(issubclass(getattr(errors, name), errors.DispatcherError) for name in listed)


def test_policy_reference_is_complete() -> None:
    """Every key of the file, of rules, matchers and test cases is explained."""
    text = read("policy.md")

    def keys_of(model: Any) -> set[str]:
        model.model_rebuild()  # a field whose type comes later in the module has no alias before
        return {field.alias or name for name, field in model.model_fields.items()}

    assert {word for row in rows_below(text, "## Keys") for word in words(row[0])} == keys_of(PolicyFile)
    assert {word for row in rows_below(text, "### Rules") for word in words(row[0])} == keys_of(Rule)
    matchers = rows_below(text, "| matcher | phase |")
    assert {word for row in matchers for word in words(row[0])} == keys_of(Match)
    tests = set(words(text[text.index("### Tests") : text.index("## Changing it")]))
    assert keys_of(TestPod) | keys_of(TestContainer) <= tests


@pytest.mark.parametrize("number", range(len(code_blocks(read("policy.md"), "yaml"))))
def test_policy_examples_load(number: int) -> None:
    """Each example is a whole file that passes all checks and its own tests."""
    load_policy(code_blocks(read("policy.md"), "yaml")[number], "docs/policy.md", TRAITS)


def test_examples_for_the_kubelet_lead_here() -> None:
    """What is to be copied is YAML; it names the shipped socket, the shipped settings, and handlers of the policy."""
    socket = f"unix://{Config().socket.path}"
    shipped = yaml.safe_load((ROOT / "config/kubelet.yaml").read_text())
    settings, kubeadm, runtime_class = code_blocks(read("kubelet.md"), "yaml")
    assert yaml.safe_load(settings).items() <= shipped.items()
    init, kubelet = yaml.safe_load_all(kubeadm)
    assert init["nodeRegistration"]["criSocket"] == socket == shipped["containerRuntimeEndpoint"]
    assert kubelet.items() <= shipped.items()
    handlers = yaml.safe_load((ROOT / "config/policy-docker.yaml").read_text())["handlers"]
    assert yaml.safe_load(runtime_class)["handler"] in handlers


def test_plugin_example_is_a_plugin() -> None:
    """The example enrols as it stands, checks its section, and votes."""
    example, effect_example, step_example = code_blocks(read("plugins.md"), "python")
    scope: dict[str, Any] = {}
    exec(compile(example, "docs/plugins.md", "exec"), scope)
    offered: dict[str, Any] = {}

    class Registrar:
        def check_section(self, check: Any) -> None:
            offered["check"] = check

        def route_hook(self, hooks: Any) -> None:
            offered["hooks"] = hooks

    plugin = scope["plugin"]
    assert plugin.API <= api.API_VERSION
    plugin.register(Registrar())
    offered["check"]({"label": "tenant"})
    with pytest.raises(ValueError, match="unknown key 'lable'"):
        offered["check"]({"lable": "tenant"})

    class Pod:
        labels = {"tenant": "a"}  # noqa: RUF012

    assert offered["hooks"].route_pod(Pod())[0] == "hyper_vm"
    exec(compile(effect_example, "docs/plugins.md", "exec"), {})
    exec(compile(step_example, "docs/plugins.md", "exec"), {})
    REGISTERED.discard("example.make_disk")


def test_plugin_page_names_the_whole_interface() -> None:
    """Every method of the registrar, every service and every ability has its line."""
    text = read("plugins.md")
    registrar = {word.partition("(")[0] for row in rows_below(text, "| `registrar.`") for word in words(row[0])}
    assert registrar == {name for name in vars(api.Registrar) if not name.startswith("_")}
    services = {word.partition("(")[0] for row in rows_below(text, "| `services.`") for word in words(row[0])}
    assert services == set(api.Services.__dataclass_fields__)
    assert {name for name in api.__all__ if name.startswith("Can")} <= set(words(text))
    assert ExecSpec.__name__ in api.__all__


def test_failpoint_example_can_be_used() -> None:
    """The names in the example are names of effects."""
    text = read("development.md")
    example = re.search(r"DISPATCHER_FAILPOINTS='([^']+)'", text)
    assert example is not None
    sources = [*ROOT.glob("dispatcher/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")]
    effects = {name for path in sources for name in re.findall(r'@effect\("([^"]+)"\)', path.read_text())}
    assert {point.partition(":")[0] for point in example[1].split(",")} <= effects
