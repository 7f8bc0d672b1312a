"""The command `explain`: has a request decided, by a running server or here and now, and shows why it goes where."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence

import aiohttp
import msgspec
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from envoy_extproc.scheduling.explain import Explanation, Row
from envoy_extproc.scheduling.interfaces import Scorer
from envoy_extproc.server import explaining
from envoy_extproc.server.app import App
from envoy_extproc.server.explaining import Answer, Question
from envoy_extproc.settings import Settings

_PATIENCE_SECONDS = 10.0
"""For a server that answers; deciding takes less than a millisecond."""

_QUICK = {"scrape_interval_ms": 20, "idle_interval_ms": 20, "models_interval_ms": 100}
"""Somebody waits: engines are asked at once, not at their usual pace."""

_PLAIN_WIDTH = 160  # where there is no terminal to fit in
_DECODER = msgspec.json.Decoder(Explanation)


class ServerError(Exception):
    """The server gives no answer to the question; the message says why."""


def question(path: str, headers: Sequence[str], body: bytes) -> Question:
    """The question of a command line, its headers written ``name: value``.

    Raises:
        ValueError: a header is not.
    """
    pairs = []
    for header in headers:
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise ValueError(f"--header {header!r}: must be 'name: value'")
        pairs.append((name.strip(), value.strip()))
    return Question(path=path, headers=tuple(pairs), body=body)


async def here(settings: Settings, asked: Question, scorers: Mapping[str, Scorer]) -> Answer:
    """What comes of the question by the configuration and one look at the engines; nothing is in flight here.

    `scorers` are those of other packages; see `App`.

    Raises:
        EndpointError: discovery has nothing valid.
    """
    engines = settings.engines.model_copy(update=_QUICK)
    app = App(settings.model_copy(update={"engines": engines}), scorers=scorers)
    async with app.looking() as explain:
        return await explaining.answer(
            asked, explain, counted=app.counted, trust_user=settings.auth.mode == "header"
        )


async def there(url: str, asked: Question, token: str | None) -> Answer:
    """What comes of the question at the server whose admin port is at `url`, by its state of the moment.

    Raises:
        ServerError: it does not say.
    """
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    target = f"{url.rstrip('/')}/debug/explain"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_PATIENCE_SECONDS)) as session,
            session.post(target, data=io.BytesIO(explaining.encode(asked)), headers=headers) as answer,
        ):
            return _answer(answer, await answer.read())
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise ServerError(f"{target}: {str(error) or type(error).__name__}") from None


def _answer(answer: aiohttp.ClientResponse, body: bytes) -> Answer:
    if answer.content_type != "application/json":
        raise ServerError(f"{answer.url}: {answer.status} {body[:200].decode('utf-8', 'replace').strip()}")
    if answer.status == 200:
        return Answer(status=200, body=body, explanation=_DECODER.decode(body))
    kept = [
        (name.lower(), value)
        for name, value in answer.headers.items()
        if name.lower().startswith(("x-error-", "retry-after"))
    ]
    return Answer(status=answer.status, headers=tuple(kept), body=body)


def show(answer: Answer, console: Console) -> None:
    """Prints the explanation, or the refusal as a client would see it."""
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    for each in _refusal(answer) if answer.explanation is None else _explanation(answer.explanation):
        console.print(each, soft_wrap=isinstance(each, Text))


def _refusal(answer: Answer) -> Iterator[RenderableType]:
    yield Text(f"The client gets HTTP status {answer.status}:", style="bold")
    for name, value in answer.headers:
        yield Text(f"{name}: {value}")
    yield Text(msgspec.json.format(answer.body, indent=2).decode())


def _explanation(told: Explanation) -> Iterator[RenderableType]:
    yield Text(f"{told.model or 'a request without a model'} goes to {told.chosen}", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("endpoint")
    table.add_column("address")
    for scorer, weight in told.weights.items():
        table.add_column(scorer if len(told.weights) == 1 else f"{scorer} x{weight:g}", justify="right")
    for name in ("total", "in flight", "running", "waiting", "KV cache"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in told.endpoints:
        table.add_row(*_cells(row, told), style="green" if row.place == 1 else None)
    yield table
    for sentence in told.because:
        yield Text(sentence)


def _cells(row: Row, told: Explanation) -> Sequence[str]:
    stats = row.stats
    return (
        row.name,
        row.address,
        *[_number(row.scores.get(scorer), 3) for scorer in told.weights],
        _number(row.total, 3),
        str(row.in_flight),
        _number(None if stats is None else stats.running, 0),
        _number(None if stats is None else stats.waiting, 0),
        "-" if stats is None or stats.kv_cache_usage is None else f"{stats.kv_cache_usage:.1%}",
        _standing(row),
    )


def _standing(row: Row) -> str:
    if row.left_out is not None:
        return f"left out: {row.left_out}"
    if row.place is None:
        return ""
    return "chosen" if row.place == 1 else f"try {row.place}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
