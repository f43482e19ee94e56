package livepage

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"sync"
	"time"
)

// The page's own files, and three small libraries as their packages have them, with their licences
// beside them: uPlot 1.6.32 (charts), Preact 10.29.8 (updates the document) and htm 3.1.1 (markup
// within JavaScript, without a build).
//
//go:embed static
var files embed.FS

// file is one of the page's files.
type file struct {
	text       []byte
	etag, kind string
}

// static returns the files by their names below the page's path; "" is the page itself. It hashes
// them on first use: most runs of the program serve no page.
var static = sync.OnceValue(func() map[string]file {
	all := map[string]file{}
	err := fs.WalkDir(files, "static", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := files.ReadFile(name)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(text)
		f := file{text: text, etag: `"` + hex.EncodeToString(sum[:8]) + `"`}
		switch ext := path.Ext(name); ext {
		case ".js": // independent of the machine's own list of types
			f.kind = "text/javascript; charset=utf-8"
		case ".LICENSE":
			f.kind = "text/plain; charset=utf-8"
		default:
			f.kind = mime.TypeByExtension(ext)
		}
		name = name[len("static/"):]
		if name == "index.html" {
			name = ""
		}
		all[name] = f
		return nil
	})
	if err != nil {
		panic(err) // the files are part of the program
	}
	return all
})

// policy lets the page run its own scripts and talk to this proxy, and nothing else. The page has
// no inline script or style.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
	"img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"

// Has reports whether there is a file with this name below the page's path; "" is the page itself.
func Has(name string) bool {
	_, ok := static()[name]
	return ok
}

// ServeFile serves the file with this name. Its content is public, since it is in the program, too.
func ServeFile(w http.ResponseWriter, r *http.Request, name string) {
	f, ok := static()[name]
	if !ok {
		http.NotFound(w, r)
		return
	}
	h := w.Header()
	h.Set("Content-Type", f.kind)
	h.Set("ETag", f.etag)
	h.Set("Cache-Control", "no-cache") // always revalidated, and answered with 304 for this version
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(f.text))
}
