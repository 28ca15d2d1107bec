// csiclient publishes volumes like the kubelet, and measures each call. The requests are prepared before: a file contains them
// as encoded messages. Nothing is decoded, so the client needs little of the processors that it shares with the driver.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

const (
	timeout   = 2 * time.Minute // the kubelet's
	publish   = "/csi.v1.Node/NodePublishVolume"
	unpublish = "/csi.v1.Node/NodeUnpublishVolume"
)

// raw sends and receives encoded messages.
type raw struct{}

func (raw) Marshal(value any) ([]byte, error) { return *value.(*[]byte), nil }
func (raw) Unmarshal(data []byte, value any) error {
	*value.(*[]byte) = append([]byte(nil), data...)
	return nil
}
func (raw) Name() string { return "proto" }

type result struct {
	PublishS   float64 `json:"publish_s"`
	UnpublishS float64 `json:"unpublish_s"`
	Error      string  `json:"error"`
}

type client struct {
	socket string
	fresh  bool
	shared *grpc.ClientConn
}

func main() {
	socket := flag.String("socket", "", "the driver's CSI socket")
	file := flag.String("requests", "", "file of requests")
	workers := flag.Int("workers", 1, "number of volumes that are published at the same time")
	every := flag.Duration("every", 0, "start a volume at this interval instead, whether or not the last one is published")
	fresh := flag.Bool("fresh", false, "a connection for each call, like the kubelet")
	open := flag.Bool("until-closed", false, "start no more volumes after the standard input is closed")
	flag.Parse()
	if err := run(&client{socket: *socket, fresh: *fresh}, *file, *workers, *every, *open); err != nil {
		fmt.Fprintln(os.Stderr, "csiclient:", err)
		os.Exit(1)
	}
}

func run(c *client, file string, workers int, every time.Duration, open bool) error {
	volumes, err := read(file)
	if err != nil {
		return err
	}
	if c.shared, err = c.connect(); err != nil {
		return err
	}
	closed := make(chan struct{})
	if open {
		go func() {
			io.Copy(io.Discard, os.Stdin)
			close(closed)
		}()
	}
	fmt.Println("started")
	before, began := processor(), time.Now()
	var results []result
	if every > 0 {
		results = c.atIntervals(volumes, every, closed)
	} else {
		results = c.concurrently(volumes, workers)
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"seconds": time.Since(began).Seconds(), "processor_s": processor() - before, "volumes": results,
	})
}

func (c *client) connect() (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+c.socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{}), grpc.WaitForReady(true)))
}

func (c *client) concurrently(volumes []volume, workers int) []result {
	results := make([]result, len(volumes))
	indexes := make(chan int, len(volumes))
	for i := range volumes {
		indexes <- i
	}
	close(indexes)
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for i := range indexes {
				results[i] = c.handle(volumes[i])
			}
		})
	}
	all.Wait()
	return results
}

func (c *client) atIntervals(volumes []volume, every time.Duration, closed <-chan struct{}) []result {
	results := make([]result, len(volumes))
	ticks := time.NewTicker(every)
	defer ticks.Stop()
	var all sync.WaitGroup
	started := 0
	for ; started < len(volumes); started++ {
		select {
		case <-closed:
			all.Wait()
			return results[:started]
		case <-ticks.C:
		}
		i := started
		all.Go(func() { results[i] = c.handle(volumes[i]) })
	}
	all.Wait()
	return results
}

// handle publishes a volume, and unpublishes it if the file has the request for that.
func (c *client) handle(v volume) (r result) {
	if r.PublishS, r.Error = c.call(publish, v.publish); r.Error == "" && len(v.unpublish) > 0 {
		r.UnpublishS, r.Error = c.call(unpublish, v.unpublish)
	}
	return r
}

func (c *client) call(method string, body []byte) (seconds float64, problem string) {
	began, channel := time.Now(), c.shared
	if c.fresh {
		own, err := c.connect()
		if err != nil {
			return 0, err.Error()
		}
		defer own.Close()
		channel = own
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var answer []byte
	if err := channel.Invoke(ctx, method, &body, &answer); err != nil {
		problem = status.Convert(err).Code().String() + ": " + status.Convert(err).Message()
	}
	return time.Since(began).Seconds(), problem
}

// processor returns the CPU time of this process: getrusage(2).
func processor() float64 {
	var usage syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) != nil {
		return 0
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
}
