{{- define "mat-steer.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "mat-steer.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mat-steer.labels" -}}
{{ include "mat-steer.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "mat-steer.claim" -}}
{{- if .Values.checkpoints.existingClaim -}}
{{- .Values.checkpoints.existingClaim -}}
{{- else if .Values.checkpoints.create -}}
{{- printf "%s-checkpoints" (include "mat-steer.name" .) -}}
{{- end -}}
{{- end -}}
