"""Generated protobuf classes; `proto/generate.py` writes them from the `.proto` files in `proto/`."""
