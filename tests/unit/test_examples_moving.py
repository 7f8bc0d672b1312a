"""docs/moving-from-aibrix.md: it has a row for every name of AIBrix's, and what it points to is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import envoy_extproc
from envoy_extproc import mixes
from envoy_extproc.scheduling.registry import POLICIES
from envoy_extproc.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "moving-from-aibrix.md").read_text("utf-8")
WORDS = ("same", "renamed", "replaced", "not yet", "not there")
THERE = ("same", "renamed", "replaced")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the page's tables.

    Attributes:
        section: the heading it stands under.
        theirs: names in the first column.
        ours: code in the last one.
        word: what that begins with; "" where it begins with none of the words.
    """

    section: str
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    word: str


def _rows() -> Iterator[Row]:
    for part in PAGE.split("\n## ")[1:]:
        section, _, text = part.partition("\n")
        for line in text.splitlines():
            cells = [each.strip() for each in line.strip("|").split(" | ")]
            if not line.startswith("| ") or cells == ["AIBrix", "here"]:
                continue
            word = next((each for each in WORDS if cells[-1].startswith(each)), "")
            yield Row(section, _code(cells[0]), _code(cells[-1]), word)


def _code(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", text))


ROWS = list(_rows())


def _source(*folders: str) -> str:
    package = Path(envoy_extproc.__file__).parent
    files = sorted(each for folder in folders for each in package.glob(f"{folder}/*.*") if each.is_file())
    return "\n".join(each.read_text("utf-8") for each in files if each.suffix in (".py", ".lua"))


@cache
def _package() -> str:
    return _source("*", "**")


@cache
def _metrics() -> frozenset[str]:
    """Names of metrics as the exposition has them, and of labels: all that is quoted in the module that makes them."""
    quoted = set(re.findall(r'"([a-z_]+)"', _source("telemetry")))
    counters = {f"envoy_extproc_{each.removeprefix('envoy_extproc_')}_total" for each in quoted}
    return frozenset(quoted | counters)


def _is_setting(path: str) -> bool:
    kind: Any = Settings
    for name in path.split("."):
        models = [kind, *get_args(kind)]
        model = next(
            (each for each in models if isinstance(each, type) and issubclass(each, BaseModel)), None
        )
        if model is None or name not in model.model_fields:
            return False
        kind = model.model_fields[name].annotation
    return True


def _is_policy(text: str) -> bool:
    return text in POLICIES or (
        ":" in text and all(each.partition(":")[0] in POLICIES for each in text.split(","))
    )


def _looks_like_ours(text: str) -> bool:
    section = text.partition(".")[0]
    return text.startswith(("envoy_extproc_", "gen_ai_")) or (
        "." in text and section in Settings.model_fields
    )


def _exists(text: str) -> bool:
    if text.startswith(("envoy_extproc_", "gen_ai_")):
        return text in _metrics()
    if _is_setting(text) or _is_policy(text) or text in _metrics():
        return True
    label = text.removeprefix("model.aibrix.ai/")
    return any(each in _package() for each in (f'"{text}"', f'{{_PREFIX}}{label}"'))


def test_the_page_is_read() -> None:
    assert len(ROWS) > 90
    assert {row.word for row in ROWS} == set(WORDS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.section}: {', '.join(row.theirs)[:50]}")
def test_what_a_row_points_to_is_there(row: Row) -> None:
    wanted = [each for each in row.ours if row.word in THERE or _looks_like_ours(each)]
    assert [each for each in wanted if each not in row.theirs and not _exists(each)] == []


@pytest.mark.parametrize("row", [each for each in ROWS if each.word == "same"], ids=lambda row: row.theirs[0])
def test_what_is_the_same_is_in_the_code(row: Row) -> None:
    assert [name for name in row.theirs if not _exists(name) and name not in ("a:2,b", "content-type")] == []


HEADERS = """
routing-strategy x-request-id user authorization external-filter config-profile x-session-id x-aibrix-session-key
target-pod-ip traceparent target-pod model request-id x-went-into-req-headers prefill-target-pod prefill-target-pod-ip
x-aibrix-config-profile x-update-rpm x-update-tpm x-error-user x-error-rpm-exceeded x-error-incr-rpm
x-error-tpm-exceeded x-error-incr-tpm x-error-model-rps-exceeded x-error-incr-model-rps x-error-no-model-backends
x-error-routing x-error-request-body-processing x-error-multipart-parsing x-error-stream
x-error-no-stream-options-include-usage x-error-streaming x-error-response-unmarshal x-error-response-unknown
x-error-invalid-routing-strategy x-error-no-model-in-request content-type
"""
POLICY_NAMES = """
random least-request least-busy-time least-gpu-cache least-kv-cache least-utilization least-latency throughput power-of-two
prefix-cache prefix-cache-preble vtc-basic session-affinity pd slo slo-least-load-pulling slo-pack-load slo-least-load
"""
PODS = """
model.aibrix.ai/name model.aibrix.ai/engine model.aibrix.ai/port model.aibrix.ai/metric-port model.aibrix.ai/service-name
model.aibrix.ai/model-router-custom-paths model.aibrix.ai/config model.aibrix.ai/kv-events-enabled model.aibrix.ai/lora-id
model.aibrix.ai/kv-connector-type model.aibrix.ai/min_replicas model.aibrix.ai/sglang-bootstrap-port
adapter.model.aibrix.ai/enabled modelclaim.aibrix.ai/<claim> pool.aibrix.ai/enabled roleset-name role-name ray.io/node-type
stormservice.orchestration.aibrix.ai/pod-group-index
"""
VARIABLES = """
POD_NAME ROUTING_ALGORITHM REDIS_HOST REDIS_PORT REDIS_PASSWORD PROMETHEUS_ENDPOINT AIBRIX_AUTH_BEARER_TOKEN
AIBRIX_TTFT_THRESHOLD_S AIBRIX_STATESYNC_ENABLED AIBRIX_STATESYNC_SYNC_PERIOD AIBRIX_PREFIX_CACHE_TOKENIZER_TYPE
AIBRIX_PREFIX_CACHE_BLOCK_SIZE AIBRIX_PREFIX_CACHE_BLOCK_NUMBER AIBRIX_PREFIX_CACHE_HASH_SEED
AIBRIX_PREFIX_CACHE_POD_RUNNING_REQUEST_IMBALANCE_ABS_COUNT AIBRIX_PREFIX_CACHE_STANDARD_DEVIATION_FACTOR
AIBRIX_PREFIX_CACHE_EVICTION_DURATION_MINS AIBRIX_PREFIX_CACHE_EVICTION_INTERVAL_SECONDS
AIBRIX_PREFIX_CACHE_USE_REMOTE_TOKENIZER AIBRIX_PREFIX_CACHE_KV_EVENT_SYNC_ENABLED
AIBRIX_PREFIX_CACHE_REMOTE_TOKENIZER_ENDPOINT AIBRIX_VLLM_TOKENIZER_ENDPOINT_TEMPLATE
AIBRIX_TOKENIZER_HEALTH_CHECK_PERIOD AIBRIX_TOKENIZER_TTL AIBRIX_MAX_TOKENIZERS_PER_POOL
AIBRIX_TOKENIZER_REQUEST_TIMEOUT AIBRIX_ROUTER_PREBLE_TARGET_GPU AIBRIX_ROUTER_PREBLE_DECODING_LENGTH
AIBRIX_ROUTER_PREBLE_SLIDING_WINDOW_PERIOD AIBRIX_ROUTER_PREBLE_EVICTION_LOOP_INTERVAL
AIBRIX_ROUTER_VTC_TOKEN_TRACKER_WINDOW_SIZE AIBRIX_ROUTER_VTC_BASIC_MAX_POD_LOAD AIBRIX_PREFILL_REQUEST_TIMEOUT
AIBRIX_PREFILL_SCORE_POLICY AIBRIX_PREFILL_LOAD_IMBALANCE_MIN_SPREAD AIBRIX_DECODE_SCORE_POLICY
AIBRIX_DECODE_LB_WEIGHT_RUNNING AIBRIX_DECODE_SCORE_RATIO_THRESHOLD AIBRIX_PROMPT_LENGTH_BUCKETING
AIBRIX_KV_CONNECTOR_TYPE AIBRIX_TRT_MACHINE_ID AIBRIX_GPU_OPTIMIZER_TRACING_FLAG AIBRIX_MODEL_GPU_PROFILE_CACHING_FLAG
AIBRIX_POD_DEPLOYMENT_LABEL AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS AIBRIX_PROMETHEUS_QUERY_INTERVAL_MS
AIBRIX_GRPC_MAX_MESSAGE_SIZE_BYTES AIBRIX_GATEWAY_TIMEOUT_SECONDS AIBRIX_HTTPROUTE_CACHE_TTL
OTEL_EXPORTER_OTLP_ENDPOINT --grpc-bind-address --http-bind-address --standalone --endpoints-config
"""
METRICS = """
gateway_request_total gateway_in_flight_requests gateway_model_in_flight_requests gateway_request_model_success_total
gateway_request_model_fail_total gateway_first_token_delay_over_1s_total gateway_prompt_token_bucket_total
gateway_completion_token_bucket_total gateway_input_tokens_total gateway_output_tokens_total
gateway_requests_with_usage_total gateway_prefill_request_success_total gateway_prefill_request_fail_total
gateway_prefill_outstanding_requests pd_selected_prefill_pod_total pd_selected_decode_pod_total
gateway_routing_time_bucket_total gateway_prefill_time_bucket_total gateway_kv_transfer_time_bucket_total
gateway_ttft_bucket_total gateway_tpot_bucket_total gateway_decode_time_bucket_total gateway_total_time_bucket_total
model_replicas aibrix_prefix_cache_routing_decisions_total aibrix_tokenizer_pool_size aibrix_kvcache_zmq_events
vtc_bucket_size_active llm_engine_metrics_query_fail prometheus_query_fail
"""
NAMES = [*HEADERS.split(), *POLICY_NAMES.split(), *PODS.split(), *VARIABLES.split(), *METRICS.split()]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_theirs_has_a_row(name: str) -> None:
    assert any(fnmatchcase(name, known) for row in ROWS for known in row.theirs)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", PAGE)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_mixtures_are_understood() -> None:
    (mixture,) = {each for row in ROWS for each in row.ours if "," in each and ":" in each}
    assert mixes.parse(mixture, POLICIES)
