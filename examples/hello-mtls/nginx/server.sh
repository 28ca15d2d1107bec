# Runs nginx, and reloads it when the files have changed. With reload signals (docs/reload.md), nginx alone is sufficient.
# The script ends with nginx, so that Kubernetes restarts the container.
nginx -c /app/nginx.conf -g 'daemon off;' &
loaded=$(readlink /var/run/tls/..data)
while kill -0 $! 2>/dev/null && sleep 1; do
  current=$(readlink /var/run/tls/..data)
  if [ "$current" != "$loaded" ]; then
    kill -HUP $! && loaded=$current
  fi
done
exit 1
