{{/* The labels of all objects. Selectors do not contain them, because selectors are immutable. */}}
{{- define "certmount.labels" -}}
app.kubernetes.io/part-of: certmount
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* The manifests in a text, with the labels: (dict "text" TEXT "root" $). */}}
{{- define "certmount.labelled" -}}
{{- range splitList "\n---\n" .text }}
---
{{- $object := fromYaml . }}
{{- $_ := set $object.metadata "labels" (include "certmount.labels" $.root | fromYaml) }}
{{ toYaml $object }}
{{- end }}
{{- end }}

{{- define "certmount.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{/* The first fields of a container: its image, and when to pull it. */}}
{{- define "certmount.container" -}}
image: {{ include "certmount.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* Where the pods of a component run: (dict "values" VALUES "root" $ "name" NAME). */}}
{{- define "certmount.scheduling" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . | quote }}
{{- end }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 0 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .values.topologySpreadConstraints }}
topologySpreadConstraints:
{{- range .values.topologySpreadConstraints }}
- {{ toYaml . | nindent 2 | trim }}
  labelSelector:
    matchLabels:
      app.kubernetes.io/name: {{ $.name | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* The arguments for logs, except defaults. */}}
{{- define "certmount.logging" -}}
{{- if ne .Values.logLevel "info" }}
- --log-level={{ .Values.logLevel }}
{{- end }}
{{- if ne .Values.logFormat "json" }}
- --log-format={{ .Values.logFormat }}
{{- end }}
{{- end }}

{{- define "certmount.caSecret" -}}
{{ .Values.ca.existingSecret | default "certmount-ca" }}
{{- end }}

{{/* A RoleBinding of the namespace's Role NAME to an account of this release: (dict "name" NAME "namespace" NAMESPACE "account" ACCOUNT "root" $). */}}
{{- define "certmount.roleBinding" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ .name | quote }}
  namespace: {{ .namespace | quote }}
  labels: {{- include "certmount.labels" .root | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ .name | quote }}
subjects:
- kind: ServiceAccount
  name: {{ .account | quote }}
  namespace: {{ .root.Release.Namespace | quote }}
{{- end }}

{{/* As certmount.roleBinding, of a ClusterRole to the authority: (dict "name" NAME "root" $). */}}
{{- define "certmount.clusterRoleBinding" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ .name | quote }}
  labels: {{- include "certmount.labels" .root | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ .name | quote }}
subjects:
- kind: ServiceAccount
  name: certmount-authority
  namespace: {{ .root.Release.Namespace | quote }}
{{- end }}

{{/* Ports for DNS, which can be a pod, a node-local cache or outside the cluster. OpenShift's DNS pods listen on 5353. */}}
{{- define "certmount.dnsPorts" -}}
- ports: [{port: 53, protocol: UDP}, {port: 53}, {port: 5353, protocol: UDP}, {port: 5353}]
{{- end }}
