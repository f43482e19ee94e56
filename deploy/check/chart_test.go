package check

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"maps"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write deploy/kubernetes")

// cases are the values to render with: the examples in the chart's folder, by their names.
func cases(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(chartFolder, "ci", "*-values.yaml"))
	if err != nil || len(files) < 6 {
		t.Fatalf("%d files of values, err %v", len(files), err)
	}
	list := map[string]string{}
	for _, file := range files {
		list[strings.TrimSuffix(filepath.Base(file), "-values.yaml")] = read(t, file)
	}
	return list
}

// each runs a test for each of the cases.
func each(t *testing.T, test func(t *testing.T, o *objects)) {
	t.Helper()
	for name, values := range cases(t) {
		t.Run(name, func(t *testing.T) {
			texts, err := render(values)
			if err != nil {
				t.Fatal(err)
			}
			o := decode(t, documents(texts))
			for name, text := range texts {
				if strings.Contains(text, "<no value>") || strings.Contains(text, "%!") {
					t.Errorf("%s has values that are missing:\n%s", name, text)
				}
			}
			test(t, o)
		})
	}
}

// TestLint: helm lint has nothing to say, with any of the examples.
func TestLint(t *testing.T) {
	for name, values := range cases(t) {
		read, err := chartutil.ReadValues([]byte(values))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range lint.All(chartFolder, read, "default", true).Messages {
			if m.Severity > support.InfoSev {
				t.Errorf("%s: %s: %v", name, m.Path, m.Err)
			}
		}
	}
}

// TestSelectors: Services, budgets and policies select pods that exist, Services lead to ports that
// these have, and no two workloads select each other's pods.
func TestSelectors(t *testing.T) {
	each(t, func(t *testing.T, o *objects) {
		for _, w := range o.workloads() {
			if got := o.selected(w.selector); len(got) != 1 || got[0].name != w.name {
				t.Errorf("%s selects the pods of %d workloads", w.name, len(got))
			}
			if account := w.template.Spec.ServiceAccountName; o.accounts[account] == nil {
				t.Errorf("%s: there is no ServiceAccount %s", w.name, account)
			}
			for _, spread := range w.template.Spec.TopologySpreadConstraints {
				if spread.LabelSelector == nil || !has(w.template.Labels, spread.LabelSelector.MatchLabels) {
					t.Errorf("%s is spread by the labels of others", w.name)
				}
			}
		}
		for name, s := range o.services {
			pods := o.selected(s.Spec.Selector)
			if len(pods) != 1 {
				t.Errorf("Service %s selects the pods of %d workloads", name, len(pods))
				continue
			}
			for _, p := range s.Spec.Ports {
				if port(pods[0], p.TargetPort) == 0 {
					t.Errorf("Service %s: %s has no port %s", name, pods[0].name, p.TargetPort.String())
				}
			}
		}
		for name, s := range o.statefulSets {
			if governs := o.services[s.Spec.ServiceName]; governs == nil || governs.Spec.ClusterIP != core.ClusterIPNone ||
				!has(s.Spec.Template.Labels, governs.Spec.Selector) {
				t.Errorf("%s is governed by %q, which is not a headless Service of its pods", name, s.Spec.ServiceName)
			}
		}
		for name, b := range o.budgets {
			if len(o.selected(b.Spec.Selector.MatchLabels)) != 1 {
				t.Errorf("budget %s protects the pods of not exactly one workload", name)
			}
		}
		for name, m := range o.monitors {
			var found int
			for _, s := range o.services {
				if has(s.Labels, m.Spec.Selector.MatchLabels) {
					found++
					for _, e := range m.Spec.Endpoints {
						if !slices.ContainsFunc(s.Spec.Ports, func(p core.ServicePort) bool { return p.Name == e.Port }) {
							t.Errorf("ServiceMonitor %s: Service %s has no port %s", name, s.Name, e.Port)
						}
					}
				}
			}
			if found != 1 {
				t.Errorf("ServiceMonitor %s selects %d Services: each more would count everything again", name, found)
			}
		}
		for name, s := range o.scalers {
			if ref := s.Spec.ScaleTargetRef; ref.Kind != "StatefulSet" || o.statefulSets[ref.Name] == nil {
				t.Errorf("%s scales %s %s, which does not exist", name, ref.Kind, ref.Name)
			} else if o.statefulSets[ref.Name].Spec.Replicas != nil {
				t.Errorf("%s has replicas, which each upgrade would set again", ref.Name)
			}
		}
	})
}

