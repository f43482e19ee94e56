// Package pods has no code. Its test runs deploy/kubernetes, which is the Helm chart's default
// shape, without a cluster: what Kubernetes would start in containers is run as processes, each pod
// in a network namespace of its own, each container with an image of its own as its root.
//
// Of Kubernetes it has what the manifests rely on: the order in which containers start and stop,
// users and read-only roots, volumes that outlive a pod, the names of headless Services, probes, and
// a load balancer that believes them. It has no seccomp, no limits of resources and no
// NetworkPolicies.
package pods
