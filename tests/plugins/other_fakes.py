"""A second plugin of fakes, so that a provider can be swapped for another one."""

from dispatcher.testing import FakePlugin

plugin = FakePlugin("other", subnet="10.99.0.0/16")
