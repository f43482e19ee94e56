package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v3"
)

// configFile is the file of --config: its settings by the names of serve's flags. For kong it is a
// resolver, asked for what neither the command line nor the environment sets.
type configFile struct {
	settingsFile
	settings map[string]configured
	keys     inlineKeys
}

// configured is one setting in the file.
type configured struct {
	values []configuredValue
	list   bool // the flag may be repeated
	line   int
}

type configuredValue struct {
	text string
	line int
}

// ofCommandLine lists flags that make no sense in the file.
var ofCommandLine = []string{"config", "check"}

// configError is a mistake in the file, with its line.
type configError struct {
	path string
	line int
	err  error
}

func (e configError) Error() string { return fmt.Sprintf("%s:%d: %v", e.path, e.line, e.err) }
func (e configError) Unwrap() error { return e.err }

// readConfig reads the file, and checks that each setting is a flag and has a value of the flag's
// type. What the values mean is checked with those of the flags.
func readConfig(path string, flags []*kong.Flag) (*configFile, error) {
	c := &configFile{settingsFile: settingsFile{path: path}, settings: map[string]configured{}}
	text, err := c.settingsFile.read()
	if err != nil {
		return nil, fmt.Errorf("--config: %w", err)
	}
	d := yaml.NewDecoder(strings.NewReader(text))
	var doc yaml.Node
	switch err := d.Decode(&doc); {
	case errors.Is(err, io.EOF): // only comments
		return c, nil
	case err != nil: // the error names the line
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: more than one document: leave out the line with ---", path)
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		return nil, configError{path, root.Line, errors.New("want one setting a line, such as 'keep-alive: 24h'")}
	}
	for i := 0; i < len(root.Content); i += 2 {
		name, value := root.Content[i], root.Content[i+1]
		if err := c.setting(name.Value, name.Line, value, flags); err != nil {
			at, ok := errors.AsType[configError](err)
			if !ok {
				at = configError{line: name.Line, err: err}
			}
			at.path = path
			return nil, at
		}
	}
	return c, nil
}

// setting reads one setting.
func (c *configFile) setting(name string, line int, value *yaml.Node, flags []*kong.Flag) error {
	if name == settingAPIKeys {
		if c.keys.line > 0 {
			return fmt.Errorf("%s is given twice; line %d has it already", name, c.keys.line)
		}
		return c.keys.read(value, line)
	}
	i := slices.IndexFunc(flags, func(f *kong.Flag) bool { return f.Name == name })
	if i < 0 {
		return unknownSetting(name, flags)
	}
	if slices.Contains(ofCommandLine, name) {
		return fmt.Errorf("%s is for the command line and the environment alone", name)
	}
	if first, twice := c.settings[name]; twice {
		return fmt.Errorf("%s is given twice; line %d has it already", name, first.line)
	}
	s := configured{line: line, list: flags[i].IsSlice()}
	if err := s.take(name, value, strings.HasPrefix(flags[i].PlaceHolder, "[")); err != nil {
		return err
	}
	for j, v := range s.values {
		if flags[i].Tag.Type == "path" && !filepath.IsAbs(v.text) && !strings.HasPrefix(v.text, "~") {
			// It is relative to the file, wherever the proxy is started.
			v.text = filepath.Join(filepath.Dir(c.path), v.text)
			s.values[j] = v
		}
		if err := canBe(flags[i], v.text); err != nil {
			return configError{line: v.line, err: err}
		}
	}
	c.settings[name] = s
	return nil
}

// unknownSetting reports a name that is no flag, with the one that was probably meant.
func unknownSetting(name string, flags []*kong.Flag) error {
	plain := strings.NewReplacer("_", "-", " ", "-").Replace(strings.ToLower(strings.TrimLeft(name, "-")))
	for _, f := range flags {
		switch plain {
		case f.Name, f.Name + "s", strings.ReplaceAll(f.Name, "-", ""):
			return fmt.Errorf("there is no setting %q; did you mean %s?", name, f.Name)
		case "no-" + f.Name:
			return fmt.Errorf("there is no setting %q; write '%s: false'", name, f.Name)
		}
	}
	return fmt.Errorf("there is no setting %q: settings have the names of the flags", name)
}

