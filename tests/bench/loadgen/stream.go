package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
)

// stream sends the requests of one node on one IssueStream, whose token is that of the first request.
type stream struct {
	certmount
	opened  sync.Once
	failed  error // why there is no stream
	lock    sync.Mutex
	stream  grpc.ClientStream
	number  uint64
	waiting map[uint64]chan reply
}

type reply struct {
	answer []byte
	err    error
}

func newStream(address string, config *tls.Config) caller {
	return &stream{certmount: certmount{address, config, nil}, waiting: map[uint64]chan reply{}}
}

func (s *stream) call(asked request) ([]byte, error) {
	if s.opened.Do(func() { s.failed = s.open(asked.bearer) }); s.failed != nil {
		return nil, s.failed
	}
	answer, err := s.send(asked.body)
	if err != nil {
		return nil, err
	}
	select {
	case got := <-answer:
		return got.answer, got.err
	case <-time.After(patience):
		return nil, errors.New("no answer in time")
	}
}

func (s *stream) open(bearer string) (err error) {
	ctx := metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+bearer)
	both := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
	s.stream, err = s.channel.NewStream(ctx, both, "/certmount.authority.v1.Authority/IssueStream")
	if err == nil {
		go s.receive()
	}
	return err
}

// send writes an IssueStreamRequest: id (field 1), issue (2) and timeout_ms (4).
func (s *stream) send(body []byte) (chan reply, error) {
	s.lock.Lock()
	defer s.lock.Unlock()
	s.number++
	answer := make(chan reply, 1)
	s.waiting[s.number] = answer
	message := make([]byte, 0, len(body)+24)
	message = protowire.AppendVarint(protowire.AppendTag(message, 1, protowire.VarintType), s.number)
	message = protowire.AppendBytes(protowire.AppendTag(message, 2, protowire.BytesType), body)
	message = protowire.AppendVarint(protowire.AppendTag(message, 4, protowire.VarintType), uint64(patience.Milliseconds()))
	return answer, s.stream.SendMsg(&message)
}

func (s *stream) receive() {
	for {
		var message []byte
		if err := s.stream.RecvMsg(&message); err != nil {
			s.lock.Lock()
			for _, answer := range s.waiting {
				answer <- reply{nil, err}
			}
			s.lock.Unlock()
			return
		}
		number, got := parse(message)
		s.lock.Lock()
		answer := s.waiting[number]
		delete(s.waiting, number)
		s.lock.Unlock()
		if answer != nil {
			answer <- got
		}
	}
}

// parse reads an IssueStreamResponse: id (field 1), and issued (2) or failure (3).
func parse(message []byte) (id uint64, got reply) {
	got.err = errors.New("the response has no outcome")
	for len(message) > 0 {
		field, kind, length := protowire.ConsumeTag(message)
		if length < 0 {
			return id, reply{nil, protowire.ParseError(length)}
		}
		message = message[length:]
		switch {
		case field == 1 && kind == protowire.VarintType:
			id, length = protowire.ConsumeVarint(message)
		case field == 2 && kind == protowire.BytesType:
			got.answer, length = protowire.ConsumeBytes(message)
			got.err = nil
		case field == 3 && kind == protowire.BytesType:
			var failure []byte
			failure, length = protowire.ConsumeBytes(message)
			got.err = fmt.Errorf("refused: %q", failure)
		default:
			length = protowire.ConsumeFieldValue(field, kind, message)
		}
		if length < 0 {
			return id, reply{nil, protowire.ParseError(length)}
		}
		message = message[length:]
	}
	return id, got
}
