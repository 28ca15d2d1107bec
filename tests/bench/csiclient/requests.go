package main

import (
	"encoding/binary"
	"errors"
	"os"
)

var errTruncated = errors.New("the file of requests is truncated")

// A volume has encoded messages: NodePublishVolumeRequest, and NodeUnpublishVolumeRequest or nothing.
type volume struct{ publish, unpublish []byte }

// read parses a file of volumes, in which each message follows its length (32 bits, big-endian).
func read(file string) ([]volume, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var messages [][]byte
	for len(content) > 0 {
		if len(content) < 4 {
			return nil, errTruncated
		}
		end := 4 + uint64(binary.BigEndian.Uint32(content))
		if end > uint64(len(content)) {
			return nil, errTruncated
		}
		messages, content = append(messages, content[4:end]), content[end:]
	}
	if len(messages)%2 != 0 {
		return nil, errTruncated
	}
	var volumes []volume
	for i := 0; i < len(messages); i += 2 {
		volumes = append(volumes, volume{messages[i], messages[i+1]})
	}
	return volumes, nil
}
