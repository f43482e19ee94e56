//go:build linux

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/bench/play"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/debian"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/proxyprocess"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/valkeyserver"
)

// peers is how many proxies a fleet has.
const peers = 3

// way is something that is put in front of the servers.
type way struct {
	name, label string
	ours        bool
	front       play.Front
}

func wayNames() []string { return []string{"one", "three", "valkey", "nginx", "herd"} }

// fronts starts what is in front of the servers.
type fronts struct{ dir, binary string }

// choose returns the ways with these names, in this order.
func (f *fronts) choose(ctx context.Context, names string) ([]way, error) {
	var chosen []way
	for _, name := range strings.Split(names, ",") {
		w := way{name: name}
		switch name {
		case "one":
			w.label, w.front, w.ours = "one proxy", f.proxies(1, false), true
		case "three":
			w.label, w.front, w.ours = fmt.Sprintf("%d proxies", peers), f.proxies(peers, false), true
		case "valkey":
			w.label, w.front, w.ours = fmt.Sprintf("%d proxies and Valkey", peers), f.proxies(peers, true), true
		case "nginx":
			bin, err := debian.Nginx(ctx)
			if err != nil {
				return nil, err
			}
			out, err := exec.CommandContext(ctx, bin, "-v").CombinedOutput()
			if err != nil {
				return nil, fmt.Errorf("asking nginx for its version: %w", err)
			}
			_, version, _ := strings.Cut(strings.TrimSpace(string(out)), "nginx/")
			w.label, w.front = "nginx "+version+", consistent hash of the prompt's beginning", f.nginx(bin)
		case "herd":
			cache, err := realollama.OpenCache(os.Stderr)
			if err != nil {
				return nil, err
			}
			python, err := cache.PythonEnv(ctx, "herd", herdPackages, 150)
			if err != nil {
				return nil, err
			}
			w.label, w.front = strings.Replace(strings.TrimSpace(herdPackages), "==", " ", 1), f.herd(python)
		default:
			return nil, fmt.Errorf("there is no way %q: choose of %s", name, strings.Join(wayNames(), ","))
		}
		chosen = append(chosen, w)
	}
	return chosen, nil
}

// proxies starts n proxies that have all servers as upstreams.
func (f *fronts) proxies(n int, shared bool) play.Front {
	return func(ctx context.Context, servers []*realollama.Server, _ int) (urls []string, stop func() error, err error) {
		var s stopping
		defer func() {
			if err != nil {
				err = errors.Join(err, s.stop())
			}
		}()
		upstream, flags := play.UpstreamFlags(servers)
		if shared {
			url, err := f.valkey(ctx, &s)
			if err != nil {
				return nil, nil, err
			}
			flags = append(flags, "--shared", url)
		}
		ports, err := freePorts(n)
		if err != nil {
			return nil, nil, err
		}
		secret := filepath.Join(f.dir, "secret")
		if err := os.WriteFile(secret, []byte(rand.Text()), 0o600); err != nil {
			return nil, nil, err
		}
		for i := range n {
			own := flags[:len(flags):len(flags)]
			if n > 1 {
				own = append(own, "--peer-secret-file", secret, "--peer-listen", loopback(ports[i]))
			}
			for k, port := range ports {
				if k != i {
					own = append(own, "--peers", loopback(port))
				}
			}
			p, err := proxyprocess.Start(ctx, f.binary, upstream, own...)
			if err != nil {
				return nil, nil, err
			}
			s.add(p.Stop)
			urls = append(urls, p.URL)
		}
		for _, url := range urls {
			if n == 1 {
				break
			}
			if _, err := proxyprocess.Joined(ctx, url, n-1); err != nil {
				return nil, nil, err
			}
		}
		return urls, s.stop, nil
	}
}

func (f *fronts) valkey(ctx context.Context, s *stopping) (url string, err error) {
	path, env, err := valkeyserver.Program(ctx)
	if err != nil {
		return "", err
	}
	ports, err := freePorts(1)
	if err != nil {
		return "", err
	}
	c := child{name: "Valkey", path: path, env: env, ports: ports, args: []string{
		"--port", fmt.Sprint(ports[0]), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", f.dir,
	}}
	return "valkey://" + loopback(ports[0]), c.start(ctx, s)
}

// nginxConf is what nginx can do for prompts: requests whose bodies begin alike go to one server.
// The hash needs the whole body in memory. Clients that wait long for a slot must not time out.
const nginxConf = `
daemon off;
master_process off;
user root root;
pid %[1]s/nginx.pid;
error_log stderr;
events { worker_connections 4096; }
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	client_max_body_size 100m;
	client_body_buffer_size 1m;
	map $request_body $opening {
		default $request_body;
		"~^(?<beginning>.{512})" $beginning;
	}
	upstream ollama {
		hash $opening consistent;
%[3]s		keepalive 32;
	}
	server {
		listen %[2]s;
		location / {
			proxy_pass http://ollama;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_set_header Host localhost:11434;
			proxy_buffering off;
			proxy_read_timeout 1h;
		}
	}
}
`

func (f *fronts) nginx(bin string) play.Front {
	return func(ctx context.Context, servers []*realollama.Server, _ int) ([]string, func() error, error) {
		ports, err := freePorts(1)
		if err != nil {
			return nil, nil, err
		}
		var upstreams strings.Builder
		for _, s := range servers {
			fmt.Fprintf(&upstreams, "\t\tserver %s;\n", s.Addr())
		}
		conf := filepath.Join(f.dir, "nginx.conf")
		if err := os.WriteFile(conf, fmt.Appendf(nil, nginxConf, f.dir, loopback(ports[0]), upstreams.String()), 0o600); err != nil {
			return nil, nil, err
		}
		var s stopping
		c := child{name: "nginx", path: bin, args: []string{"-p", f.dir, "-c", conf, "-e", "stderr"}, ports: ports}
		if err := c.start(ctx, &s); err != nil {
			return nil, nil, err
		}
		return []string{"http://" + loopback(ports[0])}, s.stop, nil
	}
}

// herd starts ollama-herd's router, and a node agent for each server, with their defaults.
func (f *fronts) herd(python string) play.Front {
	return func(ctx context.Context, servers []*realollama.Server, _ int) (urls []string, stop func() error, err error) {
		var s stopping
		defer func() {
			if err != nil {
				err = errors.Join(err, s.stop())
			}
		}()
		ports, err := freePorts(1)
		if err != nil {
			return nil, nil, err
		}
		home, err := os.MkdirTemp(f.dir, "herd-")
		if err != nil {
			return nil, nil, err
		}
		env := []string{"HOME=" + home, "FLEET_NODE_TELEMETRY=false"}
		router := child{name: "herd", path: python, env: env, ports: ports, args: []string{
			"-m", "fleet_manager.cli.server_cli", "--host", "127.0.0.1", "--port", fmt.Sprint(ports[0]),
		}}
		if err := router.start(ctx, &s); err != nil {
			return nil, nil, err
		}
		url := "http://" + loopback(ports[0])
		for i, server := range servers {
			node := child{name: "herd-node", path: python, env: env, args: []string{
				"-m", "fleet_manager.cli.node_cli", "--node-id", play.ServerName(i), "--ollama-host", server.URL(), "--router-url", url,
			}}
			if err := node.start(ctx, &s); err != nil {
				return nil, nil, err
			}
		}
		return []string{url}, s.stop, herdSees(ctx, url, len(servers))
	}
}
