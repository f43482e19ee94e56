package check

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	apps "k8s.io/api/apps/v1"
	autoscaling "k8s.io/api/autoscaling/v2"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	policy "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

const chartFolder = "../helm/ollama-cacheproxy"

// objects are what a chart renders to, by kind and name.
type objects struct {
	accounts     map[string]*core.ServiceAccount
	configs      map[string]*core.ConfigMap
	secrets      map[string]*core.Secret
	services     map[string]*core.Service
	statefulSets map[string]*apps.StatefulSet
	deployments  map[string]*apps.Deployment
	budgets      map[string]*policy.PodDisruptionBudget
	policies     map[string]*networking.NetworkPolicy
	monitors     map[string]*monitoring.ServiceMonitor
	scalers      map[string]*autoscaling.HorizontalPodAutoscaler
}

// render renders the chart with values in YAML, each of which overrides what is before it. It
// returns the texts of the templates by their names.
func render(values ...string) (map[string]string, error) { return renderOver(nil, values...) }

// renderOver renders as render does, for an upgrade in a cluster that has these Secrets.
func renderOver(present map[string]*core.Secret, values ...string) (map[string]string, error) {
	chart, err := loader.Load(chartFolder)
	if err != nil {
		return nil, err
	}
	all := map[string]any{}
	for _, text := range values {
		more, err := chartutil.ReadValues([]byte(text))
		if err != nil {
			return nil, err
		}
		all = chartutil.CoalesceTables(more, all)
	}
	release := chartutil.ReleaseOptions{Name: "ollama-cacheproxy", Namespace: "default", IsInstall: true, Revision: 1}
	if err := chartutil.ProcessDependencies(chart, all); err != nil {
		return nil, err
	}
	top, err := chartutil.ToRenderValues(chart, all, release, chartutil.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	return engine.RenderWithClientProvider(chart, top, cluster(present))
}

// cluster has Secrets, and nothing else.
type cluster map[string]*core.Secret

// GetClientFor implements engine.ClientProvider.
func (c cluster) GetClientFor(apiVersion, kind string) (dynamic.NamespaceableResourceInterface, bool, error) {
	var list []runtime.Object
	for _, s := range c {
		s = s.DeepCopy()
		s.Namespace = "default"
		list = append(list, s)
	}
	if apiVersion != "v1" || kind != "Secret" {
		return nil, false, fmt.Errorf("the chart looks for %s %s, which no test knows", apiVersion, kind)
	}
	return fake.NewSimpleDynamicClient(scheme.Scheme, list...).Resource(core.SchemeGroupVersion.WithResource("secrets")), true, nil
}

// documents returns the YAML documents of rendered templates, in the order in which Helm installs
// what they describe: kinds in Helm's order would say more than anybody needs, so it is by template.
func documents(texts map[string]string) []string {
	var docs []string
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		if path.Ext(name) != ".yaml" {
			continue
		}
		for doc := range strings.SplitSeq("\n"+texts[name], "\n---\n") {
			if doc = strings.TrimSpace(doc); doc != "" {
				docs = append(docs, doc)
			}
		}
	}
	return docs
}

// decode reads documents as the API server would if it refused what it does not know.
func decode(t *testing.T, docs []string) *objects {
	t.Helper()
	o := &objects{}
	for _, doc := range docs {
		var head struct {
			APIVersion, Kind string
			Metadata         struct{ Name string }
		}
		if err := yaml.Unmarshal([]byte(doc), &head); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		into := map[string]func(string) error{
			"v1 ServiceAccount":                       strictly(&o.accounts, head.Metadata.Name),
			"v1 ConfigMap":                            strictly(&o.configs, head.Metadata.Name),
			"v1 Secret":                               strictly(&o.secrets, head.Metadata.Name),
			"v1 Service":                              strictly(&o.services, head.Metadata.Name),
			"apps/v1 StatefulSet":                     strictly(&o.statefulSets, head.Metadata.Name),
			"apps/v1 Deployment":                      strictly(&o.deployments, head.Metadata.Name),
			"policy/v1 PodDisruptionBudget":           strictly(&o.budgets, head.Metadata.Name),
			"networking.k8s.io/v1 NetworkPolicy":      strictly(&o.policies, head.Metadata.Name),
			"monitoring.coreos.com/v1 ServiceMonitor": strictly(&o.monitors, head.Metadata.Name),
			"autoscaling/v2 HorizontalPodAutoscaler":  strictly(&o.scalers, head.Metadata.Name),
		}[head.APIVersion+" "+head.Kind]
		if into == nil {
			t.Fatalf("no test knows %s %s:\n%s", head.APIVersion, head.Kind, doc)
		}
		if err := into(doc); err != nil {
			t.Errorf("%s %s: %v in\n%s", head.Kind, head.Metadata.Name, err, doc)
		}
	}
	return o
}

