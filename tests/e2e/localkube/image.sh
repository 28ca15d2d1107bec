#!/usr/bin/env bash
# image.sh REF DIR [BUILDAH OPTIONS]: build DIR/Dockerfile as image REF with buildah, and import it into the cluster's containerd.
# The Dockerfile declares its base as `ARG BASE=.../python:VERSION-slim-SUITE`. No registry is available here, so mmdebstrap builds
# a base of the same Debian release, with the same Python version.
. "$(dirname "$0")/common.sh"
ref=$1; dir=$2; shift 2
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
tag=$(sed -n 's/^ARG BASE=.*python://p' "$dir/Dockerfile"); version=${tag%%-*}; suite=${tag##*-}
base=localhost/localkube-python:$suite
log=$(mktemp); trap 'rm -f "$log"' EXIT
if ! buildah images -q "$base" >/dev/null 2>&1; then
  mkdir -p "$HOME_DIR"
  [ -f "$HOME_DIR/$suite.tar" ] || mmdebstrap -q --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$HOME_DIR/$suite.tar"
  c=$(buildah from scratch); buildah add -q "$c" "$HOME_DIR/$suite.tar" / >/dev/null
  buildah run "$c" -- python3 --version | grep -qF "Python $version." || { echo "image.sh: $dir/Dockerfile names Python $version, which is not the Python of Debian $suite" >&2; exit 1; }
  buildah commit -q "$c" "$base" >/dev/null; buildah rm "$c" >/dev/null
fi
# The build needs this machine's package index configuration.
mounts=(); for f in /etc/ssl/certs /etc/resolv.conf /etc/pip.conf; do [ -e $f ] && mounts+=(-v "$f:$f:ro"); done
options=(--network host "${mounts[@]}" --build-arg BASE="$base" "$@")
# certmount's own image is built and loaded as administrators do it.
export IMAGE=$ref CONTAINERD_ADDRESS=$SOCK ENGINE=buildah
if [ -x "$dir/scripts/image" ]; then "$dir/scripts/image" build "${options[@]}" >"$log" 2>&1
# Keep the layers: a build with the same lock file takes seconds.
else buildah bud --layers "${options[@]}" -t "$ref" "$dir" >"$log" 2>&1; fi || { tail -30 "$log" >&2; exit 1; }
"$HERE/../../../scripts/image" load
