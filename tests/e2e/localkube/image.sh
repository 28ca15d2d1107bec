#!/usr/bin/env bash
# image.sh REF DIR [BUILDAH OPTIONS]: builds DIR/Dockerfile as image REF with buildah and imports it into the cluster's containerd.
# The Dockerfile must take its base as `ARG BASE=...`: here BASE is a Debian 12 with python3 that mmdebstrap makes, as nothing can be pulled.
. "$(dirname "$0")/common.sh"
ref=$1; dir=$2; shift 2
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
base=localhost/localkube-python:12
archive=$(mktemp --suffix=.tar); log=$(mktemp); trap 'rm -f "$archive" "$log"' EXIT
if ! buildah images -q $base >/dev/null 2>&1; then
  mkdir -p "$HOME_DIR"
  [ -f "$HOME_DIR/base.tar" ] || mmdebstrap -q --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$HOME_DIR/base.tar"
  c=$(buildah from scratch); buildah add -q "$c" "$HOME_DIR/base.tar" / >/dev/null; buildah commit -q "$c" $base >/dev/null; buildah rm "$c" >/dev/null
fi
# The build reaches a package index the way this machine does.
mounts=(); for f in /etc/ssl/certs /etc/resolv.conf /etc/pip.conf; do [ -e $f ] && mounts+=(-v "$f:$f:ro"); done
# Layers are kept, so that a build with the same lock file takes seconds.
buildah bud --layers --network host "${mounts[@]}" --build-arg BASE=$base -t "$ref" "$@" "$dir" >"$log" 2>&1 || { tail -30 "$log" >&2; exit 1; }
rm -f "$archive"; buildah push -q "$ref" "docker-archive:$archive:$ref"
ctrk images import "$archive" >/dev/null && ctrk images ls -q | grep -F "$ref"
