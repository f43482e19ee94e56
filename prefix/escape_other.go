//go:build !amd64

package prefix

func oddEscape(s []byte) int { return oddEscapeGeneric(s) }
