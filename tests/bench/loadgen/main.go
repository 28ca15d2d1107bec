// loadgen sends prepared requests to an authority, of certmount (gRPC calls, or streams) or of step-ca (HTTPS), over a number of
// connections, and tells how long they took. Both are driven by this same program, so that the caller is no difference.
//
// Whatever can be done before is done before: the file of requests holds complete messages; the answers are kept and
// judged when the clock has stopped.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A request as the file holds it.
type request struct {
	name   string // that the certificate must have
	bearer string // the caller's token, empty for step-ca
	body   []byte
}

// A caller has one connection.
type caller interface {
	connect() error
	call(request) ([]byte, error) // the answer as it came
	leaf([]byte) ([]byte, error)  // the leaf (DER) in an answer
}

type result struct {
	Answers   int      `json:"answers"`
	Seconds   float64  `json:"seconds"`
	P50       float64  `json:"p50_s"`
	P99       float64  `json:"p99_s"`
	Processor float64  `json:"processor_s"` // of this program, meanwhile
	Problems  []string `json:"problems"`
}

func main() {
	kind := flag.String("kind", "certmount", "certmount, stream or step-ca")
	address := flag.String("address", "", "host:port")
	name := flag.String("name", "", "the name that the server's certificate has")
	roots := flag.String("roots", "", "file (PEM) with what to trust")
	file := flag.String("requests", "", "file of requests")
	connections := flag.Int("connections", 8, "how many connections ask at the same time")
	flights := flag.Int("in-flight", 1, "how many requests each connection has in progress")
	warm := flag.Int("warm", 0, "how many requests come before the clock starts")
	fresh := flag.Bool("fresh", false, "step-ca only: a new connection for each request")
	flag.Parse()
	if err := run(*kind, *address, *name, *roots, *file, *connections, *flights, *warm, *fresh); err != nil {
		fmt.Fprintln(os.Stderr, "loadgen:", err)
		os.Exit(1)
	}
}

func run(kind, address, name, roots, file string, connections, flights, warm int, fresh bool) error {
	requests, err := read(file)
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(roots)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	callers := make([]caller, connections)
	for i := range callers {
		config := &tls.Config{RootCAs: pool, ServerName: name}
		switch kind {
		case "step-ca":
			callers[i] = newStepCA(address, config, fresh)
		case "stream":
			callers[i] = newStream(address, config)
		default:
			callers[i] = newCertmount(address, config)
		}
		if err := callers[i].connect(); err != nil {
			return err
		}
	}
	if warm > len(requests) {
		return fmt.Errorf("%d requests are fewer than the %d to begin with", len(requests), warm)
	}
	of := share(requests, connections)
	problems := send(callers, flights, requests[:warm], of[:warm]).judge(callers[0])
	before := processor()
	sent := send(callers, flights, requests[warm:], of[warm:])
	used := processor() - before
	problems = append(problems, sent.judge(callers[0])...)
	slices.Sort(sent.took)
	return json.NewEncoder(os.Stdout).Encode(result{
		Answers: len(sent.answers), Seconds: sent.seconds, P50: at(sent.took, 0.50), P99: at(sent.took, 0.99),
		Processor: used, Problems: problems[:min(len(problems), 5)],
	})
}

// What came of a number of requests, in their order.
type outcome struct {
	requests []request
	answers  [][]byte
	errors   []error
	took     []float64
	seconds  float64
}

// send has each caller ask for the requests that are its own: of holds the number of the caller of each.
func send(callers []caller, flights int, requests []request, of []int) *outcome {
	count := len(requests)
	sent := &outcome{requests, make([][]byte, count), make([]error, count), make([]float64, count), 0}
	queues := make([][]int, len(callers))
	for i, part := range of {
		queues[part] = append(queues[part], i)
	}
	var all sync.WaitGroup
	started := time.Now()
	for i, one := range callers {
		queue, next := queues[i], new(atomic.Int64)
		for range flights {
			all.Go(func() {
				for n := int(next.Add(1)) - 1; n < len(queue); n = int(next.Add(1)) - 1 {
					i, asked := queue[n], time.Now()
					sent.answers[i], sent.errors[i] = one.call(requests[i])
					sent.took[i] = time.Since(asked).Seconds()
				}
			})
		}
	}
	all.Wait()
	sent.seconds = time.Since(started).Seconds()
	return sent
}

// share gives each request the number of a caller: those of one bearer belong together, because a stream belongs to one node.
func share(requests []request, parts int) []int {
	of, bearers := make([]int, len(requests)), map[string]int{}
	for i, one := range requests {
		of[i] = i % parts
		if one.bearer != "" {
			if _, known := bearers[one.bearer]; !known {
				bearers[one.bearer] = len(bearers) % parts
			}
			of[i] = bearers[one.bearer]
		}
	}
	return of
}

// judge tells of each answer that is not a certificate for the name that was asked for.
func (sent *outcome) judge(one caller) []string {
	problems := []string{}
	for i, asked := range sent.requests {
		if err := sent.errors[i]; err != nil {
			problems = append(problems, fmt.Sprintf("%s: %v", asked.name, err))
		} else if der, err := one.leaf(sent.answers[i]); err != nil {
			problems = append(problems, fmt.Sprintf("%s: %v", asked.name, err))
		} else if leaf, err := x509.ParseCertificate(der); err != nil {
			problems = append(problems, fmt.Sprintf("%s: %v", asked.name, err))
		} else if err := leaf.VerifyHostname(asked.name); err != nil {
			problems = append(problems, err.Error())
		}
	}
	return problems
}

// at is the smallest value that a share of all are not above (nearest rank).
func at(sorted []float64, share float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[max(0, int(float64(len(sorted))*share+0.999999)-1)]
}

// processor is the time that the threads of this program have run: getrusage(2).
func processor() float64 {
	var usage syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) != nil {
		return 0
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
}
