package upstream

import "testing"

func TestModelKey(t *testing.T) {
	const qwen = "registry.ollama.ai/library/qwen:latest"
	for in, want := range map[string]string{
		"qwen": qwen, "QWEN": qwen, "qwen:latest": qwen, "library/qwen": qwen, "registry.ollama.ai/library/qwen": qwen,
		" qwen ": qwen, "qwen:local": qwen,
		"qwen:1b":            "registry.ollama.ai/library/qwen:1b",
		"Team/X:Q4_K_M":      "registry.ollama.ai/team/x:q4_k_m",
		"hf.co/u/R:Q4_K_M":   "hf.co/u/r:q4_k_m",
		"localhost:5000/a/b": "localhost:5000/a/b:latest",
		"":                   "", "a b": "", "a//b": "", "../x": "",
	} {
		if got := ModelKey(in); got != want {
			t.Errorf("ModelKey(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestIsCloud(t *testing.T) {
	for in, want := range map[string]bool{
		"gpt-oss:120b-cloud": true, "glm:cloud": true, "GLM:Cloud": true, "a/b:x-CLOUD": true,
		"glm": false, "cloud": false, "my-cloud": false, "my-cloud:7b": false, "glm:local": false, "host:1-cloud/b": false, "": false,
	} {
		if got := IsCloud(in); got != want {
			t.Errorf("IsCloud(%q) = %v", in, got)
		}
	}
}
