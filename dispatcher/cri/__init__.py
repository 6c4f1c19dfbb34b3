"""The CRI endpoint: the only package that knows gRPC."""
