#!/usr/bin/env bash
# Installs the Debian packages that the cluster needs, and builds Kubernetes from its published Go modules.
. "$(dirname "$0")/common.sh"
need=; for c in etcd containerd runc iptables buildah mmdebstrap busybox; do command -v $c >/dev/null || need=1; done
if [ -n "$need" ] || [ ! -d /usr/lib/cni ] || [ ! -x /bin/busybox ]; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
    etcd-server containerd runc iptables containernetworking-plugins busybox-static buildah mmdebstrap curl openssl iproute2 procps >/dev/null
fi
command -v go >/dev/null || { echo "localkube: needs Go to build Kubernetes from its modules" >&2; exit 1; }
[ -f "$BIN/.complete" ] && exit 0
SRC=$HOME_DIR/src-$VERSION; STAGING=0.${VERSION#1.}
mkdir -p "$BIN" "$SRC" && cd "$SRC"
printf 'module localkube\n\ngo 1.24.0\n' >go.mod
go mod edit -require=k8s.io/kubernetes@v"$VERSION"
# k8s.io/kubernetes requires its staging modules at v0.0.0; their published versions are v0.<minor>.<patch>.
gomod=$(go mod download -json k8s.io/kubernetes@v"$VERSION" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
grep -oE '^\s+k8s\.io/[a-z-]+ v0\.0\.0$' "$gomod" | awk '{print $1}' | sort -u | while read -r m; do go mod edit -replace="$m=$m@v$STAGING"; done
{ echo '//go:build tools'; echo 'package tools'; echo 'import ('
  for c in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do echo "_ \"k8s.io/kubernetes/cmd/$c\""; done; echo ')'; } >tools.go
go mod tidy
v=k8s.io/component-base/version
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X $v.gitVersion=v$VERSION -X $v.gitMajor=1 -X $v.gitMinor=$(echo "$VERSION" | cut -d. -f2)" \
  -o "$BIN/" k8s.io/kubernetes/cmd/kube-{apiserver,controller-manager,scheduler,proxy} k8s.io/kubernetes/cmd/kube{let,ctl}
GOBIN=$BIN CGO_ENABLED=0 go install -ldflags "-s -w" github.com/coredns/coredns@v1.15.0
touch "$BIN/.complete"
