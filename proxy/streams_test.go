package proxy

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/schedule"
)

// memoryOf returns the bytes of heap and stacks in use.
func memoryOf() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // once more for pooled memory
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// streamsThrough opens n streams at addr, each of which has passed on what an upstream wrote, and
// returns the memory that each takes in this process, in bytes. Clients and upstreams are bare
// connections, which take almost none.
func streamsThrough(t *testing.T, addr string, upstream *net.TCPListener, n int) int64 {
	t.Helper()
	request := rawPost("/api/chat", chatWith("You are a judge of candidates.", strings.Repeat("Tell me more of that. ", 400), ""))
	chunk := strings.Repeat(`{"model":"m","message":{"role":"assistant","content":"token"},"done":false}`+"\n", 400)
	reply := "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n" + fmt.Sprintf("%x\r\n%s\r\n", len(chunk), chunk)
	buf := make([]byte, 256<<10)
	await := func(c net.Conn, what string) {
		t.Helper()
		c.SetReadDeadline(time.Now().Add(patience))
		for got := ""; !strings.Contains(got, what); {
			k, err := c.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			got = got[max(0, len(got)-len(what)):] + string(buf[:k])
		}
	}
	before := memoryOf()
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for range n {
		client, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, client)
		if _, err := io.WriteString(client, request); err != nil {
			t.Fatal(err)
		}
		upstream.SetDeadline(time.Now().Add(patience))
		up, err := upstream.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, up)
		await(up, request[len(request)-100:])
		if _, err := io.WriteString(up, reply); err != nil {
			t.Fatal(err)
		}
		await(client, chunk[len(chunk)-20:])
	}
	return (memoryOf() - before) / int64(n)
}

// TestStreamMemory: a stream that has been used takes at most 100 KiB. It is measured in another
// process, in which OLLAMA_CACHEPROXY_STREAMS is the number of streams; each takes four descriptors
// there.
func TestStreamMemory(t *testing.T) {
	const streams = "OLLAMA_CACHEPROXY_STREAMS"
	n, err := strconv.Atoi(os.Getenv(streams))
	if err != nil {
		cmd := exec.Command(os.Args[0], "-test.run=^TestStreamMemory$", "-test.v")
		cmd.Env = append(os.Environ(), streams+"=200")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	f := newFake(t, nil)
	bare := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(pr *httputil.ProxyRequest) { pr.SetURL(f.URL) }, Transport: &http.Transport{}, FlushInterval: -1, ErrorLog: log.New(io.Discard, "", 0)})
	defer bare.Close()
	theirs := streamsThrough(t, bare.Listener.Addr().String(), f.ln, n)
	rg := newRig(t, f.URL, &Handler{KeepAlive: keep(t, "", "24h"), Lanes: schedule.NewScheduler(schedule.Config{Lanes: schedule.Unlimited}), Memory: MemoryLeast, BodyTimeout: time.Minute})
	ours := streamsThrough(t, rg.srv.Listener.Addr().String(), f.ln, n)
	t.Logf("%d streams: %d KiB each, of a bare ReverseProxy %d", n, ours>>10, theirs>>10)
	if ours > 100<<10 {
		t.Errorf("a stream takes %d KiB, of a bare ReverseProxy %d", ours>>10, theirs>>10)
	}
}
