package main

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
)

type stepCA struct {
	base   string
	client *http.Client
}

// A client that is fresh each time, as a program that asks for one certificate and ends, has no connection to go on with.
func newStepCA(address string, config *tls.Config, fresh bool) caller {
	transport := &http.Transport{TLSClientConfig: config, MaxIdleConnsPerHost: 1, DisableKeepAlives: fresh}
	return &stepCA{"https://" + address, &http.Client{Transport: transport, Timeout: patience}}
}

func (s *stepCA) connect() error {
	_, err := s.read(s.client.Get(s.base + "/health"))
	return err
}

func (s *stepCA) call(asked request) ([]byte, error) {
	return s.read(s.client.Post(s.base+"/1.0/sign", "application/json", bytes.NewReader(asked.body)))
}

func (s *stepCA) read(response *http.Response, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %s", response.Status, body)
	}
	return body, err
}

func (s *stepCA) leaf(answer []byte) ([]byte, error) {
	var signed struct {
		Certificate string `json:"crt"`
	}
	if err := json.Unmarshal(answer, &signed); err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(signed.Certificate))
	if block == nil {
		return nil, errors.New("the answer holds no certificate")
	}
	return block.Bytes, nil
}