// port returns the number of a port of a workload's pods, or 0.
func port(w workload, target intstr.IntOrString) int32 {
	for _, c := range w.containers() {
		for _, p := range c.Ports {
			if p.Name == target.StrVal && target.Type == intstr.String || target.Type == intstr.Int && p.ContainerPort == target.IntVal {
				return p.ContainerPort
			}
		}
	}
	return 0
}

// TestPods: all containers do without root, privileges and a writable image, mounts have volumes,
// and a pod has the time to stop that its containers take.
func TestPods(t *testing.T) {
	each(t, func(t *testing.T, o *objects) {
		for _, w := range o.workloads() {
			spec := w.template.Spec
			if p := spec.SecurityContext; p == nil || p.RunAsNonRoot == nil || !*p.RunAsNonRoot || p.RunAsUser == nil || *p.RunAsUser == 0 ||
				p.SeccompProfile == nil || p.FSGroup == nil {
				t.Errorf("%s may run as root, or cannot read its volumes: %+v", w.name, p)
			}
			if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
				t.Errorf("%s has a token for the API server, which it does not need", w.name)
			}
			// They begin like the proxy's own settings: OLLAMA_CACHEPROXY_….
			if spec.EnableServiceLinks == nil || *spec.EnableServiceLinks {
				t.Errorf("%s gets the variables of Services", w.name)
			}
			for _, c := range w.containers() {
				s := c.SecurityContext
				if s == nil || *s.AllowPrivilegeEscalation || *s.Privileged || !*s.ReadOnlyRootFilesystem ||
					!slices.Equal(s.Capabilities.Drop, []core.Capability{"ALL"}) || len(s.Capabilities.Add) > 0 {
					t.Errorf("%s, %s may do more than it needs: %+v", w.name, c.Name, s)
				}
				o.files(t, w, c, t.TempDir()) // fails for a mount without a volume
				for _, arg := range slices.Concat(c.Command, c.Args) {
					if left := expanded([]string{arg}, o.environment(t, c))[0]; strings.Contains(left, "$(") {
						t.Errorf("%s, %s: nothing sets a variable of %s", w.name, c.Name, left)
					}
				}
			}
			if w.container("proxy") != nil {
				stops(t, w)
			}
		}
	})
}

// stops checks the time that the pods of a proxy have to stop, and that Ollama is there until the
// proxy has ended.
func stops(t *testing.T, w workload) {
	t.Helper()
	proxy := w.container("proxy")
	var needs time.Duration
	for _, flag := range []string{"--drain-delay=", "--drain="} {
		i := slices.IndexFunc(proxy.Args, func(arg string) bool { return strings.HasPrefix(arg, flag) })
		if i < 0 {
			t.Fatalf("%s has no %s", w.name, flag)
		}
		d, err := time.ParseDuration(strings.TrimPrefix(proxy.Args[i], flag))
		if err != nil {
			t.Fatal(err)
		}
		needs += d
	}
	if has := time.Duration(*w.template.Spec.TerminationGracePeriodSeconds) * time.Second; has < needs+30*time.Second {
		t.Errorf("%s has %v to stop, of which the proxy takes up to %v", w.name, has, needs)
	}
	for _, c := range w.template.Spec.Containers {
		if c.Name == "ollama" {
			t.Errorf("%s: Ollama is told to stop together with the proxy, whose requests it still has", w.name)
		}
	}
	if c := w.container("ollama"); c != nil && (c.RestartPolicy == nil || *c.RestartPolicy != core.ContainerRestartPolicyAlways) {
		t.Errorf("%s: the pod waits for Ollama to end before it starts the proxy", w.name)
	}
}

