"""A plugin of fakes, enrolled as any other: one runtime and one provider of each kind, all named by its `name`.

`plugin` is ready to be an entry point's value. Its section of dispatcher.yaml may say

    isolation: sandboxed            # or shared-kernel, vm
    abilities: [CanExec, CanStats]  # without it all but CanTrimOutput and CanPodStats
    option_keys: [kernel]           # what `with:` may hold in the policy
    fail: [start, create_pod]       # methods that raise
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from dispatcher.api import Registrar, Section, Services
from dispatcher.errors import RuntimeDown
from dispatcher.model import Isolation
from dispatcher.testing.fake_engine import FakeEngine
from dispatcher.testing.fake_providers import FakeImages, FakeNetwork, FakeSizer, FakeStreaming
from dispatcher.testing.fake_runtime import ABILITIES, USUAL, FakeRuntime, make_runtime

T = TypeVar("T")

_KEYS = frozenset({"isolation", "abilities", "option_keys", "fail"})


def check_section(section: Section) -> None:
    """Check the section. Raises ValueError."""
    if unknown := sorted(set(section) - _KEYS):
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
    abilities = {kind.__name__ for kind in ABILITIES}
    for name in section.get("abilities", ()):
        if name not in abilities:
            raise ValueError(f"there is no ability {name!r}")


class FakePlugin:
    """See the module. `made` holds what the factories made, newest last, for tests in the same process."""

    API = (1, 0)

    def __init__(self, name: str = "fake", engine: FakeEngine | None = None, subnet: str = "10.88.0.0/16") -> None:
        self.name = name
        self.made: list[Any] = []
        self._engine = engine
        self._subnet = subnet

    def register(self, registrar: Registrar) -> None:
        """Offer everything."""
        registrar.runtime(self.name, self._make_runtime)
        registrar.network(
            self.name, lambda _section, _services: self._keep(FakeNetwork(name=self.name, subnet=self._subnet))
        )
        registrar.images(self.name, lambda _section, _services: self._keep(FakeImages(name=self.name)))
        registrar.sizer(self.name, lambda _section, _services: self._keep(FakeSizer(name=self.name)))
        registrar.streaming(self.name, lambda _section, _services: self._keep(FakeStreaming(name=self.name)))
        registrar.check_section(check_section)

    def _make_runtime(self, section: Section, services: Services) -> FakeRuntime:
        check_section(section)
        engine = self._engine or FakeEngine()
        for method in section.get("fail", ()):
            engine.fail(method, RuntimeDown(f"The fake runtime was told to fail in {method}."))
        return self._keep(make_runtime(engine, sizer=services.sizer, **_fields(self.name, section)))

    def _keep(self, made: T) -> T:
        self.made.append(made)
        return made

    def newest(self, kind: type[Any]) -> Any:
        """Return the newest object of a class that was made."""
        return next(made for made in reversed(self.made) if isinstance(made, kind))


def _fields(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    by_name = {kind.__name__: kind for kind in ABILITIES}
    levels = {level.label: level for level in Isolation}
    wanted = section.get("abilities")
    return {
        "name": name,
        "isolation": levels[section.get("isolation", "sandboxed")],
        "option_keys": section.get("option_keys", ()),
        "abilities": USUAL if wanted is None else [by_name[ability] for ability in wanted],
    }


plugin = FakePlugin()
