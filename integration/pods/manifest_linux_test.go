package pods

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"go.yaml.in/yaml/v3"
)

// manifests is what the test needs of a file of manifests. (That everything in the file is known to
// Kubernetes is a test of deploy/check.)
type manifests struct {
	set      statefulSet
	services []service
}

type meta struct {
	Name   string            `yaml:"name"`
	Labels map[string]string `yaml:"labels"`
}

type service struct {
	Metadata meta `yaml:"metadata"`
	Spec     struct {
		ClusterIP                string            `yaml:"clusterIP"`
		PublishNotReadyAddresses bool              `yaml:"publishNotReadyAddresses"`
		Selector                 map[string]string `yaml:"selector"`
		Ports                    []struct {
			Port       int    `yaml:"port"`
			TargetPort string `yaml:"targetPort"`
		} `yaml:"ports"`
	} `yaml:"spec"`
}

type statefulSet struct {
	Metadata meta `yaml:"metadata"`
	Spec     struct {
		Replicas    int    `yaml:"replicas"`
		ServiceName string `yaml:"serviceName"`
		Template    struct {
			Metadata meta    `yaml:"metadata"`
			Spec     podSpec `yaml:"spec"`
		} `yaml:"template"`
		VolumeClaimTemplates []struct {
			Metadata meta `yaml:"metadata"`
		} `yaml:"volumeClaimTemplates"`
	} `yaml:"spec"`
}

type podSpec struct {
	TerminationGracePeriodSeconds int         `yaml:"terminationGracePeriodSeconds"`
	InitContainers                []container `yaml:"initContainers"`
	Containers                    []container `yaml:"containers"`
	SecurityContext               struct {
		RunAsUser  uint32 `yaml:"runAsUser"`
		RunAsGroup uint32 `yaml:"runAsGroup"`
		FSGroup    uint32 `yaml:"fsGroup"`
	} `yaml:"securityContext"`
	Volumes []struct {
		Name     string    `yaml:"name"`
		EmptyDir *struct{} `yaml:"emptyDir"`
		Secret   *struct {
			SecretName  string `yaml:"secretName"`
			DefaultMode uint32 `yaml:"defaultMode"`
		} `yaml:"secret"`
	} `yaml:"volumes"`
}

type container struct {
	Name          string   `yaml:"name"`
	Image         string   `yaml:"image"`
	Command       []string `yaml:"command"`
	Args          []string `yaml:"args"`
	RestartPolicy string   `yaml:"restartPolicy"`
	Env           []struct {
		Name      string `yaml:"name"`
		Value     string `yaml:"value"`
		ValueFrom struct {
			FieldRef struct {
				FieldPath string `yaml:"fieldPath"`
			} `yaml:"fieldRef"`
		} `yaml:"valueFrom"`
	} `yaml:"env"`
	Ports []struct {
		Name          string `yaml:"name"`
		ContainerPort int    `yaml:"containerPort"`
	} `yaml:"ports"`
	ReadinessProbe  *probe `yaml:"readinessProbe"`
	LivenessProbe   *probe `yaml:"livenessProbe"`
	SecurityContext struct {
		ReadOnlyRootFilesystem bool `yaml:"readOnlyRootFilesystem"`
	} `yaml:"securityContext"`
	VolumeMounts []struct {
		Name      string `yaml:"name"`
		MountPath string `yaml:"mountPath"`
		ReadOnly  bool   `yaml:"readOnly"`
	} `yaml:"volumeMounts"`
}

type probe struct {
	HTTPGet struct {
		Path string `yaml:"path"`
		Port string `yaml:"port"`
	} `yaml:"httpGet"`
	PeriodSeconds    int `yaml:"periodSeconds"`
	TimeoutSeconds   int `yaml:"timeoutSeconds"`
	FailureThreshold int `yaml:"failureThreshold"`
}

// readManifests reads a file with one StatefulSet.
func readManifests(path string) (m manifests, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return m, err
	}
	sets := 0
	for decoder := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var doc yaml.Node
		switch err := decoder.Decode(&doc); {
		case errors.Is(err, io.EOF) && sets == 1:
			return m, nil
		case errors.Is(err, io.EOF):
			return m, fmt.Errorf("%s has %d StatefulSets", path, sets)
		case err != nil:
			return m, fmt.Errorf("%s: %w", path, err)
		}
		var head struct {
			Kind string `yaml:"kind"`
		}
		err := doc.Decode(&head)
		switch {
		case err != nil:
		case head.Kind == "StatefulSet":
			sets++
			err = doc.Decode(&m.set)
		case head.Kind == "Service":
			m.services = append(m.services, service{})
			err = doc.Decode(&m.services[len(m.services)-1])
		}
		if err != nil {
			return m, fmt.Errorf("%s: %w", path, err)
		}
	}
}

// port returns the number of a port of the pod.
func (s podSpec) port(name string) int {
	for _, c := range append(s.InitContainers, s.Containers...) {
		for _, p := range c.Ports {
			if p.Name == name {
				return p.ContainerPort
			}
		}
	}
	return 0
}

// environment returns a container's variables, after those of its image.
func (c container) environment(image []string, pod string) ([]string, error) {
	env := append([]string{}, image...)
	for _, v := range c.Env {
		switch from := v.ValueFrom.FieldRef.FieldPath; from {
		case "":
			env = append(env, v.Name+"="+v.Value)
		case "metadata.name":
			env = append(env, v.Name+"="+pod)
		default:
			return nil, fmt.Errorf("container %s: %s is %s, which this test does not know", c.Name, v.Name, from)
		}
	}
	return env, nil
}

// expand replaces $(NAME) as Kubernetes does.
func expand(args, env []string) []string {
	var list []string
	for _, arg := range args {
		for _, v := range env {
			name, value, _ := strings.Cut(v, "=")
			arg = strings.ReplaceAll(arg, "$("+name+")", value)
		}
		list = append(list, arg)
	}
	return list
}
