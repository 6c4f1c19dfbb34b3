"""Container logs: the core owns the files, whatever runtime the bytes come from."""
