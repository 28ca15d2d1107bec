package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

// newest reads the files for each connection. One file contains the key and its certificate, so they always match.
func newest() (*tls.Config, error) {
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
	servers := x509.NewCertPool()
	servers.AppendCertsFromPEM(roots)
	return &tls.Config{Certificates: []tls.Certificate{certificate}, RootCAs: servers}, nil
}

func get(url string) (string, error) {
	config, err := newest()
	if err != nil {
		return "", err
	}
	client := http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

func main() {
	for ; ; time.Sleep(time.Second) {
		if body, err := get(os.Args[1]); err != nil {
			fmt.Println("error:", err)
		} else {
			fmt.Print(body)
		}
	}
}