// strictly returns a function that reads a document into a new entry of a map.
func strictly[T any](into *map[string]*T, name string) func(string) error {
	return func(doc string) error {
		if *into == nil {
			*into = map[string]*T{}
		}
		if (*into)[name] != nil {
			return fmt.Errorf("there are two of this name")
		}
		value := new(T)
		(*into)[name] = value
		return yaml.UnmarshalStrict([]byte(doc), value)
	}
}

// workload is what makes pods.
type workload struct {
	name     string
	selector map[string]string
	template core.PodTemplateSpec
	claims   []core.PersistentVolumeClaim
}

func (o *objects) workloads() []workload {
	var list []workload
	for name, s := range o.statefulSets {
		list = append(list, workload{name, s.Spec.Selector.MatchLabels, s.Spec.Template, s.Spec.VolumeClaimTemplates})
	}
	for name, d := range o.deployments {
		list = append(list, workload{name, d.Spec.Selector.MatchLabels, d.Spec.Template, nil})
	}
	slices.SortFunc(list, func(a, b workload) int { return strings.Compare(a.name, b.name) })
	return list
}

// selected returns the workloads whose pods have these labels.
func (o *objects) selected(labels map[string]string) []workload {
	return slices.DeleteFunc(o.workloads(), func(w workload) bool { return !has(w.template.Labels, labels) })
}

func has(labels, wanted map[string]string) bool {
	for name, value := range wanted {
		if labels[name] != value {
			return false
		}
	}
	return len(wanted) > 0
}

// containers returns a pod's containers, with those that run before them or beside them.
func (w workload) containers() []core.Container {
	return slices.Concat(w.template.Spec.InitContainers, w.template.Spec.Containers)
}

// container returns the container of this name, or nil.
func (w workload) container(name string) *core.Container {
	all := w.containers()
	if i := slices.IndexFunc(all, func(c core.Container) bool { return c.Name == name }); i >= 0 {
		return &all[i]
	}
	return nil
}

// files writes what a container has mounted from Secrets and ConfigMaps into a folder, and returns
// where each mount is there. What the release does not have itself is made up.
func (o *objects) files(t *testing.T, w workload, c core.Container, folder string) map[string]string {
	t.Helper()
	places := map[string]string{}
	for _, m := range c.VolumeMounts {
		place := filepath.Join(folder, m.MountPath)
		if err := os.MkdirAll(place, 0o755); err != nil {
			t.Fatal(err)
		}
		places[m.MountPath] = place
		for name, content := range o.mounted(t, w, m.Name) {
			if err := os.WriteFile(filepath.Join(place, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return places
}

func (o *objects) mounted(t *testing.T, w workload, volume string) map[string][]byte {
	t.Helper()
	for _, v := range w.template.Spec.Volumes {
		switch {
		case v.Name != volume:
		case v.Secret != nil:
			if s := o.secrets[v.Secret.SecretName]; s != nil {
				return s.Data
			}
			return foreign(t)
		case v.ConfigMap != nil:
			data := map[string][]byte{}
			for name, text := range o.configs[v.ConfigMap.Name].Data {
				data[name] = []byte(text)
			}
			return data
		default:
			return nil
		}
	}
	if !slices.ContainsFunc(w.claims, func(c core.PersistentVolumeClaim) bool { return c.Name == volume }) {
		t.Errorf("%s has no volume %s", w.name, volume)
	}
	return nil
}

// environment returns a container's variables, with what Kubernetes would put into them.
func (o *objects) environment(t *testing.T, c core.Container) map[string]string {
	t.Helper()
	env := map[string]string{}
	for _, v := range c.Env {
		switch from := v.ValueFrom; {
		case from == nil:
			env[v.Name] = v.Value
		case from.FieldRef != nil && from.FieldRef.FieldPath == "metadata.name":
			env[v.Name] = "ollama-cacheproxy-0"
		case from.SecretKeyRef != nil:
			s := o.secrets[from.SecretKeyRef.Name]
			if s == nil || len(s.Data[from.SecretKeyRef.Key]) == 0 {
				t.Errorf("%s: there is no %s in Secret %s", v.Name, from.SecretKeyRef.Key, from.SecretKeyRef.Name)
				continue
			}
			env[v.Name] = string(s.Data[from.SecretKeyRef.Key])
		default:
			t.Errorf("%s comes from where no test looks", v.Name)
		}
	}
	return env
}

// expanded replaces $(NAME) as Kubernetes does.
func expanded(args []string, env map[string]string) []string {
	var list []string
	for _, arg := range args {
		for name, value := range env {
			arg = strings.ReplaceAll(arg, "$("+name+")", value)
		}
		list = append(list, arg)
	}
	return list
}

// read returns a file's text.
func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(bytes.ReplaceAll(text, []byte("\r\n"), []byte("\n")))
}
