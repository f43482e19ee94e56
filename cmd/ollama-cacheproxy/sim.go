package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/ollamasim"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/upstream"
)

// simModel is the default name of a simulated server's model. It labels figures by model as
// simulated.
const simModel = "simulated"

// parseTarget reads [NAME=]ADDR or [NAME=]sim:[?OPTIONS]; sim is nil for an address.
func parseTarget(s string) (name string, u *url.URL, sim *ollamasim.Server, err error) {
	name, addr, err := upstream.CutName(s)
	options, ok := strings.CutPrefix(strings.TrimSpace(addr), "sim:")
	if err != nil || !ok || options != "" && options[0] != '?' { // sim:11434 is a machine called sim
		name, u, err = upstream.ParseNamed(s, upstream.DefaultPort)
		return name, u, nil, err
	}
	if sim, err = parseSim(strings.TrimPrefix(options, "?")); err != nil {
		return "", nil, nil, fmt.Errorf("%q: %w", addr, err)
	}
	return name, nil, sim, nil
}

// parseSim reads the options of sim:, in the form of a URL's query.
func parseSim(options string) (*ollamasim.Server, error) {
	values, err := url.ParseQuery(options)
	if err != nil {
		return nil, err
	}
	models := []string{simModel}
	var config ollamasim.Config
	for option, v := range values {
		last := v[len(v)-1]
		switch option {
		case "model":
			models = v
		case "version":
			config.Version = last
		case "slots":
			if config.Parallel, err = strconv.Atoi(last); err != nil || config.Parallel < 1 || config.Parallel > 1024 {
				return nil, errors.New("slots: want a number from 1 to 1024")
			}
		default:
			return nil, fmt.Errorf("there is no option %q: want model=NAME (repeatable), slots=N or version=0.34.1", option)
		}
	}
	for _, name := range models {
		if upstream.ModelKey(name) == "" {
			return nil, fmt.Errorf("model=%s is not a model name", name)
		}
		config.Models = append(config.Models, ollamasim.Model{Name: name, LoadTime: 2 * time.Second})
	}
	return ollamasim.New(config)
}

// simulate starts the simulated servers among the targets, on loopback, and sets their URLs.
func simulate(targets []target, logger *slog.Logger) (stop func(), err error) {
	var servers []*http.Server
	var wg sync.WaitGroup
	stop = func() {
		for _, srv := range servers {
			srv.Close()
		}
		wg.Wait()
	}
	for i := range targets {
		t := &targets[i]
		if t.sim == nil {
			continue
		}
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			stop()
			return nil, fmt.Errorf("listening for the simulated upstream %s: %w", t.name, err)
		}
		t.url = &url.URL{Scheme: "http", Host: ln.Addr().String()}
		srv := &http.Server{Handler: t.sim, ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelError)}
		servers = append(servers, srv)
		wg.Go(func() { srv.Serve(ln) }) // ends with stop
		logger.Warn("this upstream is simulated: its answers, and all figures of it, are made up", "upstream", t.name, "url", t.url.String(), "version", t.sim.Version())
	}
	return stop, nil
}
