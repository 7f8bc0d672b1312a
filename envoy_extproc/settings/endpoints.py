"""The settings of who may be chosen, and of how engines are asked about themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from envoy_extproc.settings.base import Section


class StaticSource(Section):
    """Endpoints written down."""

    endpoints: tuple[Mapping[str, Any], ...] | None = None
    """A list of {name, address, models, engine, labels}; `discovery.parse` checks each."""
    file: Path | None = None
    """A YAML file of the same, reread when it changes."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.endpoints is None) == (self.file is None):
            raise ValueError("give either `endpoints` or `file`")
        return self


_namespace = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def _checked_namespaces(value: tuple[str, ...]) -> tuple[str, ...]:
    if value == ("*",):
        return value
    for each in value:
        if _namespace.fullmatch(each) is None:
            raise ValueError(f'{each!r} is no namespace; all of them are ["*"] alone')
    if len(set(value)) < len(value):
        raise ValueError("a namespace is named twice")
    return value


Namespaces = Annotated[tuple[str, ...], AfterValidator(_checked_namespaces)]


class KubernetesSource(Section):
    """Pods of a Kubernetes cluster, by label."""

    namespaces: Namespaces = ()
    """Where pods are looked for. Empty: in the server's own, which needs no rights in others; `["*"]`: in all."""
    label_selector: str = "model.aibrix.ai/name"
    """Which pods: a Kubernetes label selector, applied by the API. By default those that AIBrix would find."""
    kubeconfig: Path | None = None
    """The file that says where the cluster is. null: the pod's own service account."""
    context: str | None = None
    """Of that file. null: its current one."""
    debounce_ms: int = Field(default=50, ge=0, le=10_000)
    """Changes that come within it are told together: a rollout is a hundred in a second, and each list is for everyone."""
    page_size: int = Field(default=500, ge=1, le=10_000)
    """Objects in one page of a list; kubectl's own figure."""
    routes: bool = False
    """Watch HTTPRoutes too, and tell of models whose route is not accepted: needs the right to read them."""
    route_namespaces: Namespaces = ()
    """Where routes are looked for; AIBrix keeps them in a namespace of their own. Empty: where pods are."""

    @model_validator(mode="after")
    def _context_of_a_file(self) -> Self:
        if self.context is not None and self.kubeconfig is None:
            raise ValueError("context: is one of a kubeconfig, so give `kubeconfig` too")
        return self


class Discovery(Section):
    """Who may be chosen."""

    static: StaticSource | None = None
    kubernetes: KubernetesSource | None = None
    """Instead of `static`: docs/kubernetes.md. All of its keys have defaults: `kubernetes: {}`."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.static is None and self.kubernetes is None:
            raise ValueError("give `static` or `kubernetes`: nobody can be chosen otherwise")
        if self.static is not None and self.kubernetes is not None:
            raise ValueError("give either `static` or `kubernetes`, not both")
        return self


class Engines(Section):
    """How engines are asked about themselves."""

    scrape_interval_ms: int = Field(default=200, ge=20, le=60_000)
    """A decision is then at most this much behind the engine; a tenth of a long prefill."""
    idle_interval_ms: int = Field(default=2000, ge=20, le=60_000)
    """What the interval grows to for an engine without work, which has nothing new to say, and for one that is out of
    reach: 100 idle pods then cost 4 % of a core, and one that is back is seen within 2 seconds."""
    models_interval_ms: int = Field(default=30_000, ge=100, le=3_600_000)
    """For the list of models an engine serves. Adapters are loaded by people and operators, so half a minute late is
    early; a pod that comes back is asked at once."""
    scrape_timeout_ms: int = Field(default=1000, ge=20, le=60_000)
    """An engine busy with a long prefill can take hundreds of milliseconds to answer."""
    max_stats_age_ms: int = Field(default=2000, ge=20, le=600_000)
    """Ten missed scrapes; older numbers say nothing about now."""
    max_scrape_bytes: int = Field(default=4_194_304, ge=4096)
    """vLLM's page is 60 KB; a page of this size is no metrics page."""
    dialects: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Engines of other names, or other metrics for a known one: {my-engine: {base: vllm, waiting: "my:queue"}};
    `engines.dialects` checks each. docs/engines.md has the fields and the notation."""
