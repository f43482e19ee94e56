package main

import (
	_ "embed"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

// The scripts ask the program itself for candidates, so they fit every version of it.
var (
	//go:embed completion/bash.sh
	bashCompletion string
	//go:embed completion/zsh.sh
	zshCompletion string
	//go:embed completion/fish.fish
	fishCompletion string
)

// completeFiles is the line that makes a shell complete file names.
const completeFiles = ":files"

type completionCmd struct {
	Shell string   `arg:"" enum:"bash,zsh,fish,words" help:"The shell: bash, zsh or fish."`
	Words []string `arg:"" optional:"" passthrough:"" help:"With words in place of a shell: the words of a command line, of which the last one is to be completed."`
}

func (completionCmd) Help() string {
	return `The packages install these scripts. By hand, for the shell that runs or in its start file:

  source <(ollama-cacheproxy completion bash)
  source <(ollama-cacheproxy completion zsh)
  ollama-cacheproxy completion fish | source`
}

func (c *completionCmd) Run(k *kong.Kong, out *console) error {
	text := ""
	switch c.Shell {
	case "bash":
		text = bashCompletion
	case "zsh":
		text = zshCompletion
	case "fish":
		text = fishCompletion
	case "words":
		words := c.Words
		if len(words) > 0 && words[0] == "--" {
			words = words[1:]
		}
		if len(words) == 0 {
			return errors.New("completion words: no word was given to complete")
		}
		text = strings.Join(completions(k.Model.Node, words), "")
	}
	_, err := io.WriteString(out.stdout, text)
	return err
}

// completions returns the candidates for the last of words, given those before it: one a line, each
// with its meaning after a tab, or completeFiles.
func completions(root *kong.Node, words []string) []string {
	at := position{node: root}
	last := len(words) - 1
	for _, word := range words[:last] {
		at.pass(word)
	}
	lines := at.next(words[last])
	return slices.DeleteFunc(lines, func(line string) bool {
		return line != completeFiles+"\n" && !strings.HasPrefix(line, words[last])
	})
}

// position is a place in a command line.
type position struct {
	node       *kong.Node // the verb so far
	value      *kong.Flag // the flag that the next word is the value of; nil if it is none
	positional int        // the arguments so far that are neither flags nor verbs
	flagsEnded bool       // after "--"
}

// pass moves past a word.
func (p *position) pass(word string) {
	switch {
	case p.value != nil:
		p.value = nil
	case word == "--":
		p.flagsEnded = true
	case strings.HasPrefix(word, "-") && !p.flagsEnded:
		// The name of a flag with "=" is complete already.
		if flag := p.flag(word); flag != nil && !flag.IsBool() && !flag.IsCounter() {
			p.value = flag
		}
	default:
		for _, child := range p.node.Children {
			if child.Name == word {
				p.node, p.positional = child, 0
				return
			}
		}
		p.positional++
	}
}

// flags returns the flags that are possible here: the verb's and, before a verb, those of the
// default verb.
func (p *position) flags() []*kong.Flag {
	flags := slices.Concat(p.node.AllFlags(true)...)
	if p.node.DefaultCmd != nil {
		flags = append(flags, p.node.DefaultCmd.Flags...)
	}
	return flags
}

// flag returns the flag with that name; nil if there is none.
func (p *position) flag(name string) *kong.Flag {
	for _, flag := range p.flags() {
		if name == "--"+flag.Name || flag.Short != 0 && name == "-"+string(flag.Short) {
			return flag
		}
	}
	return nil
}

// next returns all candidates here; word is what has been typed of one.
func (p *position) next(word string) []string {
	if p.value != nil {
		return values(p.value.Value, "")
	}
	if strings.HasPrefix(word, "-") && !p.flagsEnded {
		if name, _, ok := strings.Cut(word, "="); ok {
			if flag := p.flag(name); flag != nil {
				return values(flag.Value, name+"=")
			}
			return nil
		}
		var lines []string
		for _, flag := range p.flags() {
			if flag.Hidden {
				continue
			}
			lines = append(lines, candidate("--"+flag.Name, flag.Help))
			if flag.Tag.Negatable != "" {
				lines = append(lines, candidate("--no-"+flag.Name, "Not: "+flag.Help))
			}
		}
		return lines
	}
	var lines []string
	for _, child := range p.node.Children {
		if !child.Hidden && p.positional == 0 {
			lines = append(lines, candidate(child.Name, child.Help))
		}
	}
	if p.positional < len(p.node.Positional) {
		lines = append(lines, values(p.node.Positional[p.positional], "")...)
	}
	return lines
}

// values returns the values of a flag or an argument, after prefix, if they can be known.
func values(v *kong.Value, prefix string) []string {
	if v.Tag.Enum != "" {
		var lines []string
		for _, value := range v.EnumSlice() {
			lines = append(lines, candidate(prefix+value, ""))
		}
		return lines
	}
	if v.Tag.Type == "path" || v.Tag.Type == "existingfile" {
		return []string{completeFiles + "\n"}
	}
	return nil
}

// candidate is one line of completions: a word, and the first sentence of its help.
func candidate(word, help string) string {
	help, _, _ = strings.Cut(help, ". ")
	help, _, _ = strings.Cut(help, "\n")
	if help == "" {
		return word + "\n"
	}
	return fmt.Sprintf("%s\t%s\n", word, strings.TrimSuffix(help, "."))
}
