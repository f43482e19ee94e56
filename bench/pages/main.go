// Command pages measures what open pages cost a running proxy: its processor time and memory
// without any, and with a hundred, by its own /metrics.
//
//	go run ./bench/pages --url http://127.0.0.1:11435 --pages 100 --for 30s
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

func main() {
	url := flag.String("url", "http://127.0.0.1:11435", "the proxy")
	pages := flag.Int("pages", 100, "how many pages to open")
	lasts := flag.Duration("for", 30*time.Second, "how long to measure, without pages and with them")
	flag.Parse()
	if err := run(*url, *pages, *lasts); err != nil {
		fmt.Fprintln(os.Stderr, "pages:", err)
		os.Exit(1)
	}
}

// state is what a process has used so far.
type state struct {
	at       time.Time
	cpu      float64 // seconds
	resident float64 // bytes
	requests float64 // finished requests to models
}

func run(url string, pages int, lasts time.Duration) error {
	alone, err := measure(url, lasts)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var wg sync.WaitGroup
	var sent atomic.Int64
	transport := &http.Transport{}
	for range pages {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/_cacheproxy/events", nil)
		if err != nil {
			return err
		}
		res, err := transport.RoundTrip(req)
		if err != nil {
			return err
		}
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("a page was refused: %s", res.Status)
		}
		wg.Go(func() { // ends with ctx
			defer res.Body.Close()
			buf := make([]byte, 32<<10)
			for {
				n, err := res.Body.Read(buf)
				sent.Add(int64(n))
				if err != nil {
					return
				}
			}
		})
	}
	time.Sleep(2 * time.Second) // until each has its first event
	opened := sent.Swap(0)
	looked, err := measure(url, lasts)
	stop()
	wg.Wait()
	if err != nil {
		return err
	}
	fmt.Printf("%-28s%12s%12s\n", "", "no page", fmt.Sprint(pages, " pages"))
	fmt.Printf("%-28s%12.2f%12.2f\n", "% of a core", alone.share(), looked.share())
	fmt.Printf("%-28s%12.1f%12.1f\n", "resident, MB", alone.end.resident/1e6, looked.end.resident/1e6)
	fmt.Printf("%-28s%12.1f%12.1f\n", "requests a second", alone.rate(), looked.rate())
	fmt.Printf("%-28s%12s%12.1f\n", "KB sent to open a page", "", float64(opened)/float64(pages)/1e3)
	fmt.Printf("%-28s%12s%12.1f\n", "KB a second and page", "", float64(sent.Load())/float64(pages)/1e3/lasts.Seconds())
	return nil
}

// span is what a process has used over some time.
type span struct{ begin, end state }

func (s span) share() float64 {
	return 100 * (s.end.cpu - s.begin.cpu) / s.end.at.Sub(s.begin.at).Seconds()
}

func (s span) rate() float64 {
	return (s.end.requests - s.begin.requests) / s.end.at.Sub(s.begin.at).Seconds()
}

func measure(url string, lasts time.Duration) (s span, err error) {
	if s.begin, err = look(url); err == nil {
		time.Sleep(lasts)
		s.end, err = look(url)
	}
	return s, err
}

// look reads the process's own metrics.
func look(url string) (state, error) {
	res, err := http.Get(url + "/metrics")
	if err != nil {
		return state{}, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return state{}, fmt.Errorf("%s/metrics: %s", url, res.Status)
	}
	s := state{at: time.Now()}
	lines := bufio.NewScanner(io.LimitReader(res.Body, 16<<20))
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		var n float64
		if _, err := fmt.Sscan(value, &n); err != nil {
			continue // a comment, or a label that contains a blank
		}
		switch {
		case name == "process_cpu_seconds_total":
			s.cpu = n
		case name == "process_resident_memory_bytes":
			s.resident = n
		case strings.HasPrefix(name, `ollama_cacheproxy_requests_total{endpoint="/api/chat"`), strings.HasPrefix(name, `ollama_cacheproxy_requests_total{endpoint="/v1/chat`):
			s.requests += n
		}
	}
	return s, lines.Err()
}
