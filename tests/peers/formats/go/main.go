// Command formats reads all formats of each directory, and connects to itself by mutual TLS with each form of the key.
// It prints the serial numbers that it sees as JSON.
package main

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"

	"software.sslmate.com/src/go-pkcs12"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func check(directory string) []string {
	read := func(name string) []byte { return must(os.ReadFile(filepath.Join(directory, name))) }
	password := string(read("keystore.password"))
	roots := x509.NewCertPool()
	for _, root := range must(pkcs12.DecodeTrustStore(read("truststore.p12"), password)) {
		roots.AddCert(root)
	}
	fromPEM := x509.NewCertPool()
	if !fromPEM.AppendCertsFromPEM(read("ca.crt")) || !fromPEM.Equal(roots) {
		panic(directory + ": ca.crt and truststore.p12 differ")
	}
	key, leaf, intermediates, err := pkcs12.DecodeChain(read("keystore.p12"), password)
	must(0, err)
	fromStore := tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}
	for _, intermediate := range intermediates {
		fromStore.Certificate = append(fromStore.Certificate, intermediate.Raw)
	}
	files := must(tls.X509KeyPair(read("tls.crt"), read("tls.key")))
	fromDER := tls.Certificate{
		Certificate: append([][]byte{read("tls.der")}, files.Certificate[1:]...),
		PrivateKey:  fromEncoding(read("tls.key"), read("tls.key.der")),
	}
	pairs := []tls.Certificate{files, must(tls.X509KeyPair(read("tls.pem"), read("tls.pem"))), fromStore, fromDER}
	seen := []string{}
	for _, pair := range pairs {
		if !bytes.Equal(pair.Certificate[0], leaf.Raw) {
			panic(directory + ": different certificates")
		}
		_ = pair.PrivateKey.(crypto.Signer)
		seen = append(seen, handshake(pair, roots)...)
	}
	return seen
}

// fromEncoding parses the key in DER; the key in PEM says what its encoding is.
func fromEncoding(inPEM, der []byte) crypto.PrivateKey {
	block, _ := pem.Decode(inPEM)
	switch block.Type {
	case "RSA PRIVATE KEY":
		return must(x509.ParsePKCS1PrivateKey(der))
	case "EC PRIVATE KEY":
		return must(x509.ParseECPrivateKey(der))
	}
	return must(x509.ParsePKCS8PrivateKey(der))
}

// handshake returns the serial numbers that server and client see of each other.
func handshake(pair tls.Certificate, roots *x509.CertPool) []string {
	one, other := net.Pipe()
	certificates := []tls.Certificate{pair}
	server := tls.Server(one, &tls.Config{
		Certificates: certificates, ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert, SessionTicketsDisabled: true,
	})
	client := tls.Client(other, &tls.Config{Certificates: certificates, RootCAs: roots, ServerName: "localhost"})
	done := make(chan error)
	go func() { done <- client.Handshake() }()
	must(0, server.Handshake())
	must(0, <-done)
	number := func(end *tls.Conn) string { return end.ConnectionState().PeerCertificates[0].SerialNumber.Text(16) }
	return []string{number(server), number(client)}
}

func main() {
	seen := map[string][]string{}
	for _, directory := range os.Args[1:] {
		seen[directory] = check(directory)
	}
	must(0, json.NewEncoder(os.Stdout).Encode(seen))
}
