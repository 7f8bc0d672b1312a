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
    assert len({route.path for route in routes.ROUTES}) == len(routes.ROUTES)


@given(st.text())
def test_any_path_is_answered(path: str) -> None:
    route = routes.find(path)
    assert route is None or route in routes.ROUTES


@given(st.sampled_from(routes.ROUTES), st.text("abc/_-", max_size=10), st.text(max_size=10))
def test_prefix_and_query_do_not_matter(route: routes.Route, prefix: str, query: str) -> None:
    assert routes.find(f"/{prefix}{route.path}?{query}") is route