// TestPolicies: only proxies reach the peers' port, Ollama and Valkey; requests and metrics arrive.
func TestPolicies(t *testing.T) {
	each(t, func(t *testing.T, o *objects) {
		if len(o.policies) == 0 {
			if !strings.Contains(t.Name(), "external") {
				t.Fatal("there are no policies")
			}
			return
		}
		for _, w := range o.workloads() {
			rules := o.ingress(t, w)
			for _, c := range w.containers() {
				for _, p := range c.Ports {
					from := openTo(w, rules, p.ContainerPort)
					if len(from) == 0 {
						t.Errorf("nobody reaches port %s of %s", p.Name, w.name)
					}
					for _, f := range from {
						if p.Name == "http" {
							continue
						}
						if f.PodSelector == nil || f.NamespaceSelector != nil || len(o.selected(f.PodSelector.MatchLabels)) != 1 ||
							o.selected(f.PodSelector.MatchLabels)[0].container("proxy") == nil {
							t.Errorf("port %s of %s is open to others than proxies: %+v", p.Name, w.name, f)
						}
					}
				}
			}
		}
	})
	// By default whoever reaches the pods is a client. If not, then Prometheus is let in all the same.
	texts, err := render("networkPolicy: {clients: [{podSelector: {matchLabels: {app: chat}}}]}")
	if err != nil {
		t.Fatal(err)
	}
	o := decode(t, documents(texts))
	w := o.workloads()[0]
	from := openTo(w, o.ingress(t, w), port(w, intstr.FromString("http")))
	if len(from) != 2 || from[0].PodSelector.MatchLabels["app"] != "chat" ||
		from[1].NamespaceSelector.MatchLabels["kubernetes.io/metadata.name"] != "monitoring" {
		t.Errorf("requests come from %+v", from)
	}
}

// ingress returns the rules for the pods of a workload, of which one policy must be in charge.
func (o *objects) ingress(t *testing.T, w workload) []networking.NetworkPolicyIngressRule {
	t.Helper()
	var rules []networking.NetworkPolicyIngressRule
	found := 0
	for _, p := range o.policies {
		if has(w.template.Labels, p.Spec.PodSelector.MatchLabels) {
			found++
			rules = p.Spec.Ingress
		}
	}
	if found != 1 {
		t.Errorf("%d policies are for %s", found, w.name)
	}
	return rules
}

// openTo returns from where a port can be reached; an empty peer means from everywhere.
func openTo(w workload, rules []networking.NetworkPolicyIngressRule, number int32) []networking.NetworkPolicyPeer {
	var from []networking.NetworkPolicyPeer
	for _, r := range rules {
		all := len(r.Ports) == 0
		for _, p := range r.Ports {
			all = all || p.Port == nil || port(w, *p.Port) == number
		}
		switch {
		case !all:
		case len(r.From) == 0:
			from = append(from, networking.NetworkPolicyPeer{})
		default:
			from = append(from, r.From...)
		}
	}
	return from
}