// wrong returns the error for a setting at a node.
func wrong(n *yaml.Node, name, want string) error {
	return configError{line: n.Line, err: fmt.Errorf("%s: %s", name, want)}
}

// empty reports whether a node has no value.
func empty(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// take reads a value: a scalar, a list, or, for flags of the form NAME=VALUE, a map.
func (s *configured) take(name string, n *yaml.Node, named bool) error {
	if n.Kind == yaml.AliasNode {
		n = n.Alias // it is not an alias itself
	}
	switch {
	case empty(n):
		return wrong(n, name, "there is no value: write one, or leave the line out")
	case n.Kind == yaml.ScalarNode:
		s.values = append(s.values, configuredValue{n.Value, n.Line})
	case !s.list:
		return wrong(n, name, "want one value")
	case n.Kind == yaml.SequenceNode:
		for _, item := range n.Content {
			// An alias may refer to a list, even to the one that contains it.
			if item.Kind == yaml.SequenceNode || item.Kind == yaml.AliasNode && item.Alias.Kind == yaml.SequenceNode {
				return wrong(item, name, "a list within the list")
			}
			if err := s.take(name, item, named); err != nil {
				return err
			}
		}
	case named:
		return s.takeMap(name, n)
	default:
		return wrong(n, name, "want a value, or a list of them")
	}
	return nil
}

// takeMap reads NAME: VALUE as NAME=VALUE. A value without a name is called default.
func (s *configured) takeMap(name string, n *yaml.Node) error {
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if value.Kind == yaml.AliasNode {
			value = value.Alias
		}
		for j := 0; j < i; j += 2 {
			if n.Content[j].Value == key.Value {
				return wrong(key, name, fmt.Sprintf("%s is given twice; line %d has it already", key.Value, n.Content[j].Line))
			}
		}
		if value.Kind != yaml.ScalarNode || empty(value) {
			return wrong(key, name, key.Value+": want one value")
		}
		text := key.Value + "=" + value.Value
		if key.Value == "default" && name != "upstream" {
			text = value.Value
		}
		s.values = append(s.values, configuredValue{text, value.Line})
	}
	return nil
}

// canBe returns why a text cannot be a value of the flag; nil if it can.
func canBe(f *kong.Flag, text string) error {
	if f.Enum != "" && !f.EnumMap()[text] {
		return fmt.Errorf("%s: %q is none of %s", f.Name, text, strings.Join(f.EnumSlice(), ", "))
	}
	if f.IsSlice() {
		return nil // a list of texts, each of which is checked later
	}
	target := reflect.New(f.Target.Type()).Elem()
	return f.Parse(kong.Scan().PushTyped(text, kong.FlagValueToken), target)
}

// Validate is called by kong; readConfig has validated already.
func (c *configFile) Validate(*kong.Application) error { return nil }

// Resolve is called by kong for flags that the command line does not set.
func (c *configFile) Resolve(_ *kong.Context, _ *kong.Path, f *kong.Flag) (any, error) {
	s, ok := c.settings[f.Name]
	if !ok || fromEnvironment(f) != "" {
		return nil, nil
	}
	if !s.list {
		return s.values[0].text, nil
	}
	list := make([]any, 0, len(s.values))
	for _, v := range s.values {
		list = append(list, v.text)
	}
	return list, nil
}

// fromEnvironment returns the variable that sets a flag; "" if none is set.
func fromEnvironment(f *kong.Flag) string {
	for _, name := range f.Envs {
		if os.Getenv(name) != "" {
			return name
		}
	}
	return ""
}
