"""The contract of a runtime, as tests. Each one's docstring is a sentence of the contract.

`from dispatcher.testing.contract import *` brings them into a suite that defines the fixture `case`; pytest's
`register_assert_rewrite("dispatcher.testing.contract")` before that makes failures readable.
"""

from dispatcher.testing.contract.test_life import *  # noqa: F403
from dispatcher.testing.contract.test_output import *  # noqa: F403
from dispatcher.testing.contract.test_recovery import *  # noqa: F403
from dispatcher.testing.contract.test_streams import *  # noqa: F403
