"""One CRI endpoint per node that routes every pod to the runtime that suits it."""
