# shellcheck shell=bash
# Sourced by the other scripts.
set -euo pipefail
# shellcheck disable=SC2034 # the scripts that source this use it
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VERSION=${LOCALKUBE_VERSION:-1.34.4}
HOME_DIR=${LOCALKUBE_HOME:-$HOME/.cache/localkube}
BIN=$HOME_DIR/$VERSION
RUN=${LOCALKUBE_RUN:-/tmp/localkube}
SOCK=/run/localkube-containerd/containerd.sock
# shellcheck disable=SC2034 # likewise
NODE=node1
export PATH=$BIN:$PATH

ctrk() { ctr -a "$SOCK" -n k8s.io "$@"; }

# A process is ours only if it also has the recorded start time, because process IDs are reused. A zombie has no start time.
started_at() { awk '$3 != "Z" { print $22 }' "/proc/$1/stat" 2>/dev/null; }
running() {
  [ -f "$RUN/$1.pid" ] && kill -0 "$(cat "$RUN/$1.pid")" 2>/dev/null &&
    [ "$(started_at "$(cat "$RUN/$1.pid")")" = "$(cat "$RUN/$1.started" 2>/dev/null)" ]
}

# start NAME COMMAND...: start the command if it does not run yet. Its output goes to $RUN/log/NAME.log.
start() {
  local name=$1
  shift
  if running "$name"; then return 0; fi
  setsid "$@" >>"$RUN/log/$name.log" 2>&1 </dev/null &
  echo $! >"$RUN/$name.pid"
  started_at $! >"$RUN/$name.started" || { echo "localkube: $name did not start; see $RUN/log/$name.log" >&2; return 1; }
}

wait_for() {
  local _
  for _ in $(seq 120); do
    if "$@" >/dev/null 2>&1; then return 0; fi
    sleep 0.5
  done
  echo "localkube: timed out on: $*" >&2
  return 1
}