// program builds the proxy, once.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "ollama-cacheproxy-check-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "ollama-cacheproxy")
	cmd := exec.Command("go", "build", "-o", path, "./cmd/ollama-cacheproxy")
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", errors.Join(err, errors.New(string(out)), os.RemoveAll(dir))
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if path, err := program(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// TestArguments: the proxy accepts the arguments, variables and files of its container, and those
// of the containers that prepare Ollama name verbs that exist.
func TestArguments(t *testing.T) {
	binary, err := program()
	if err != nil {
		t.Fatal(err)
	}
	each(t, func(t *testing.T, o *objects) {
		found := false
		for _, w := range o.workloads() {
			for _, c := range w.containers() {
				line := slices.Concat(c.Command, c.Args)
				if c.Name == "link" {
					line = line[1:] // the program's name
				}
				switch c.Name {
				case "proxy":
					found = true
					o.accepted(t, binary, w, c)
				case "program", "link":
					if out, err := exec.Command(binary, append(slices.Clone(line), "--help")...).CombinedOutput(); err != nil {
						t.Errorf("%s, %s: %v: %v\n%s", w.name, c.Name, line, err, out)
					}
				}
			}
		}
		if !found {
			t.Error("there is no proxy")
		}
	})
}

// accepted runs --check with the arguments of a proxy's container. It may miss Ollama (status 1),
// but not refuse a setting (status 2).
func (o *objects) accepted(t *testing.T, binary string, w workload, c core.Container) {
	t.Helper()
	folder := t.TempDir()
	env := o.environment(t, c)
	args := expanded(c.Args, env)
	for path, place := range o.files(t, w, c, folder) {
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "="+path, "="+place)
		}
	}
	cmd := exec.Command(binary, append(args, "--check", "--listen=127.0.0.1:0", "--try-duration=0s")...)
	cmd.Env = append(os.Environ(), "HOME="+folder)
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	out, err := cmd.CombinedOutput()
	if status := cmd.ProcessState.ExitCode(); err != nil && status != 1 {
		t.Errorf("%s: status %d from %q:\n%s", w.name, status, cmd.Args[1:], out)
	}
	if !strings.Contains(string(out), "all settings, and where each comes from") {
		t.Errorf("%s was not checked:\n%s", w.name, out)
	}
	for name := range env {
		if strings.HasPrefix(name, "OLLAMA_CACHEPROXY_") && !strings.Contains(string(out), name) {
			t.Errorf("%s: there is no setting %s", w.name, name)
		}
	}
	// What a probe asks for exists: it is among the pages of the proxy.
	for _, p := range []*core.Probe{c.ReadinessProbe, c.LivenessProbe} {
		if p == nil || p.HTTPGet == nil {
			t.Errorf("%s is not asked whether it is well", w.name)
			continue
		}
		if https := slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "--tls-cert=") }); https != (p.HTTPGet.Scheme == "HTTPS") {
			t.Errorf("%s is asked over %s", w.name, p.HTTPGet.Scheme)
		}
		if port(w, p.HTTPGet.Port) != 11435 || !slices.Contains(args, "--listen=:11435") {
			t.Errorf("%s is asked on port %s", w.name, p.HTTPGet.Port.String())
		}
	}
	if c.ReadinessProbe.HTTPGet.Path != "/_cacheproxy/ready" || c.LivenessProbe.HTTPGet.Path != "/_cacheproxy/health" {
		t.Errorf("%s is asked for %s and %s", w.name, c.ReadinessProbe.HTTPGet.Path, c.LivenessProbe.HTTPGet.Path)
	}
	if port(w, intstr.FromString("peer")) != 11436 || !slices.Contains(args, "--peer-listen=:11436") {
		t.Errorf("%s listens to peers somewhere else", w.name)
	}
	// Peers and Ollama servers are found under names of Services, on ports that these have.
	for _, arg := range args {
		_, spec, ok := strings.Cut(arg, "=dns:ollama-cacheproxy")
		if !ok {
			continue
		}
		name, number, _ := strings.Cut("ollama-cacheproxy"+spec, ":")
		s := o.services[name]
		if s == nil || s.Spec.ClusterIP != core.ClusterIPNone || len(s.Spec.Ports) != 1 || s.Spec.Ports[0].TargetPort.StrVal == "" ||
			strconv.Itoa(int(s.Spec.Ports[0].Port)) != number || port(o.selected(s.Spec.Selector)[0], s.Spec.Ports[0].TargetPort) != s.Spec.Ports[0].Port {
			t.Errorf("%s: %s is not the address of a headless Service", w.name, arg)
		}
	}
}

// foreign returns the content of a Secret that is not the chart's: everything that one could have.
func foreign(t *testing.T) map[string][]byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	about := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cacheproxy"}, DNSNames: []string{"cacheproxy"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, about, about, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pemCert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})
	return map[string][]byte{
		"tls.crt": pemCert, "ca.crt": pemCert, "tls.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}),
		"secret": []byte(strings.Repeat("s", 48)), "keys": []byte("alice sk-1\n"),
	}
}

