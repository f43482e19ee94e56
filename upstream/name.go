package upstream

import (
	"strings"

	"github.com/ollama/ollama/types/model"
)

// ModelKey returns the key under which all spellings of a model's name are equal: the full name
// (host, namespace, model, tag) in lower case, as Ollama resolves it. It is "" for a name that
// Ollama refuses.
func ModelKey(name string) string {
	n, ok := parseName(name)
	if !ok {
		return ""
	}
	return strings.ToLower(n.String())
}

// DisplayName returns the shortest spelling of a model's name, as /api/ps and `ollama list` show
// it, or "" for a name that Ollama refuses.
func DisplayName(name string) string {
	n, ok := parseName(name)
	if !ok {
		return ""
	}
	return n.DisplayShortest()
}

func parseName(name string) (n model.Name, ok bool) {
	base, _ := cutSource(name)
	n = model.ParseName(base)
	return n, n.IsValid()
}

// IsCloud reports whether Ollama serves the model through its remote service: the name ends in
// ":cloud", or in "-cloud" within the tag.
func IsCloud(name string) bool {
	_, source := cutSource(name)
	return source == "cloud"
}

// cutSource splits off the suffix that says where a model runs, "cloud" or "local", as Ollama 0.34
// does (internal/modelref there).
func cutSource(name string) (base, source string) {
	name = strings.TrimSpace(name)
	i := strings.LastIndexByte(name, ':')
	if i < 0 {
		return name, ""
	}
	tag := strings.TrimSpace(name[i+1:])
	switch lower := strings.ToLower(tag); {
	case lower == "cloud" || lower == "local":
		return name[:i], lower
	case strings.HasSuffix(lower, "-cloud") && !strings.Contains(tag, "/"):
		return name[:i+1] + tag[:len(tag)-len("-cloud")], "cloud"
	}
	return name, ""
}
