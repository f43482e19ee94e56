//go:build !unix

package proxy

func descriptorLimit() int { return 0 }
