package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
)

const patience = 30 * time.Second

// raw lets messages pass as they are: they have been made before.
type raw struct{}

func (raw) Marshal(value any) ([]byte, error) { return *value.(*[]byte), nil }
func (raw) Unmarshal(data []byte, value any) error {
	*value.(*[]byte) = append([]byte(nil), data...)
	return nil
}
func (raw) Name() string { return "proto" }

type certmount struct {
	address string
	config  *tls.Config
	channel *grpc.ClientConn
}

func newCertmount(address string, config *tls.Config) caller { return &certmount{address, config, nil} }

func (c *certmount) connect() (err error) {
	c.channel, err = grpc.NewClient("passthrough:///"+c.address, grpc.WithTransportCredentials(credentials.NewTLS(c.config)),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{})))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c.channel.Connect()
	for state := c.channel.GetState(); state != connectivity.Ready; state = c.channel.GetState() {
		if !c.channel.WaitForStateChange(ctx, state) {
			return fmt.Errorf("no connection to %s: %s", c.address, state)
		}
	}
	return nil
}

func (c *certmount) call(asked request) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+asked.bearer)
	var answer []byte
	err := c.channel.Invoke(ctx, "/certmount.authority.v1.Authority/Issue", &asked.body, &answer)
	return answer, err
}

// leaf is the first element of IssueResponse.chain (field 1).
func (c *certmount) leaf(answer []byte) ([]byte, error) {
	number, kind, length := protowire.ConsumeTag(answer)
	if length < 0 || number != 1 || kind != protowire.BytesType {
		return nil, errors.New("the answer does not begin with a chain")
	}
	leaf, length := protowire.ConsumeBytes(answer[length:])
	return leaf, protowire.ParseError(length)
}
