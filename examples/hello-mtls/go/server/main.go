package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"time"
)

// newest reads the files for each connection. One file contains the key and its certificate, so they always match.
func newest(*tls.ClientHelloInfo) (*tls.Config, error) {
	pem, err := os.ReadFile("/var/run/tls/site.pem")
	if err != nil {
		return nil, err
	}
	certificate, err := tls.X509KeyPair(pem, pem)
	if err != nil {
		return nil, err
	}
	roots, err := os.ReadFile("/var/run/tls/root.crt")
	if err != nil {
		return nil, err
	}
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM(roots)
	return &tls.Config{
		Certificates: []tls.Certificate{certificate},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    clients,
	}, nil
}

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		uris := r.TLS.PeerCertificates[0].URIs
		if len(uris) == 0 {
			http.Error(w, "no SPIFFE ID", http.StatusForbidden)
			return
		}
		fmt.Fprintln(w, "hello", uris[0])
	})
	tlsConfig := &tls.Config{GetConfigForClient: newest}
	server := &http.Server{Addr: ":8443", TLSConfig: tlsConfig, ReadHeaderTimeout: 10 * time.Second}
	panic(server.ListenAndServeTLS("", ""))
}
