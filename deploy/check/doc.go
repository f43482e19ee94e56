// Package check renders the Helm chart as Helm does, and checks what Kubernetes would make of it,
// without a cluster. It is a module of its own, since Helm and Kubernetes bring more packages than
// all of the proxy.
//
//	cd deploy/check && go test ./...
//
// With -update it writes deploy/kubernetes, which is the chart's default shape ("make manifests").
package check
