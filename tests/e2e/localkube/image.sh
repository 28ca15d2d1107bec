#!/usr/bin/env bash
# image.sh REF DIR [BUILDAH OPTIONS]: build DIR/Dockerfile as image REF with buildah, and import it into the cluster's containerd.
# The Dockerfile declares its base as `ARG BASE=.../python:VERSION-slim-SUITE`. No registry is available here, so mmdebstrap builds
# a base of the same Debian release, with the same Python version.
. "$(dirname "$0")/common.sh"
ref=$1; dir=$2; shift 2
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
tag=$(sed -n 's/^ARG BASE=.*python://p' "$dir/Dockerfile"); version=${tag%%-*}; suite=${tag##*-}
base=localhost/localkube-python:$suite
archive=$(mktemp --suffix=.tar); log=$(mktemp); trap 'rm -f "$archive" "$log"' EXIT
if ! buildah images -q "$base" >/dev/null 2>&1; then
  mkdir -p "$HOME_DIR"
  [ -f "$HOME_DIR/$suite.tar" ] || mmdebstrap -q --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$HOME_DIR/$suite.tar"
  c=$(buildah from scratch); buildah add -q "$c" "$HOME_DIR/$suite.tar" / >/dev/null
  buildah run "$c" -- python3 --version | grep -qF "Python $version." || { echo "image.sh: $dir/Dockerfile names Python $version, which is not the Python of Debian $suite" >&2; exit 1; }
  buildah commit -q "$c" "$base" >/dev/null; buildah rm "$c" >/dev/null
fi
# The build needs this machine's package index configuration.
mounts=(); for f in /etc/ssl/certs /etc/resolv.conf /etc/pip.conf; do [ -e $f ] && mounts+=(-v "$f:$f:ro"); done
# Keep the layers: a build with the same lock file takes seconds.
buildah bud --layers --network host "${mounts[@]}" --build-arg BASE="$base" -t "$ref" "$@" "$dir" >"$log" 2>&1 || { tail -30 "$log" >&2; exit 1; }
rm -f "$archive"; buildah push -q "$ref" "docker-archive:$archive:$ref"
ctrk images import "$archive" >/dev/null && ctrk images ls -q | grep -F "$ref"
