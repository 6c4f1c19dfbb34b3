"""The command line. Each command is a module with `configure(parser)` and `execute(args, console) -> exit code`.

`serve` starts the daemon; `config check`, `doctor` and `explain FILE` work on files; all others talk to a running daemon
over its CRI socket, as a kubelet does, and have no other way to it.
"""
