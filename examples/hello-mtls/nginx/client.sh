# The working directory is that of one generation, so that the key and the certificate match.
while sleep 1; do
  cd -P /var/run/tls/..data &&
    curl --silent --show-error --cacert ca.crt --cert tls.crt --key tls.key "$1" ||
    echo "error: curl failed"
done
