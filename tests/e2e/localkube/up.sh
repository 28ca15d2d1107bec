#!/usr/bin/env bash
# Starts all components that do not run, and prints the exports for the caller's shell.
. "$(dirname "$0")/common.sh"
mkdir -p "$RUN"/{pki,log,etcd,cni}; cd "$RUN"
if [ ! -f pki/done ]; then ( cd pki
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt -subj /CN=kubernetes-ca -days 30
  openssl genrsa -out sa.key 2048; openssl rsa -in sa.key -pubout -out sa.pub
  issue() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$1.key" -out "$1.csr" -subj "$2"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -out "$1.crt" -extfile <(printf "%b" "$3"); }
  k=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local
  issue apiserver /CN=kube-apiserver "subjectAltName=DNS:localhost,$k,IP:127.0.0.1,IP:10.96.0.1,IP:10.244.0.1\nextendedKeyUsage=serverAuth,clientAuth"
  issue admin /O=system:masters/CN=admin "extendedKeyUsage=clientAuth"
  issue cm /CN=system:kube-controller-manager "extendedKeyUsage=clientAuth"
  issue sched /CN=system:kube-scheduler "extendedKeyUsage=clientAuth"
  issue proxy /CN=system:kube-proxy "extendedKeyUsage=clientAuth"
  issue dns /CN=localkube-dns "extendedKeyUsage=clientAuth"
  issue kubelet "/O=system:nodes/CN=system:node:$NODE" "extendedKeyUsage=clientAuth,serverAuth\nsubjectAltName=DNS:$NODE,IP:127.0.0.1"
  touch "done"
) >log/pki.log 2>&1; fi
for u in admin cm sched proxy kubelet dns; do [ -f $u.kubeconfig ] || {
  c="kubectl config --kubeconfig=$u.kubeconfig"
  $c set-cluster c --server=https://127.0.0.1:6443 --certificate-authority=pki/ca.crt --embed-certs
  $c set-credentials u --client-certificate=pki/$u.crt --client-key=pki/$u.key --embed-certs
  $c set-context c --cluster=c --user=u; $c use-context c; } >/dev/null; done
export KUBECONFIG=$RUN/admin.kubeconfig
start etcd etcd --data-dir "$RUN/etcd" --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
  --listen-peer-urls http://127.0.0.1:2380 --unsafe-no-fsync --log-level warn
wait_for curl -sf http://127.0.0.1:2379/health
read -ra apiserver_args <<<"${LOCALKUBE_APISERVER_ARGS:-}"
start apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 --secure-port=6443 --advertise-address=10.244.0.1 --bind-address=0.0.0.0 \
  --tls-cert-file=pki/apiserver.crt --tls-private-key-file=pki/apiserver.key --client-ca-file=pki/ca.crt --service-cluster-ip-range=10.96.0.0/16 \
  --service-account-issuer=https://kubernetes.default.svc.cluster.local --service-account-key-file=pki/sa.pub --service-account-signing-key-file=pki/sa.key \
  --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true --kubelet-preferred-address-types=InternalIP \
  --kubelet-client-certificate=pki/admin.crt --kubelet-client-key=pki/admin.key "${apiserver_args[@]}"
wait_for kubectl get --raw /readyz
start cm kube-controller-manager --kubeconfig=cm.kubeconfig --service-account-private-key-file=pki/sa.key --root-ca-file=pki/ca.crt --use-service-account-credentials \
  --cluster-signing-cert-file=pki/ca.crt --cluster-signing-key-file=pki/ca.key --leader-elect=false --allocate-node-cidrs --cluster-cidr=10.244.0.0/16
start sched kube-scheduler --kubeconfig=sched.kubeconfig --leader-elect=false
# restrict_oom_score_adj makes containerd work without CAP_SYS_RESOURCE.
cat >containerd.toml <<X
version = 2
root = "$RUN/containerd"
state = "/run/localkube-containerd"
[grpc]
  address = "$SOCK"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/local/busybox:1"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$RUN/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
X
cat >cni/10-bridge.conflist <<X
{"cniVersion":"0.4.0","name":"localkube","plugins":[{"type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":true,"hairpinMode":true,
"ipam":{"type":"host-local","ranges":[[{"subnet":"10.244.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},{"type":"portmap","capabilities":{"portMappings":true}}]}
X
# Create the bridge before the first pod needs it, because the cluster's DNS listens on it.
ip link show cni0 >/dev/null 2>&1 || { ip link add cni0 type bridge; ip addr add 10.244.0.1/24 dev cni0; ip link set cni0 up; }
sysctl -qw net.ipv4.ip_forward=1; sysctl -qw net.bridge.bridge-nf-call-iptables=1 2>/dev/null || true
start containerd containerd -c "$RUN/containerd.toml"
wait_for ctr -a "$SOCK" version
ctrk images ls -q | grep -qx docker.io/local/busybox:1 || { python3 "$HERE/busybox_image.py" docker.io/local/busybox:1 busybox.tar && ctrk images import busybox.tar >/dev/null; }
cat >kubelet.yaml <<X
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $RUN/pki/ca.crt}}
authorization: {mode: Webhook}
clusterDomain: cluster.local
clusterDNS: [10.244.0.1]
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
containerRuntimeEndpoint: unix://$SOCK
tlsCertFile: $RUN/pki/kubelet.crt
tlsPrivateKeyFile: $RUN/pki/kubelet.key
maxPods: 250
podLogsDir: $RUN/pod-logs
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 100Mi}
serializeImagePulls: false
syncFrequency: ${LOCALKUBE_SYNC_FREQUENCY:-30s}
enforceNodeAllocatable: []
${LOCALKUBE_KUBELET_CONFIG:-}
X
start kubelet kubelet --config=kubelet.yaml --kubeconfig=kubelet.kubeconfig --hostname-override=$NODE --v=2
wait_for sh -c "kubectl get node $NODE --no-headers | grep -qw Ready"
wait_for sh -c "kubectl get clusterrolebinding localkube-proxy || kubectl create clusterrolebinding localkube-proxy --clusterrole=system:node-proxier --user=system:kube-proxy"
start proxy kube-proxy --kubeconfig=proxy.kubeconfig --cluster-cidr=10.244.0.0/16 --hostname-override=$NODE --proxy-mode=iptables
wait_for sh -c "kubectl get clusterrolebinding localkube-dns || { kubectl create clusterrole localkube-dns --verb=list,watch --resource=services,pods,namespaces,endpointslices.discovery.k8s.io && kubectl create clusterrolebinding localkube-dns --clusterrole=localkube-dns --user=localkube-dns; }"
# While kube-proxy replaces its rules, a connection to a Service must not leave the node: some other server could answer it.
iptables -C FORWARD -d 10.96.0.0/16 -j DROP 2>/dev/null || iptables -A FORWARD -d 10.96.0.0/16 -j DROP
cat >Corefile <<X
.:53 {
  bind 10.244.0.1
  errors
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $RUN/dns.kubeconfig
    pods insecure
  }
}
X
start dns coredns -conf Corefile
wait_for kubectl -n default get serviceaccount default
echo "export KUBECONFIG=$KUBECONFIG PATH=$BIN:\$PATH LOCALKUBE_RUN=$RUN"
