// Package docs has no code. Its tests check the links of the documentation.
package docs

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/ast"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/text"
)

// TestLinks follows every relative link of the repository's Markdown files: the file has to exist, and the anchor has to
// be a heading of it.
func TestLinks(t *testing.T) {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(root, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(filepath.Join(root, "docs"), func(path string, entry fs.DirEntry, err error) error {
		if filepath.Ext(path) == ".md" {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, file := range files {
		links, _, err := read(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			if strings.Contains(link, "://") {
				continue
			}
			checked++
			if err := follow(root, file, link); err != nil {
				t.Errorf("%s: %s: %v", strings.TrimPrefix(file, root+"/"), link, err)
			}
		}
	}
	if checked < 100 {
		t.Errorf("%d links were found in %d files: the test reads too little", checked, len(files))
	}
}

// follow returns an error if a link of a file leads nowhere.
func follow(root, file, link string) error {
	path, anchor, _ := strings.Cut(link, "#")
	path, err := url.PathUnescape(path)
	if err != nil {
		return err
	}
	target := file
	if path != "" {
		target = filepath.Join(filepath.Dir(file), path)
	}
	if !strings.HasPrefix(target, root+"/") {
		return errors.New("it leads out of the repository")
	}
	if _, err := os.Stat(target); err != nil || anchor == "" {
		return err
	}
	_, anchors, err := read(target)
	if err != nil {
		return err
	}
	if !slices.Contains(anchors, anchor) {
		return fmt.Errorf("no heading of that name; there are %s", strings.Join(anchors, ", "))
	}
	return nil
}

// read returns where the links and images of a Markdown file lead, and the anchors of its headings as GitHub makes them.
func read(file string) (links, anchors []string, err error) {
	source, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, err
	}
	document := goldmark.New(goldmark.WithExtensions(extension.GFM)).Parser().Parse(text.NewReader(source))
	err = ast.Walk(document, func(node ast.Node, entering bool) (ast.WalkStatus, error) {
		if !entering {
			return ast.WalkContinue, nil
		}
		switch node := node.(type) {
		case *ast.Link:
			links = append(links, string(node.Destination))
		case *ast.Image:
			links = append(links, string(node.Destination))
		case *ast.Heading:
			anchor := slug(plain(node, source))
			for n := 1; slices.Contains(anchors, anchor); n++ {
				anchor = fmt.Sprintf("%s-%d", slug(plain(node, source)), n)
			}
			anchors = append(anchors, anchor)
		}
		return ast.WalkContinue, nil
	})
	return links, anchors, err
}

// plain returns the text of a heading without its markup.
func plain(node ast.Node, source []byte) string {
	var b strings.Builder
	for child := node.FirstChild(); child != nil; child = child.NextSibling() {
		if t, ok := child.(*ast.Text); ok {
			b.Write(t.Segment.Value(source))
		} else {
			b.WriteString(plain(child, source))
		}
	}
	return b.String()
}

// slug makes an anchor as GitHub does: lower case, spaces as hyphens, and no punctuation but hyphens and underscores.
func slug(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsNumber(r):
			return unicode.ToLower(r)
		}
		return -1
	}, heading)
}
