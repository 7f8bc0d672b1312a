"""Knowledge of the OpenAI-style API: bytes in, values out. Nothing here does I/O or knows the time.

`routes` says what a path is, `request` reads and rewrites request bodies, `sse` cuts streams into events,
`answer` reads what an engine answers, `error_body` writes OpenAI's error shape, `splice` edits JSON in place.
"""