// TestRefused: values that cannot work are refused, and what is said names the right one.
func TestRefused(t *testing.T) {
	for values, want := range map[string]string{
		"mode: sidecars":              "mode",
		"replicas: 3":                 "replicas",
		"config: {listen: 0.0.0.0:1}": "config.listen: the chart sets this itself",
		"{mode: edge, edge: {upstreams: [\"10.0.0.7\"]}}":     "upstreams",
		"config: {api-keys: [{name: a, key: b}]}":             "use apiKeys.keys",
		"config: {answers-store: \"redis://:a@h\"}":           "in a ConfigMap",
		"ollama: {env: {OLLAMA_HOST: \"0.0.0.0\"}}":           "ollama.env.OLLAMA_HOST",
		"ollama: {enabled: false}":                            "mode sidecar is a proxy beside each Ollama",
		"{mode: edge, ollama: {enabled: false}}":              "there is no Ollama",
		"edge: {upstreams: [a=b]}":                            "edge.upstreams is for mode edge",
		"{valkey: {enabled: true}, shared: {url: redis://h}}": "choose one of them",
		"shared: {url: h}":                                    "url",
		"contexts: {bytes: 20GiB}":                            "bytes",
		"ollama: {pull: [\"a'; rm -rf /\"]}":                  "pull",
		"{mode: edge, ollama: {enabled: false}, edge: {upstreams: [a=b]}, autoscaling: {enabled: true}}": "autoscaling is of the Ollama servers",
	} {
		if _, err := render(values); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want something about %q", values, err, want)
		}
	}
}

// TestShared: what is shared lies where Valkey is, and the password is the same on both sides.
func TestShared(t *testing.T) {
	texts, err := render("valkey: {enabled: true}")
	if err != nil {
		t.Fatal(err)
	}
	o := decode(t, documents(texts))
	valkey, proxy := *o.selected(o.services["ollama-cacheproxy-valkey"].Spec.Selector)[0].container("valkey"),
		*o.selected(o.services["ollama-cacheproxy"].Spec.Selector)[0].container("proxy")
	password, url := o.environment(t, valkey)["VALKEY_PASSWORD"], o.environment(t, proxy)["OLLAMA_CACHEPROXY_SHARED"]
	if want := "valkey://:" + password + "@ollama-cacheproxy-valkey:6379/0"; len(password) < 32 || url != want {
		t.Errorf("shared is %s, want %s", url, want)
	}
}

// TestSecretsKept: an upgrade keeps the secrets that the installation has made up, and another
// installation has others.
func TestSecretsKept(t *testing.T) {
	const values = "valkey: {enabled: true}"
	first, err := render(values)
	if err != nil {
		t.Fatal(err)
	}
	installed := decode(t, documents(first)).secrets
	upgraded, err := renderOver(installed, values)
	if err != nil {
		t.Fatal(err)
	}
	other, err := render(values)
	if err != nil {
		t.Fatal(err)
	}
	again, others := decode(t, documents(upgraded)).secrets, decode(t, documents(other)).secrets
	for name, entries := range map[string][]string{
		"ollama-cacheproxy-peers": {"secret"}, "ollama-cacheproxy-shared": {"password", "url"},
	} {
		for _, entry := range entries {
			before := string(installed[name].Data[entry])
			if len(before) < 32 || string(again[name].Data[entry]) != before || string(others[name].Data[entry]) == before {
				t.Errorf("%s, %s: %q, after an upgrade %q, in another installation %q", name, entry,
					before, again[name].Data[entry], others[name].Data[entry])
			}
		}
	}
}

// TestScaledBy: the metric that says when more servers are needed exists.
func TestScaledBy(t *testing.T) {
	docs := read(t, "../../docs/metrics.md")
	found := 0
	each(t, func(t *testing.T, o *objects) {
		for _, s := range o.scalers {
			for _, m := range s.Spec.Metrics {
				name := ""
				if m.Pods != nil {
					name = m.Pods.Metric.Name
				} else if m.External != nil {
					name = m.External.Metric.Name
				}
				found++
				if short, ok := strings.CutPrefix(name, "ollama_cacheproxy_"); !ok || !strings.Contains(docs, "`"+short+"`") {
					t.Errorf("docs/metrics.md has no %q", name)
				}
			}
		}
	})
	if found < 2 {
		t.Errorf("%d metrics were looked at", found)
	}
}

