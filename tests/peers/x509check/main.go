// Command x509check verifies a certificate as Go's TLS stack does, and prints what it parses as JSON.
//
//	x509check UNIX-TIME USAGE ROOTS INTERMEDIATES LEAF NAME
//
// USAGE is server or client. ROOTS, INTERMEDIATES and LEAF are PEM files. NAME is a DNS name or empty.
package main

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"strconv"
	"time"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func pool(file string) *x509.CertPool {
	certificates := x509.NewCertPool()
	certificates.AppendCertsFromPEM(must(os.ReadFile(file)))
	return certificates
}

func main() {
	usage := map[string]x509.ExtKeyUsage{"server": x509.ExtKeyUsageServerAuth, "client": x509.ExtKeyUsageClientAuth}
	block, _ := pem.Decode(must(os.ReadFile(os.Args[5])))
	leaf, err := x509.ParseCertificate(block.Bytes)
	seen := map[string]any{}
	if err == nil {
		_, err = leaf.Verify(x509.VerifyOptions{
			CurrentTime:   time.Unix(must(strconv.ParseInt(os.Args[1], 10, 64)), 0),
			KeyUsages:     []x509.ExtKeyUsage{usage[os.Args[2]]},
			Roots:         pool(os.Args[3]),
			Intermediates: pool(os.Args[4]),
			DNSName:       os.Args[6],
		})
		uris := []string{}
		for _, uri := range leaf.URIs {
			uris = append(uris, uri.String())
		}
		seen = map[string]any{
			"version": leaf.Version, "ca": leaf.IsCA, "key": leaf.PublicKeyAlgorithm.String(),
			"dns": leaf.DNSNames, "uris": uris, "ips": leaf.IPAddresses, "emails": leaf.EmailAddresses,
		}
	}
	if err != nil {
		seen["error"] = err.Error()
	}
	must(0, json.NewEncoder(os.Stdout).Encode(seen))
}
