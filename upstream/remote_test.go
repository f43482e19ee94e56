package upstream

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
)

// TestRemoteAlias: a model that runs on another service has no digest that says when it changes,
// whatever its name here.
func TestRemoteAlias(t *testing.T) {
	ollama := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/api/version":
			io.WriteString(w, `{"version":"0.34.1"}`)
		case "/api/tags":
			fmt.Fprint(w, `{"models":[{"name":"here:latest","digest":"1"},`+
				`{"name":"mine:latest","digest":"2","remote_host":"https://ollama.com:443","remote_model":"big"}]}`)
		default:
			io.WriteString(w, `{"models":[]}`)
		}
	}))
	defer ollama.Close()
	u, err := url.Parse(ollama.URL)
	if err != nil {
		t.Fatal(err)
	}
	st := NewServer("s", u, ollama.Client().Transport, slog.New(slog.DiscardHandler)).Refresh(t.Context())
	if here, mine := st.Digests[ModelKey("here")], st.Digests[ModelKey("mine")]; here != "1" || mine != "" {
		t.Errorf("digests %q and %q, want one of the model that runs here alone", here, mine)
	}
	if !st.Has(ModelKey("mine")) {
		t.Error("the alias is not known")
	}
}
