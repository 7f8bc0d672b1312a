"""Values for every switch of the chart: each alone, and all together."""

from __future__ import annotations

from typing import Any

from tests.support.helm import Json

SWITCHES: dict[str, Json] = {
    "defaults": {},
    "names": {"fullnameOverride": "brain", "podLabels": {"team": "a"}, "podAnnotations": {"b": "c"}},
    "digest": {
        "image": {"repository": "here/brain", "digest": f"sha256:{'0' * 64}", "pullSecrets": [{"name": "p"}]}
    },
    "config": {
        "config": {
            "server": {
                "listen": "0.0.0.0:7002",
                "admin": "[::]:7090",
                "drain_seconds": 12.5,
                "max_body_bytes": 67_108_864,
            },
            "discovery": {
                "static": {"endpoints": [{"name": "a", "address": "10.0.0.1:8000", "models": ["m"]}]}
            },
            "routing": {"tries": 4, "policy": "least-kv-cache:2,least-request:1"},
            "envoy": {"message_timeout_seconds": 2.5, "fail_open": False},
            "models": {"m": {"policy": "random", "locked": True}},
        }
    },
    "everywhere": {"config": {"discovery": {"kubernetes": {"namespaces": ["*"]}}}},
    "namespaces": {
        "config": {
            "discovery": {
                "kubernetes": {
                    "namespaces": ["a", "b"],
                    "routes": True,
                    "route_namespaces": ["b", "aibrix-system"],
                }
            }
        }
    },
    "kubeconfig": {"config": {"discovery": {"kubernetes": {"kubeconfig": "/kube/config"}}}},
    "secrets": {"debugToken": {"secretName": "s"}, "extraEnv": [{"name": "A", "value": "b"}]},
    "redis": {"redis": {"secretName": "s", "key": "url"}},
    "tls": {"tls": {"secretName": "cert", "clientCa": True}},
    "account": {"serviceAccount": {"create": False, "name": "mine"}, "rbac": {"create": False}},
    "service": {"service": {"headless": False, "annotations": {"a": "b"}}},
    "autoscaling": {"autoscaling": {"enabled": True}},
    "budget": {"podDisruptionBudget": {"enabled": False}},
    "placement": {
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "k", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "high",
        "topologySpreadConstraints": [],
        "preStopSeconds": 0,
    },
    "volumes": {
        "extraVolumes": [{"name": "v", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "v", "mountPath": "/v"}],
    },
    "network": {"networkPolicy": {"enabled": True, "egress": [{"to": [{"podSelector": {}}]}]}},
    "monitor": {"serviceMonitor": {"enabled": True, "labels": {"release": "p"}}},
    "rules": {"prometheusRule": {"enabled": True, "labels": {"release": "p"}}},
    "dashboard": {"dashboard": {"enabled": True, "annotations": {"folder": "LLM"}}},
    "gateway": {"envoyGateway": {"enabled": True, "pool": {"selector": {"engine": "vllm"}}}},
    "gateway-shared": {
        "envoyGateway": {
            "enabled": True,
            "gateway": {"create": False, "name": "shared"},
            "lua": False,
            "pool": {"service": "engines"},
        }
    },
    "gateway-models": {
        "config": {"routing": {"clear_route_cache": True}},
        "tls": {"secretName": "cert", "caConfigMap": "ca"},
        "envoyGateway": {
            "enabled": True,
            "gatewayClass": {"create": True},
            "gateway": {"tlsSecretName": "web", "port": 443, "hostname": "llm.example"},
            "luaValidation": "InsecureSyntax",
            "image": "",
            "pool": {"selector": {"engine": "vllm"}},
            "models": [{"name": "meta/Llama_3:8b", "service": "llama", "aliases": ["sql"]}],
        },
    },
    "envoy": {
        "envoy": {
            "enabled": True,
            "services": [
                {"name": "llama", "port": 8000},
                {"name": "qwen.other.svc.cluster.local", "port": 9000},
            ],
        }
    },
}


def merged(*switches: Json) -> Json:
    """Values of which the later ones win."""
    made: dict[str, Any] = {}
    for values in switches:
        for key, value in values.items():
            both = isinstance(value, dict) and isinstance(made.get(key), dict)
            made[key] = merged(made[key], value) if both else value
    return made


_APART = {
    "names",
    "account",
    "service",
    "config",
    "kubeconfig",
    "namespaces",
    "gateway-shared",
    "tls",
    "gateway-models",
    "budget",
}

ALL = merged(*(values for name, values in SWITCHES.items() if name not in _APART))
CASES: dict[str, Json] = {**SWITCHES, "all": ALL}
