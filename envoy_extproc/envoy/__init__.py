"""What is handed to Envoy: its bootstrap, made to fit one configuration of this server."""
