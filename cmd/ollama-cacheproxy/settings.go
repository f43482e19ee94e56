package main

import (
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

// setting is one of serve's flags with its value in force, and where that comes from.
type setting struct {
	name   string
	group  string // a kong.Group's key
	value  any
	source string   // flag, the name of a variable, FILE:LINE, or default
	items  []string // of a list from the file: FILE:LINE of each
}

// noValue stands for an empty text or list.
const noValue = "-"

// String writes the value as the flag has it.
func (s setting) String() string {
	text := fmt.Sprint(s.value)
	if list, ok := s.value.([]string); ok {
		text = strings.Join(list, ", ")
	}
	if text == "" {
		return noValue
	}
	return text
}

// BeforeResolve reads --config, before kong asks for what the command line and the environment do not
// say.
func (s *serveCmd) BeforeResolve(ctx *kong.Context) error {
	flags := serveFlags(ctx.Model)
	i := slices.IndexFunc(flags, func(f *kong.Flag) bool { return f.Name == "config" })
	path, _ := ctx.FlagValue(flags[i]).(string)
	s.file = nil
	if path == "" {
		return nil
	}
	var err error
	if s.file, err = readConfig(path, flags); err == nil {
		ctx.AddResolver(s.file)
	}
	return err
}

// AfterApply notes where each setting comes from.
func (s *serveCmd) AfterApply(ctx *kong.Context) error {
	given := map[string]bool{}
	for _, p := range ctx.Path {
		if p.Flag != nil && !p.Resolved {
			given[p.Flag.Name] = true
		}
	}
	s.inForce = nil
	for _, f := range serveFlags(ctx.Model) {
		value := reflect.Indirect(reflect.ValueOf(f.Target.Interface())).Interface()
		x := setting{name: f.Name, value: value, source: "default"}
		if f.Group != nil {
			x.group = f.Group.Key
		}
		switch env := fromEnvironment(f); {
		case given[f.Name]:
			x.source = "flag"
		case env != "":
			x.source = env
		case s.file != nil && s.file.settings[f.Name].line > 0:
			set := s.file.settings[f.Name]
			x.source = fmt.Sprintf("%s:%d", s.file.path, set.line)
			for _, v := range set.values {
				x.items = append(x.items, fmt.Sprintf("%s:%d", s.file.path, v.line))
			}
		}
		s.inForce = append(s.inForce, x)
	}
	return nil
}

// serveFlags are the flags of the verb serve.
func serveFlags(app *kong.Application) []*kong.Flag {
	for _, node := range app.Children {
		if node.Name == "serve" {
			return node.Flags
		}
	}
	panic("there is no verb serve")
}

// at returns where in the file the setting is that an error quotes.
func (s setting) at(err error) string {
	at, longest := s.source, ""
	list, _ := s.value.([]string)
	for i, item := range list {
		// The longest one: the error may have a shorter one as an example.
		if i < len(s.items) && len(item) > len(longest) && strings.Contains(err.Error(), item) {
			at, longest = s.items[i], item
		}
	}
	return at
}

var flagNamed = regexp.MustCompile(`--([a-z][a-z-]*)`)

// locate adds to what is wrong with a setting of the file where that is.
func (s *serveCmd) locate(err error) error {
	for _, found := range flagNamed.FindAllStringSubmatch(err.Error(), -1) {
		for _, x := range s.inForce {
			if x.name != found[1] || s.file == nil || !strings.HasPrefix(x.source, s.file.path+":") {
				continue
			}
			return fmt.Errorf("%s: %w", x.at(err), err)
		}
	}
	return err
}

// plain takes off what kong puts before an error of the file.
func plain(err error) error {
	if wrong, ok := errors.AsType[configError](err); ok {
		return wrong
	}
	return err
}
