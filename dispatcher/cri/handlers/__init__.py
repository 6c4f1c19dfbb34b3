"""One RPC (or one noun's few) per file: validate, look up, lock, act, record and answer."""
