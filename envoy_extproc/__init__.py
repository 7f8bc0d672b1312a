"""The brain beside Envoy: an external-processing server for fleets of OpenAI-style inference engines."""

__version__ = "0.1.0"
