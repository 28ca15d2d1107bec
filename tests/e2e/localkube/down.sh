#!/usr/bin/env bash
# Stops the cluster and removes its state, mounts included. Touches only processes that up.sh started.
. "$(dirname "$0")/common.sh"
set +e
stop() { # asks, waits up to 15 s, then kills
  running "$1" || { rm -f "$RUN/$1".{pid,started}; return; }
  kill "$(cat "$RUN/$1.pid")"; for _ in $(seq 150); do running "$1" || break; sleep 0.1; done
  running "$1" && kill -9 "$(cat "$RUN/$1.pid")"; rm -f "$RUN/$1".{pid,started}
}
for n in kubelet proxy dns sched cm; do stop $n; done
if running containerd; then
  for c in $(ctrk tasks ls -q 2>/dev/null); do ctrk tasks kill -s KILL "$c" >/dev/null 2>&1; done; sleep 1
  for c in $(ctrk tasks ls -q 2>/dev/null); do ctrk tasks rm -f "$c" >/dev/null 2>&1; done
  for c in $(ctrk containers ls -q 2>/dev/null); do ctrk containers rm "$c" >/dev/null 2>&1; done
fi
for n in apiserver etcd containerd; do stop $n; done
awk '{print $2}' /proc/mounts | grep -E "^(/var/lib/kubelet|/run/localkube-containerd|$RUN)" | sort -r | xargs -r -n1 umount -l 2>/dev/null
ip link del cni0 2>/dev/null
rm -rf /var/lib/kubelet /run/localkube-containerd /var/lib/cni/networks/localkube
[ "${1:-}" = --keep ] || rm -rf "$RUN"
exit 0
