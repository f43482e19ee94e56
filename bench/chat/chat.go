// Package chat sends chats to a server as its clients do, and measures the times, for benchmarks
// and tests on real servers.
package chat

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// HeaderServer is the header of an answer that names the server it comes from, if there are
// several.
const HeaderServer = "X-Cacheproxy-Upstream"

// Message is a message of a chat.
type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// System returns a message of the role system.
func System(text string) Message { return Message{"system", text} }

// User returns a message of the role user.
func User(text string) Message { return Message{"user", text} }

// Assistant returns a message of the role assistant.
func Assistant(text string) Message { return Message{"assistant", text} }

// Request is a chat to be answered at temperature 0.
type Request struct {
	Model    string
	Messages []Message
	// Generate is the most tokens to generate. It must be set, since Ollama takes zero literally.
	Generate int
	// NumCtx is the context length in tokens; zero means the server's default.
	NumCtx int
	// Priority is the value of X-Cacheproxy-Priority; "" leaves the header out.
	Priority string
	// Key is an API key; "" sends none.
	Key string
	// Stream asks for the answer in pieces, without which the time of its first token is unknown.
	Stream bool
}

// Answer is a server's answer to a request.
type Answer struct {
	Text string
	// Prompt and Generated are numbers of tokens, as the end of the answer reports them.
	Prompt, Generated int
	// Server is the name of the server that answered, if there are several; otherwise "".
	Server string
	// Load is the time to load the model, as the server reports it.
	Load time.Duration
	// First is the time until the first piece of text, Took the time until the end, both since the
	// request was sent. Without Request.Stream they are nearly equal.
	First, Took time.Duration
}

// Send sends a request and reads the answer to its end. Anything but a complete answer with status
// 200 is an error.
func Send(ctx context.Context, client *http.Client, url string, q Request) (Answer, error) {
	var a Answer
	req, err := q.request(ctx, url)
	if err != nil {
		return a, err
	}
	sent := time.Now()
	res, err := client.Do(req)
	if err != nil {
		return a, err
	}
	defer res.Body.Close()
	a.Server = res.Header.Get(HeaderServer)
	pieces := json.NewDecoder(res.Body)
	for {
		var said piece
		if err := pieces.Decode(&said); errors.Is(err, io.EOF) {
			return a, fmt.Errorf("%s: the answer ends in the middle", res.Status)
		} else if err != nil {
			return a, fmt.Errorf("%s: %w", res.Status, err)
		}
		if res.StatusCode != http.StatusOK || said.Error != "" {
			return a, fmt.Errorf("%s: %s", res.Status, said.Error)
		}
		if a.First == 0 {
			a.First = time.Since(sent)
		}
		a.Text += said.Message.Content
		if said.Done {
			a.Prompt, a.Generated, a.Load = said.Prompt, said.Generated, said.Load
			a.Took = time.Since(sent)
			// Read to the very end: otherwise the connection is closed, as by a client that leaves.
			_, err := io.Copy(io.Discard, res.Body)
			return a, err
		}
	}
}

func (q Request) request(ctx context.Context, url string) (*http.Request, error) {
	options := map[string]any{"temperature": 0, "seed": 1, "num_predict": q.Generate}
	if q.NumCtx > 0 {
		options["num_ctx"] = q.NumCtx
	}
	req, err := post(ctx, url+"/api/chat", map[string]any{
		"model": q.Model, "stream": q.Stream, "options": options, "messages": q.Messages,
	})
	if err != nil {
		return nil, err
	}
	if q.Priority != "" {
		req.Header.Set("X-Cacheproxy-Priority", q.Priority)
	}
	if q.Key != "" {
		req.Header.Set("Authorization", "Bearer "+q.Key)
	}
	return req, nil
}

func post(ctx context.Context, url string, what any) (*http.Request, error) {
	body, err := json.Marshal(what)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err == nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return req, err
}

// piece is a part of an answer, or all of it.
type piece struct {
	Message   Message
	Done      bool
	Prompt    int           `json:"prompt_eval_count"`
	Generated int           `json:"eval_count"`
	Load      time.Duration `json:"load_duration"` // in nanoseconds
	Error     string
}

// ClientFrom returns a client whose connections come from a local address; "" for any.
func ClientFrom(address string) *http.Client {
	var dialer net.Dialer
	if address != "" {
		dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(address)}
	}
	return &http.Client{Transport: &http.Transport{
		DialContext: dialer.DialContext, MaxIdleConnsPerHost: 1000,
	}}
}

// Embed makes a server embed a text; the Answer's Text is the vector as the server spells it.
func Embed(ctx context.Context, client *http.Client, url, model, text string) (Answer, error) {
	var a Answer
	req, err := post(ctx, url+"/api/embed", map[string]any{"model": model, "input": text})
	if err != nil {
		return a, err
	}
	sent := time.Now()
	var said struct {
		Embeddings json.RawMessage
		Prompt     int           `json:"prompt_eval_count"`
		Load       time.Duration `json:"load_duration"`
	}
	if err := decode(client, req, &said); err != nil {
		return a, fmt.Errorf("embedding: %w", err)
	}
	a.Text, a.Prompt, a.Load = string(said.Embeddings), said.Prompt, said.Load
	a.Took = time.Since(sent)
	a.First = a.Took
	return a, nil
}

// Unload makes a server unload a model at once, as it does by itself when keep_alive has run out,
// and returns when it is gone.
func Unload(ctx context.Context, client *http.Client, url, model string) error {
	req, err := post(ctx, url+"/api/generate", map[string]any{"model": model, "keep_alive": 0})
	if err != nil {
		return err
	}
	if err := decode(client, req, &struct{}{}); err != nil {
		return fmt.Errorf("unloading %s: %w", model, err)
	}
	for {
		get, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/api/ps", nil)
		if err != nil {
			return err
		}
		var loaded struct{ Models []struct{ Name string } }
		if err := decode(client, get, &loaded); err != nil {
			return fmt.Errorf("looking whether %s is unloaded: %w", model, err)
		}
		if !slices.ContainsFunc(loaded.Models, func(m struct{ Name string }) bool {
			return m.Name == model || m.Name == model+":latest"
		}) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is still loaded: %w", model, ctx.Err())
		case <-time.After(pollInterval):
		}
	}
}

func decode(client *http.Client, req *http.Request, into any) error {
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", res.Status, text)
	}
	return json.Unmarshal(text, into)
}

const pollInterval = 20 * time.Millisecond

// Evaluations waits until the servers' logs have n prompts since their marks, for at most two
// seconds, and returns the evaluations in them.
func Evaluations(
	ctx context.Context, servers []*realollama.Server, marks []realollama.Mark, n int,
) ([]realollama.Evaluation, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	for {
		var all []realollama.Evaluation
		for i, s := range servers {
			all = append(all, s.Evaluations(marks[i])...)
		}
		if len(all) >= n {
			return all, nil
		}
		select {
		case <-ctx.Done():
			return all, fmt.Errorf("the servers' logs have %d of %d evaluations: %w",
				len(all), n, ctx.Err())
		case <-time.After(pollInterval):
		}
	}
}

// Quantile returns the time that the given share (0 to 1) of all do not exceed; 0 if there are
// none. It sorts them.
func Quantile(all []time.Duration, part float64) time.Duration {
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	return all[min(int(part*float64(len(all))), len(all)-1)]
}
