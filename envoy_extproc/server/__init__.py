"""The shell around the core: gRPC, HTTP, the clock, signals. `app` puts it together."""
