#!/usr/bin/env bash
# Stops the cluster and deletes its state and mounts. Stops only processes that up.sh started.
. "$(dirname "$0")/common.sh"
set +e
stop() { # SIGTERM, then SIGKILL after 15 s
  running "$1" || { rm -f "$RUN/$1".{pid,started}; return; }
  kill "$(cat "$RUN/$1.pid")"; for _ in $(seq 150); do running "$1" || break; sleep 0.1; done
  running "$1" && kill -9 "$(cat "$RUN/$1.pid")"; rm -f "$RUN/$1".{pid,started}
}
for n in kubelet proxy dns sched cm; do stop $n; done
if running containerd; then
  # Kill them all in one call, because each start of ctr is slow. The other processes of a container end with its first one.
  ctrk tasks ls | awk 'NR > 1 && $3 == "RUNNING" { print $2 }' | xargs -r kill -9
  ctrk tasks ls -q | xargs -r ctr -a "$SOCK" -n k8s.io tasks rm -f >/dev/null 2>&1
  ctrk containers ls -q | xargs -r ctr -a "$SOCK" -n k8s.io containers rm >/dev/null 2>&1
fi
for n in apiserver etcd containerd; do stop $n; done
# containerd never stops a shim whose container ended early.
for process in /proc/[0-9]*; do
  case $(tr '\0' ' ' 2>/dev/null <"$process/cmdline") in */containerd-shim*"-address $SOCK "*) kill -9 "${process#/proc/}" ;; esac
done
awk '{print $2}' /proc/mounts | grep -E "^(/var/lib/kubelet|/run/localkube-containerd|$RUN)" | sort -r | xargs -r -n1 umount -l 2>/dev/null
ip link del cni0 2>/dev/null
iptables -D FORWARD -d 10.96.0.0/16 -j DROP 2>/dev/null
rm -rf /var/lib/kubelet /run/localkube-containerd /var/lib/cni/networks/localkube
[ "${1:-}" = --keep ] || rm -rf "$RUN"
exit 0
