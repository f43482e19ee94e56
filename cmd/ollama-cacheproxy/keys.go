package main

import (
	"fmt"
	"log/slog"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// keysFile is the file of --api-keys-file.
type keysFile struct {
	settingsFile
	keys   *proxy.Keys
	inline bool // they are in the file of --config, which configReload reads again

	replaced func(names []string) // called with the keys' names after each reload; may be nil
}

// readKeys reads the file for the first time.
func readKeys(path string) (*keysFile, error) {
	k := &keysFile{settingsFile: settingsFile{path: path}}
	text, err := k.read()
	if err != nil {
		return nil, fmt.Errorf("--api-keys-file: %w", err)
	}
	if k.keys, err = proxy.ParseKeys(text); err != nil {
		return nil, fmt.Errorf("--api-keys-file %s: %w", path, err)
	}
	return k, nil
}

// inlineKeys are the keys from the member api-keys of the file of --config, in the form of
// --api-keys-file.
type inlineKeys struct {
	text string
	line int // 0 if there are none
}

// settingAPIKeys is the one member of the file of --config that is not a flag: everybody on the
// machine could read keys on a command line.
const settingAPIKeys = "api-keys"

// read reads a map of names, each with its key, or with a map of key and settings.
func (k *inlineKeys) read(n *yaml.Node, line int) error {
	if n.Kind != yaml.MappingNode || len(n.Content) == 0 {
		return wrong(n, settingAPIKeys, "want a map, such as 'alice: {key: KEY, class: interactive}'")
	}
	k.line = line
	for i := 0; i < len(n.Content); i += 2 {
		name, value := n.Content[i], n.Content[i+1]
		words := []string{name.Value, value.Value}
		if value.Kind == yaml.MappingNode {
			words = keyWords(name.Value, value)
		}
		for _, word := range words {
			if word == "" || strings.ContainsFunc(word, unicode.IsSpace) {
				return wrong(name, settingAPIKeys, "want a name and a key without blanks, such as 'alice: {key: KEY, class: interactive}'")
			}
		}
		if _, err := proxy.ParseKeys(strings.Join(words, " ")); err != nil {
			return wrong(name, settingAPIKeys, strings.TrimPrefix(err.Error(), "line 1: "))
		}
		k.text += strings.Join(words, " ") + "\n"
	}
	// For equal keys the error has their numbers.
	if _, err := proxy.ParseKeys(k.text); err != nil {
		return wrong(n, settingAPIKeys, strings.ReplaceAll(err.Error(), "line ", "entry "))
	}
	return nil
}

// keyWords returns the words of a line of --api-keys-file.
func keyWords(name string, n *yaml.Node) []string {
	words := []string{name, ""}
	for i := 0; i < len(n.Content); i += 2 {
		member, value := n.Content[i].Value, n.Content[i+1].Value
		switch {
		case member == "key":
			words[1] = value
		case member == "admin" && value == "true":
			words = append(words, "admin=yes")
		case member == "admin" && value == "false":
			words = append(words, "admin=no")
		default:
			words = append(words, member+"="+value)
		}
	}
	return words
}

// inlineKeysFile returns the keys of the file of --config.
func inlineKeysFile(c *configFile) (*keysFile, error) {
	keys, err := proxy.ParseKeys(c.keys.text)
	return &keysFile{settingsFile: c.settingsFile, keys: keys, inline: true}, err
}

// reload reads the file again. If that fails, the previous keys stay.
func (k *keysFile) reload(logger *slog.Logger) {
	if err := k.again(k.keys.Replace); err != nil {
		logger.Error("the API keys could not be read again: those from before stay", "file", k.path, "keys", k.keys.Len(), "err", err)
		return
	}
	if k.replaced != nil {
		k.replaced(k.keys.Names())
	}
	logger.Info("API keys read again", "file", k.path, "keys", k.keys.Len(), "admins", k.keys.Admins())
}

// replace puts other keys, already checked, into force.
func (k *keysFile) replace(text string) {
	if err := k.keys.Replace(text); err == nil && k.replaced != nil {
		k.replaced(k.keys.Names())
	}
}

// warn logs that no key may change models, if that is so: in a file older than that right, none has
// it.
func (k *keysFile) warn(logger *slog.Logger) {
	if k.keys.Admins() == 0 {
		logger.Warn("no API key may pull, create, copy, push or delete models, or drain upstreams: add the word admin to the line of one that may, such as 'NAME KEY admin'", "file", k.path)
	}
}
