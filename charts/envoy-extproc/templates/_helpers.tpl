{{- define "envoy-extproc.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "envoy-extproc.fullname" -}}
{{- $name := include "envoy-extproc.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "envoy-extproc.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "envoy-extproc.common" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "envoy-extproc.common" -}}
app.kubernetes.io/name: {{ include "envoy-extproc.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "envoy-extproc.selector" -}}
{{ include "envoy-extproc.common" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "envoy-extproc.envoy.selector" -}}
{{ include "envoy-extproc.common" . }}
app.kubernetes.io/component: envoy
{{- end -}}

{{- define "envoy-extproc.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "envoy-extproc.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "envoy-extproc.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* The server's configuration: `config`, with what other values say. */ -}}
{{- define "envoy-extproc.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if not (get $config "discovery") -}}
{{- $_ := set $config "discovery" (dict "kubernetes" dict) -}}
{{- end -}}
{{- if .Values.tls.secretName -}}
{{- $folder := "/etc/envoy-extproc-tls" -}}
{{- $tls := dict "cert_file" (printf "%s/tls.crt" $folder) "key_file" (printf "%s/tls.key" $folder) -}}
{{- if .Values.tls.clientCa -}}
{{- $_ := set $tls "client_ca_file" (printf "%s/ca.crt" $folder) -}}
{{- end -}}
{{- $server := get $config "server" | default dict -}}
{{- $_ := set $config "server" (merge (dict "tls" $tls) $server) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{- /* One setting of the configuration, by section and key, or its default. */ -}}
{{- define "envoy-extproc.setting" -}}
{{- $section := get (index . 0).Values.config (index . 1) | default dict -}}
{{- if hasKey $section (index . 2) -}}
{{- get $section (index . 2) -}}
{{- else -}}
{{- index . 3 -}}
{{- end -}}
{{- end -}}

{{- define "envoy-extproc.port" -}}
{{- regexFind "[0-9]+$" (include "envoy-extproc.setting" (list . "server" "listen" "0.0.0.0:9002")) -}}
{{- end -}}

{{- define "envoy-extproc.adminPort" -}}
{{- regexFind "[0-9]+$" (include "envoy-extproc.setting" (list . "server" "admin" "0.0.0.0:9090")) -}}
{{- end -}}

{{- define "envoy-extproc.maxBodyBytes" -}}
{{- include "envoy-extproc.setting" (list . "server" "max_body_bytes" 33554432) | float64 | int64 -}}
{{- end -}}

{{- define "envoy-extproc.retries" -}}
{{- sub (include "envoy-extproc.setting" (list . "routing" "tries" 3) | float64 | int64) 1 -}}
{{- end -}}

{{- define "envoy-extproc.messageSeconds" -}}
{{- include "envoy-extproc.setting" (list . "envoy" "message_timeout_seconds" 10) -}}
{{- end -}}

{{- /* The Gateway API's durations have no fractions. */ -}}
{{- define "envoy-extproc.messageTimeout" -}}
{{- $seconds := include "envoy-extproc.messageSeconds" . | float64 -}}
{{- if eq $seconds (floor $seconds) -}}
{{- int64 $seconds -}}s
{{- else -}}
{{- mulf $seconds 1000 | int64 -}}ms
{{- end -}}
{{- end -}}

{{- define "envoy-extproc.maxBody" -}}
{{- $bytes := include "envoy-extproc.maxBodyBytes" . | int64 -}}
{{- if eq (mod $bytes 1048576) 0 -}}
{{- div $bytes 1048576 -}}Mi
{{- else -}}
{{- $bytes -}}
{{- end -}}
{{- end -}}

{{- /* `auto` as the server decides it: open while nothing is guarded by being closed. */ -}}
{{- define "envoy-extproc.failOpen" -}}
{{- $said := include "envoy-extproc.setting" (list . "envoy" "fail_open" "auto") -}}
{{- if ne $said "auto" -}}
{{- $said -}}
{{- else -}}
{{- $auth := include "envoy-extproc.setting" (list . "auth" "mode" "none") -}}
{{- and (eq $auth "none") (empty .Values.config.limits) -}}
{{- end -}}
{{- end -}}

{{- /* "true" where pods are read from this cluster's API server; an empty map says so too. */ -}}
{{- define "envoy-extproc.inCluster" -}}
{{- $source := get (include "envoy-extproc.config" . | fromYaml).discovery "kubernetes" -}}
{{- if and (kindIs "map" $source) (not (get ($source | default dict) "kubeconfig")) -}}true{{- end -}}
{{- end -}}

{{- /* Longer than everything the server does between SIGTERM and its end, which is drain_seconds and at most 5.5 s. */ -}}
{{- define "envoy-extproc.grace" -}}
{{- $drain := include "envoy-extproc.setting" (list . "server" "drain_seconds" 30) | float64 | ceil | int64 -}}
{{- add .Values.preStopSeconds $drain 10 -}}
{{- end -}}

{{- define "envoy-extproc.checks" -}}
{{- range list "listen" "admin" -}}
{{- $address := include "envoy-extproc.setting" (list $ "server" . "0.0.0.0:1") -}}
{{- if or (hasPrefix "127." $address) (hasPrefix "localhost:" $address) (hasPrefix "[::1]" $address) -}}
{{- fail (printf "config.server.%s: %s cannot be reached from outside the pod" . $address) -}}
{{- end -}}
{{- end -}}
{{- $held := include "envoy-extproc.setting" (list . "responses" "hold_streams" true) -}}
{{- if and (eq $held "false") (or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled) -}}
{{- fail "config.responses.hold_streams: false needs the access log of every request at one server: replicas: 1, no autoscaling" -}}
{{- end -}}
{{- if and .Values.envoy.enabled (not .Values.service.headless) -}}
{{- fail "envoy.enabled needs service.headless: Envoy reads the servers' addresses from DNS" -}}
{{- end -}}
{{- if and .Values.envoy.enabled .Values.tls.secretName -}}
{{- fail "envoy.enabled: TLS to the server is not wired in the chart's Envoy; use `envoy-extproc config envoy` or envoyGateway" -}}
{{- end -}}
{{- if and .Values.envoy.enabled (not .Values.envoy.services) -}}
{{- fail "envoy.services: Envoy can only be sent to pods that it knows" -}}
{{- end -}}
{{- end -}}

{{- /* Envoy's endpoints, of names and ports, as JSON. */ -}}
{{- define "envoy-extproc.hosts" -}}
{{- $hosts := list -}}
{{- range . -}}
{{- $socket := dict "socket_address" (dict "address" .name "port_value" (int .port)) -}}
{{- $hosts = append $hosts (dict "endpoint" (dict "address" $socket)) -}}
{{- end -}}
{{- list (dict "lb_endpoints" $hosts) | toJson -}}
{{- end -}}

{{- define "envoy-extproc.env" -}}
{{- with .Values.debugToken.secretName }}
- name: ENVOY_EXTPROC_SERVER__DEBUG_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: {{ $.Values.debugToken.key }}}
{{- end }}
{{- with .Values.redis.secretName }}
- name: ENVOY_EXTPROC_STATE__REDIS_URL
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: {{ $.Values.redis.key }}}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* The gateway where it is ours; else its routes that are, so that those of others stay as they are. */ -}}
{{- define "envoy-extproc.targets" -}}
{{- if (index . 0).create -}}
- {group: gateway.networking.k8s.io, kind: Gateway, name: {{ index . 1 }}}
{{- else -}}
{{- range index . 2 }}
- {group: gateway.networking.k8s.io, kind: HTTPRoute, name: {{ .name }}}
{{- end -}}
{{- end -}}
{{- end -}}
