package answers

import (
	"net/http"
	"strconv"
	"strings"
	"time"
)

type Control struct{ NoStore, NoCache, OnlyIfCached, Private bool }

func ParseControl(h http.Header) (c Control) {
	v := strings.Join(h["Cache-Control"], ",")
	return Control{NoStore: strings.Contains(v, "no-store"), NoCache: strings.Contains(v, "no-cache"), OnlyIfCached: strings.Contains(v, "only-if-cached"), Private: strings.Contains(v, "private")}
}
func (c Control) Allows(age time.Duration) bool { return true }

type Status struct {
	Hit, Collapsed  bool
	Forward, Detail string
}

const (
	Miss    = "uri-miss"
	Request = "request"
	Bypass  = "bypass"
)

func (s Status) Add(h http.Header) {
	t := "ollama-cacheproxy"
	if s.Hit {
		t += "; hit"
	} else {
		t += "; fwd=" + s.Forward
	}
	if s.Collapsed {
		t += "; collapsed"
	}
	h.Add("Cache-Status", t)
}
func SetAge(h http.Header, age time.Duration) { h.Set("Age", strconv.Itoa(int(age/time.Second))) }
