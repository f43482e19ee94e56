{{- define "ocp.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- /* 45 characters leave room for the names of Services and for a pod's number. */ -}}
{{- define "ocp.fullname" -}}
{{- $name := include "ocp.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "ocp.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{- define "ocp.ollamaImage" -}}
{{- printf "%s:%s" .Values.ollama.image.repository .Values.ollama.image.tag -}}
{{- end -}}

{{- define "ocp.selector" -}}
app.kubernetes.io/name: {{ include "ocp.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "ocp.labels" -}}
{{ include "ocp.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- /* The pods with a proxy, in either mode. */ -}}
{{- define "ocp.proxySelector" -}}
{{ include "ocp.selector" . }}
app.kubernetes.io/component: proxy
{{- end -}}

{{- define "ocp.ollamaSelector" -}}
{{ include "ocp.selector" . }}
app.kubernetes.io/component: ollama
{{- end -}}

{{- define "ocp.valkeySelector" -}}
{{ include "ocp.selector" . }}
app.kubernetes.io/component: valkey
{{- end -}}

{{- /* The StatefulSet of the Ollama servers. */ -}}
{{- define "ocp.servers" -}}
{{- include "ocp.fullname" . }}{{ ternary "" "-ollama" (eq .Values.mode "sidecar") }}
{{- end -}}

{{- define "ocp.serviceAccount" -}}
{{ include "ocp.fullname" . }}
{{- end -}}

{{- define "ocp.peerSecret" -}}
{{- default (printf "%s-peers" (include "ocp.fullname" .)) .Values.peers.existingSecret -}}
{{- end -}}

{{- define "ocp.keysSecret" -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- .Values.apiKeys.existingSecret -}}
{{- else if .Values.apiKeys.keys -}}
{{- include "ocp.fullname" . }}-keys
{{- end -}}
{{- end -}}

{{- define "ocp.sharedSecret" -}}
{{- if .Values.shared.existingSecret -}}
{{- .Values.shared.existingSecret -}}
{{- else if or .Values.shared.url .Values.valkey.enabled -}}
{{- include "ocp.fullname" . }}-shared
{{- end -}}
{{- end -}}

{{- /* What is wrong about the values, beyond what values.schema.json can say. */ -}}
{{- define "ocp.validate" -}}
{{- $own := list "listen" "upstream" "own" "peers" "peer-listen" "peer-secret-file" "peer-cert" "peer-key" "peer-ca" "contexts" "context-bytes" "api-keys-file" "tls-cert" "tls-key" "drain" "drain-delay" "shared" -}}
{{- range $name, $value := .Values.config -}}
{{- if has $name $own -}}
{{- fail (printf "config.%s: the chart sets this itself; see the other values" $name) -}}
{{- end -}}
{{- end -}}
{{- /* A ConfigMap is no place for secrets. */ -}}
{{- if hasKey .Values.config "api-keys" -}}
{{- fail "config.api-keys: use apiKeys.keys, or apiKeys.existingSecret, so that the keys are in a Secret" -}}
{{- end -}}
{{- if contains "@" (toString (get .Values.config "answers-store")) -}}
{{- fail "config.answers-store: its password would be in a ConfigMap; use shared.answers, or OLLAMA_CACHEPROXY_ANSWERS_STORE in proxy.env, from a Secret" -}}
{{- end -}}
{{- range list "OLLAMA_HOST" "OLLAMA_MODELS" "HOME" -}}
{{- if hasKey $.Values.ollama.env . -}}
{{- fail (printf "ollama.env.%s: the chart sets this itself" .) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.mode "sidecar") (not .Values.ollama.enabled) -}}
{{- fail "mode sidecar is a proxy beside each Ollama: set mode to edge, or ollama.enabled to true" -}}
{{- end -}}
{{- if and (eq .Values.mode "edge") (not .Values.ollama.enabled) (not .Values.edge.upstreams) -}}
{{- fail "there is no Ollama: set ollama.enabled to true, or edge.upstreams" -}}
{{- end -}}
{{- if and (eq .Values.mode "sidecar") .Values.edge.upstreams -}}
{{- fail "edge.upstreams is for mode edge" -}}
{{- end -}}
{{- if and .Values.valkey.enabled (or .Values.shared.url .Values.shared.existingSecret) -}}
{{- fail "shared is a Valkey of your own, and valkey.enabled one of the chart: choose one of them" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (not .Values.ollama.enabled) -}}
{{- fail "autoscaling is of the Ollama servers, and ollama.enabled is false" -}}
{{- end -}}
{{- end -}}

{{- define "ocp.topology" -}}
{{- $root := .root -}}
{{- $selector := .selector -}}
{{- with $root.Values.topologySpreadConstraints }}
topologySpreadConstraints:
{{- range . }}
  - {{ toYaml . | nindent 4 | trim }}
    labelSelector:
      matchLabels:
        {{- $selector | nindent 8 }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* What all pods have in common. */ -}}
{{- define "ocp.pod" -}}
serviceAccountName: {{ include "ocp.serviceAccount" . }}
automountServiceAccountToken: false
# A Service's variables begin like those of the proxy's settings.
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- end -}}

{{- define "ocp.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* The time that a pod with a proxy has to stop: what the proxy takes, and then 45 s to save contexts
and to stop Ollama. */ -}}
{{- define "ocp.grace" -}}
{{- add .Values.proxy.drainDelay .Values.proxy.drain 45 -}}
{{- end -}}

{{- /* The container of the proxy. */ -}}
{{- define "ocp.proxy" -}}
- name: proxy
  image: {{ include "ocp.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args:
    - serve
    - --listen=:11435
    {{- if eq .Values.mode "sidecar" }}
    - --upstream=$(POD_NAME)=http://127.0.0.1:11434
    - --own=$(POD_NAME)
    {{- if .Values.contexts.enabled }}
    - --contexts=/linked
    - --context-bytes={{ .Values.contexts.bytes }}
    {{- end }}
    {{- else }}
    {{- if .Values.ollama.enabled }}
    - --upstream=dns:{{ include "ocp.fullname" . }}-ollama:11434
    {{- end }}
    {{- range .Values.edge.upstreams }}
    - {{ printf "--upstream=%s" . | quote }}
    {{- end }}
    {{- end }}
    - --peers=dns:{{ include "ocp.fullname" . }}-peers:11436
    - --peer-listen=:11436
    - --peer-name=$(POD_NAME)
    - --peer-secret-file=/etc/ollama-cacheproxy/peers/secret
    {{- if .Values.peers.tlsSecret }}
    - --peer-cert=/etc/ollama-cacheproxy/peer-tls/tls.crt
    - --peer-key=/etc/ollama-cacheproxy/peer-tls/tls.key
    - --peer-ca=/etc/ollama-cacheproxy/peer-tls/ca.crt
    {{- end }}
    - --drain-delay={{ .Values.proxy.drainDelay }}s
    - --drain={{ .Values.proxy.drain }}s
    - --log-format=json
    {{- if .Values.config }}
    - --config=/etc/ollama-cacheproxy/config/config.yaml
    {{- end }}
    {{- if include "ocp.keysSecret" . }}
    - --api-keys-file=/etc/ollama-cacheproxy/keys/keys
    {{- end }}
    {{- if .Values.tls.existingSecret }}
    - --tls-cert=/etc/ollama-cacheproxy/tls/tls.crt
    - --tls-key=/etc/ollama-cacheproxy/tls/tls.key
    {{- end }}
    {{- range .Values.proxy.args }}
    - {{ . | quote }}
    {{- end }}
  env:
    - name: POD_NAME
      valueFrom: {fieldRef: {fieldPath: metadata.name}}
    {{- if include "ocp.sharedSecret" . }}
    - name: OLLAMA_CACHEPROXY_SHARED
      valueFrom: {secretKeyRef: {name: {{ include "ocp.sharedSecret" . }}, key: url}}
    {{- if .Values.shared.answers }}
    - name: OLLAMA_CACHEPROXY_ANSWERS_STORE
      valueFrom: {secretKeyRef: {name: {{ include "ocp.sharedSecret" . }}, key: url}}
    {{- end }}
    {{- end }}
    {{- with .Values.proxy.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: http, containerPort: 11435}
    - {name: peer, containerPort: 11436}
  readinessProbe:
    httpGet:
      path: /_cacheproxy/ready
      port: http
      scheme: {{ ternary "HTTPS" "HTTP" (ne .Values.tls.existingSecret "") }}
    periodSeconds: 3
    timeoutSeconds: 3
    failureThreshold: 2
  livenessProbe:
    httpGet:
      path: /_cacheproxy/health
      port: http
      scheme: {{ ternary "HTTPS" "HTTP" (ne .Values.tls.existingSecret "") }}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  resources:
    {{- toYaml .Values.proxy.resources | nindent 4 }}
  volumeMounts:
    - {name: peers, mountPath: /etc/ollama-cacheproxy/peers, readOnly: true}
    {{- if .Values.peers.tlsSecret }}
    - {name: peer-tls, mountPath: /etc/ollama-cacheproxy/peer-tls, readOnly: true}
    {{- end }}
    {{- if .Values.config }}
    - {name: config, mountPath: /etc/ollama-cacheproxy/config, readOnly: true}
    {{- end }}
    {{- if include "ocp.keysSecret" . }}
    - {name: keys, mountPath: /etc/ollama-cacheproxy/keys, readOnly: true}
    {{- end }}
    {{- if .Values.tls.existingSecret }}
    - {name: tls, mountPath: /etc/ollama-cacheproxy/tls, readOnly: true}
    {{- end }}
    {{- if and (eq .Values.mode "sidecar") .Values.contexts.enabled }}
    - {name: linked, mountPath: /linked}
    {{- end }}
{{- end -}}

{{- /* Its volumes, but for the one of contexts. */ -}}
{{- define "ocp.proxyVolumes" -}}
- name: peers
  secret: {secretName: {{ include "ocp.peerSecret" . }}, defaultMode: 0440}
{{- if .Values.peers.tlsSecret }}
- name: peer-tls
  secret: {secretName: {{ .Values.peers.tlsSecret }}, defaultMode: 0440}
{{- end }}
{{- if .Values.config }}
- name: config
  configMap: {name: {{ include "ocp.fullname" . }}}
{{- end }}
{{- if include "ocp.keysSecret" . }}
- name: keys
  secret: {secretName: {{ include "ocp.keysSecret" . }}, defaultMode: 0440}
{{- end }}
{{- if .Values.tls.existingSecret }}
- name: tls
  secret: {secretName: {{ .Values.tls.existingSecret }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{- /* Ollama's variables. In a pod with a proxy nobody else reaches it. */ -}}
{{- define "ocp.ollamaEnv" -}}
- {name: OLLAMA_HOST, value: {{ ternary "127.0.0.1:11434" "0.0.0.0:11434" (eq .Values.mode "sidecar") | quote }}}
- {name: OLLAMA_MODELS, value: /models}
- {name: HOME, value: /models}
{{- range $name, $value := .Values.ollama.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}

{{- define "ocp.ollama" -}}
- name: ollama
  image: {{ include "ocp.ollamaImage" . }}
  imagePullPolicy: {{ .Values.ollama.image.pullPolicy }}
  {{- if and (eq .Values.mode "sidecar") .Values.contexts.enabled }}
  command: [/linked/bin/ollama, serve]
  {{- else }}
  command: [/usr/bin/ollama, serve]
  {{- end }}
  env:
    {{- include "ocp.ollamaEnv" . | nindent 4 }}
  {{- if eq .Values.mode "sidecar" }}
  # Kubernetes stops it after the proxy.
  restartPolicy: Always
  {{- else }}
  ports:
    - {name: ollama, containerPort: 11434}
  readinessProbe:
    tcpSocket: {port: ollama}
    periodSeconds: 5
  # The proxies see that its address is gone, and it finishes what they have sent.
  lifecycle:
    preStop:
      exec: {command: [/bin/sleep, {{ .Values.ollama.stopDelay | quote }}]}
  {{- end }}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  {{- $gpu := .Values.ollama.gpu }}
  {{- $resources := deepCopy .Values.ollama.resources }}
  {{- if $gpu.count }}
  {{- $_ := set $resources "limits" (merge (dict $gpu.resource (toString $gpu.count)) (default dict $resources.limits)) }}
  {{- end }}
  resources:
    {{- toYaml $resources | nindent 4 }}
  volumeMounts:
    - {name: models, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
    {{- if and (eq .Values.mode "sidecar") .Values.contexts.enabled }}
    - {name: linked, mountPath: /linked}
    {{- end }}
{{- end -}}
