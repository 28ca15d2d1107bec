package main

import (
	"encoding/binary"
	"errors"
	"os"
)

var errTruncated = errors.New("the file of requests ends in the middle of one")

// read takes requests, each as three fields with their lengths before them (32 bits, big-endian): name, bearer, body.
func read(file string) ([]request, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	field := func() ([]byte, error) {
		if len(content) < 4 {
			return nil, errTruncated
		}
		end := 4 + uint64(binary.BigEndian.Uint32(content))
		if end > uint64(len(content)) {
			return nil, errTruncated
		}
		value := content[4:end]
		content = content[end:]
		return value, nil
	}
	var requests []request
	for len(content) > 0 {
		name, err := field()
		if err != nil {
			return nil, err
		}
		bearer, err := field()
		if err != nil {
			return nil, err
		}
		body, err := field()
		if err != nil {
			return nil, err
		}
		requests = append(requests, request{string(name), string(bearer), body})
	}
	return requests, nil
}