// TestValuesTable: the chart's README explains every value.
func TestValuesTable(t *testing.T) {
	values, err := chartutil.ReadValues([]byte(read(t, filepath.Join(chartFolder, "values.yaml"))))
	if err != nil {
		t.Fatal(err)
	}
	readme := read(t, filepath.Join(chartFolder, "README.md"))
	for _, name := range slices.Sorted(maps.Keys(flat("", values))) {
		if !strings.Contains(readme, "`"+name+"`") {
			t.Errorf("README.md does not explain %s", name)
		}
	}
}

// flat returns the names of values: a map is looked into unless it is free in its content.
func flat(prefix string, values map[string]any) map[string]bool {
	names := map[string]bool{}
	free := []string{"resources", "podSecurityContext", "securityContext", "image"}
	for name, value := range values {
		if below, ok := value.(map[string]any); ok && len(below) > 0 && !slices.Contains(free, name) {
			maps.Copy(names, flat(prefix+name+".", below))
			continue
		}
		names[prefix+name] = true
	}
	return names
}

// TestManifests: deploy/kubernetes is what the chart renders to by default.
func TestManifests(t *testing.T) {
	const file = "../kubernetes/ollama-cacheproxy.yaml"
	texts, err := render("peers: {existingSecret: ollama-cacheproxy-peers}")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	b.WriteString("# Written by \"make manifests\" from the Helm chart's default values; see README.md.\n")
	for _, doc := range documents(texts) {
		var kept []string
		for line := range strings.SplitSeq(doc, "\n") {
			if !strings.Contains(line, "helm.sh/chart:") && !strings.Contains(line, "managed-by:") && strings.TrimSpace(line) != "" {
				kept = append(kept, line)
			}
		}
		b.WriteString("---\n" + strings.Join(kept, "\n") + "\n")
	}
	want := b.String()
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, file); got != want {
		t.Errorf("%s is not what the chart renders to: run make manifests", file)
	}
	decode(t, strings.Split(strings.TrimSpace(want), "\n---\n")[1:])
}

// TestFleetOfCompose: the proxies of deploy/compose/fleet.yaml accept their commands and variables,
// and their peers are addresses at which one of them listens.
func TestFleetOfCompose(t *testing.T) {
	binary, err := program()
	if err != nil {
		t.Fatal(err)
	}
	var project struct {
		Services map[string]struct {
			Image       string
			Command     []string
			Environment map[string]string
			NetworkMode string `json:"network_mode"`
		}
	}
	if err := yaml.Unmarshal([]byte(read(t, "../compose/fleet.yaml")), &project); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(t.TempDir(), "peers")
	if err := os.WriteFile(secret, foreign(t)["secret"], 0o600); err != nil {
		t.Fatal(err)
	}
	proxies := 0
	for name, s := range project.Services {
		if s.Image != "ollama-cacheproxy" {
			continue
		}
		proxies++
		cmd := exec.Command(binary, append(slices.Clone(s.Command), "--check", "--try-duration=0s", "--listen=127.0.0.1:0")...)
		for variable, value := range s.Environment {
			cmd.Env = append(cmd.Env, variable+"="+strings.ReplaceAll(value, "/run/secrets/peers", secret))
		}
		for i := range cmd.Args {
			if cmd.Args[i] == "/linked" {
				cmd.Args[i] = t.TempDir()
			}
		}
		out, err := cmd.CombinedOutput()
		if status := cmd.ProcessState.ExitCode(); err != nil && status != 1 || !strings.Contains(string(out), "all settings, and where each comes from") {
			t.Errorf("%s: status %d:\n%s", name, status, out)
		}
		for variable := range s.Environment {
			if !strings.Contains(string(out), variable) && variable != "OLLAMA_CACHEPROXY_LISTEN" { // overridden above
				t.Errorf("%s: there is no setting %s", name, variable)
			}
		}
		host := name
		if beside, ok := strings.CutPrefix(s.NetworkMode, "service:"); ok {
			host = beside
		}
		for _, other := range project.Services {
			if other.Image == s.Image && !slices.Contains(strings.Split(other.Environment["OLLAMA_CACHEPROXY_PEERS"], ","), "dns:"+host+s.Environment["OLLAMA_CACHEPROXY_PEER_LISTEN"]) {
				t.Errorf("not all proxies know %s", name)
			}
		}
	}
	if proxies != 3 {
		t.Errorf("there are %d proxies", proxies)
	}
}
