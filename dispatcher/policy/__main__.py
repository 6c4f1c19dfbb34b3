"""`python -m dispatcher.policy` prints the JSON schema of policy files, as config/policy.schema.json holds it."""

from __future__ import annotations

import json
import sys

from dispatcher.policy.schema import json_schema

if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=1, sort_keys=True) + "\n")
