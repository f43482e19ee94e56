package proxy

import (
	"net/http"
	"strings"
	"testing"
)

// TestAdmin: if keys are required, only those with the word admin may change models or upstreams.
// Any key may do everything else, including unloading by keep_alive. Without keys everyone may do
// everything.
func TestAdmin(t *testing.T) {
	type request struct{ method, path, body string }
	forAdmins := []request{
		{"POST", "/api/pull", `{"model":"m"}`}, {"POST", "/api/push", `{"model":"m"}`},
		{"POST", "/api/create", `{"model":"m"}`}, {"POST", "/api/copy", `{}`},
		{"DELETE", "/api/delete", `{"model":"m"}`}, {"POST", "/api/delete", `{"model":"m"}`},
		{"POST", "/api/blobs/sha256:0", "x"}, {"POST", "/api/signout", ""},
		{"DELETE", "/api/user/keys/x", ""}, {"DELETE", "/api/%64elete", `{"model":"m"}`},
		{"DELETE", "//api/delete", `{"model":"m"}`}, {"DELETE", "/x/../api/delete", `{"model":"m"}`},
		{"DELETE", "/api/delete/", `{"model":"m"}`}, {"POST", "/api/./blobs/sha256:0", "x"},
		{"POST", "/_cacheproxy/upstreams/up/drain", ""},
		{"POST", "/_cacheproxy/upstreams/up/resume", ""},
	}
	forAll := []request{
		{"POST", "/api/chat", `{"model":"m"}`}, {"POST", "/api/generate", `{"model":"m","keep_alive":0}`},
		{"POST", "/v1/messages", `{"model":"m"}`}, {"GET", "/api/tags", ""}, {"POST", "/api/show", `{}`},
		{"HEAD", "/api/blobs/sha256:0", ""}, {"GET", "/api/pull", ""}, {"POST", "/api/me", ""},
		{"GET", "/_cacheproxy/upstreams", ""}, {"POST", "/api/unknown", ""},
	}
	for _, tt := range []struct {
		what, keys, key string
		allowed         bool
	}{
		{"no keys are asked for", "", "", true},
		{"admin", "ops key-1 admin\nalice key-2", "key-1", true},
		{"admin=yes", "ops key-1 class=batch admin=yes", "key-1", true},
		{"admin=no", "ops key-1 admin=no\nroot key-2 admin", "key-1", false},
		{"a name without the word", "ops key-1 admin\nalice key-2", "key-2", false},
		{"a key without a name", "ops key-1 admin\nkey-2", "key-2", false},
		{"no key has the word", "key-1", "key-1", false},
	} {
		t.Run(tt.what, func(t *testing.T) {
			h := &Handler{}
			var headers []string
			if tt.keys != "" {
				h.Guard = withKeys(t, tt.keys)
				headers = []string{"Authorization: Bearer " + tt.key}
			}
			rg := newRig(t, newFake(t, okAnswer).URL, h)
			status := func(r request) (int, string) {
				res, text := rg.do(r.method, r.path, r.body, headers...)
				rg.ended()
				return res.StatusCode, text
			}
			for _, r := range forAdmins {
				got, text := status(r)
				if refused := got == http.StatusForbidden; refused == tt.allowed {
					t.Errorf("%s %s: %d %s", r.method, r.path, got, text)
				}
				if !tt.allowed && (!strings.Contains(text, "NAME KEY admin") || strings.Contains(text, tt.key)) {
					t.Errorf("%s %s is refused with %s", r.method, r.path, text)
				}
			}
			for _, r := range forAll {
				if got, text := status(r); got != http.StatusOK {
					t.Errorf("%s %s: %d %s", r.method, r.path, got, text)
				}
			}
		})
	}
}

// TestAdminWord: the forms that the word may have in the file.
func TestAdminWord(t *testing.T) {
	for text, admins := range map[string]int{
		"a k admin": 1, "a k rate=1/s admin=yes\nb l admin": 2, "a k admin=no": 0, "admin k": 0, "k": 0,
		"admin": 0, // a single word on a line is a key, whatever it looks like
	} {
		k, err := ParseKeys(text)
		if err != nil || k.Admins() != admins {
			t.Errorf("%q: %v, want %d admins", text, err, admins)
		}
	}
	for text, want := range map[string]string{
		"secret admin":           "needs a name",
		"a secret admin=maybe":   "admin=maybe: want admin, admin=yes or admin=no",
		"a secret admin admin=1": "admin is given twice",
		"a secret Admin":         "no setting",
	} {
		if _, err := ParseKeys(text); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}
