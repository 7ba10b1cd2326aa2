{{- define "sessiond.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/* 50 bytes at most: a StatefulSet adds "-0" and a hash of 10 to make its pods' labels, which end at 63. */}}
{{- define "sessiond.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "sessiond.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "sessiond.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "sessiond.nodes" -}}
{{- include "sessiond.fullname" . }}-nodes
{{- end -}}

{{- define "sessiond.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "sessiond.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "sessiond.selector" -}}
app.kubernetes.io/name: {{ include "sessiond.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "sessiond.labels" -}}
{{ include "sessiond.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* sessiond.toml. Helm reads every number as a float, and all of these are whole: 8589934592, not 8.589934592e+09. */}}
{{- define "sessiond.toml" -}}
data_dir = "/var/lib/sessiond"
listen = "0.0.0.0:7443"
{{- range $key, $value := .Values.config }}
{{- if kindIs "float64" $value }}
{{ $key }} = {{ int64 $value }}
{{- else if not (kindIs "invalid" $value) }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{- end -}}
