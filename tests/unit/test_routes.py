from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.openai import routes


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        ("/v1/chat/completions", "chat"),
        ("/v1/completions", "text_completion"),
        ("/v1/embeddings", "embeddings"),
        ("/v1/chat/completions/", "chat"),
        ("/v1/chat/completions?api-version=2", "chat"),
        ("/v1/chat/completions?next=/v1/embeddings", "chat"),
        ("/v1/completions/?a=b", "text_completion"),
        ("/openai/v1/completions", "text_completion"),
        ("/team/a/v1/embeddings?x", "embeddings"),
        ("/v1/v1/completions", "text_completion"),
        ("/v1/responses", "chat"),
        ("/v1/messages?beta=true", "chat"),
        ("/v1/messages/count_tokens", "count_tokens"),
        ("/anthropic/v1/messages", "chat"),
        ("/v1/rerank", "rerank"),
        ("/v2/rerank", "rerank"),
        ("/rerank/", "rerank"),
        ("/score", "score"),
        ("/classify", "classify"),
        ("/pooling", "pooling"),
        ("/engines/a/tokenize?x=1", "tokenize"),
        ("/v1/detokenize", "detokenize"),
        ("/v1/audio/transcriptions", "transcription"),
        ("/x/v1/audio/translations", "translation"),
        ("/v1/audio/speech", "speech"),
        ("/v1/images/generations", "image_generation"),
        ("/v1/images/edits", "image_edit"),
        ("/v1/images/variations", "image_variation"),
        ("/v1/audio", None),
        ("/v1/responses/resp_1", None),
        ("/v1/responses/resp_1/cancel", None),
        ("/tokenizer", None),
        ("/v1/models", None),
        ("/v1/completions/7", None),
        ("/v1/chat", None),
        ("/v2/chat/completions", None),
        ("/chat/completions", None),
        ("/xv1/completions", None),
        ("/V1/completions", None),
        ("/?x=/v1/completions", None),
        ("", None),
        ("/", None),
        ("*", None),
        ("/v1/", None),
    ],
)
def test_find(path: str, operation: str | None) -> None:
    route = routes.find(path)
    assert (None if route is None else route.operation) == operation


def test_paths_are_distinct() -> None:
    paths = [path for route in routes.ROUTES for path in (route.path, *route.aliases)]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/models", ""),
        ("/v1/models/", ""),
        ("/openai/v1/models?limit=5", ""),
        ("/v1/models/tiny", "tiny"),
        ("/v1/models/org/name-7b", "org/name-7b"),
        ("/v1/models/org%2Fname", "org/name"),
        ("/v1/models/tiny?x", "tiny"),
        ("/v1/models/v1/models/x", "v1/models/x"),
        ("/v1/model", None),
        ("/v2/models", None),
        ("/models", None),
        ("/v1/chat/completions", None),
        ("", None),
    ],
)
def test_listed_model(path: str, name: str | None) -> None:
    assert routes.listed_model(path) == name


@given(st.text())
def test_any_path_names_a_model_or_none(path: str) -> None:
    assert isinstance(routes.listed_model(path), str | None)


@given(st.text())
def test_any_path_is_answered(path: str) -> None:
    route = routes.find(path)
    assert route is None or route in routes.ROUTES


@given(st.sampled_from(routes.ROUTES), st.text("abc/_-", max_size=10), st.text(max_size=10), st.data())
def test_prefix_and_query_do_not_matter(
    route: routes.Route, prefix: str, query: str, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from((route.path, *route.aliases)))
    assert routes.find(f"/{prefix}{path}?{query}") is route
