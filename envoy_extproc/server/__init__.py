"""The shell around the core: gRPC, HTTP, the clock, signals. `app` puts it together."""

import os

# Read when grpc is first imported, so it stands before. gRPC's event-engine listener hands each message through more
# threads; without it a request costs 8-12 % less CPU (grpcio 1.85, tests/bench). An operator's own value wins, and a
# gRPC that does not know the name says so in one line and goes on.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
