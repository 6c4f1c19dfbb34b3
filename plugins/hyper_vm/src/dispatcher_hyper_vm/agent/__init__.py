"""The agent of a guest: its C sources in `src/`, its protocol, and the client that speaks it."""
