package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// Errors of requests to an engine; test with errors.Is. Other errors are the context's, or anything
// else that an engine reports, such as a state that could not be written.
var (
	// ErrRefused: the engine refuses the request (400), or Restore does not send it. For a restore
	// that means a state that is missing, torn, foreign or too long for the slot, which is empty if
	// the engine refused; otherwise a slot that does not exist, or a name that is not a file's.
	ErrRefused = errors.New("the engine refused")
	// ErrGone: no engine answers: it has ended, or has only just been started.
	ErrGone = errors.New("the engine is gone")
	// ErrLoading: the engine has not loaded its model yet (503).
	ErrLoading = errors.New("the engine is still loading its model")
	// ErrUnsupported: the engine cannot do that (501) with these settings or for this prompt.
	ErrUnsupported = errors.New("the engine does not do that")
)

// Slot is what an engine reports of one of its slots.
type Slot struct {
	ID int
	// Processing means that it works on a request.
	Processing bool
	// Task is the number of its present or last request, or -1 if there was none. The numbers grow.
	Task int
	// Tokens is what it holds: prompt and answer so far. It is 0 before its first request, even if
	// a state was restored.
	Tokens int
	// Processed and Cached are how many tokens of the present prompt were evaluated, and how many
	// it held already. Both are 0 once the request has ended.
	Processed, Cached int
	// Context is how many tokens it can hold.
	Context int
}

// Saved is the result of a save.
type Saved struct {
	// Tokens is how many tokens the state has; 0 is that of an empty slot, which is useless.
	Tokens int
	// Bytes is the size of its file.
	Bytes int64
	// Took is how long the engine was busy with it, and answered nobody.
	Took time.Duration
}

// Restored is the result of a restore.
type Restored struct {
	Tokens int
	Bytes  int64
	// Took is how long the engine was busy with it, and answered nobody.
	Took time.Duration
}

// client is for all engines. They are on this machine, so no proxy is used.
var client = &http.Client{Transport: &http.Transport{
	DialContext:         (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
	MaxIdleConnsPerHost: 4,
	// The engine itself closes a connection after 5 s without a request.
	IdleConnTimeout: 4 * time.Second,
}}

// CloseIdleConnections closes connections to engines that no request uses.
func CloseIdleConnections() { client.CloseIdleConnections() }

// Slots asks the engine for its slots, in the order of their numbers.
func (p Process) Slots(ctx context.Context) ([]Slot, error) {
	var answer []struct {
		ID         int  `json:"id"`
		Processing bool `json:"is_processing"`
		Context    int  `json:"n_ctx"`
		Task       *int `json:"id_task"`
		Tokens     int  `json:"n_prompt_tokens"`
		Processed  int  `json:"n_prompt_tokens_processed"`
		Cached     int  `json:"n_prompt_tokens_cache"`
	}
	if err := p.ask(ctx, http.MethodGet, "/slots", nil, &answer); err != nil {
		return nil, fmt.Errorf("asking for slots: %w", err)
	}
	slots := make([]Slot, len(answer))
	for i, a := range answer {
		task := -1
		if a.Task != nil {
			task = *a.Task
		}
		slots[i] = Slot{a.ID, a.Processing, task, a.Tokens, a.Processed, a.Cached, a.Context}
	}
	return slots, nil
}

// Save has the engine write the state of a slot to a file of its folder (SaveFolder), replacing one
// of that name. It waits for the slot's present request to end. The file exists from the beginning,
// and is complete once Save returns no error.
func (p Process) Save(ctx context.Context, slot int, name string) (Saved, error) {
	var answer struct {
		Tokens  int   `json:"n_saved"`
		Bytes   int64 `json:"n_written"`
		Timings struct {
			Save float64 `json:"save_ms"`
		} `json:"timings"`
	}
	if err := p.act(ctx, slot, "save", name, &answer); err != nil {
		return Saved{}, err
	}
	return Saved{answer.Tokens, answer.Bytes, milliseconds(answer.Timings.Save)}, nil
}

// Restore has the engine read the state of a slot from a file of its folder. It waits for the
// slot's present request to end. What the slot held is lost, even if the engine refuses the file.
// size is what Save returned, in bytes: a file of another size is torn and is not shown to the
// engine, which some torn files would crash.
func (p Process) Restore(ctx context.Context, slot int, name string, size int64) (Restored, error) {
	info, err := os.Stat(filepath.Join(p.Folder(), name))
	switch {
	case err != nil:
		return Restored{}, fmt.Errorf("restoring a slot: %w: %w", ErrRefused, err)
	case info.Size() != size || !info.Mode().IsRegular():
		return Restored{}, fmt.Errorf("restoring a slot: %w: %s has %d bytes, not %d",
			ErrRefused, name, info.Size(), size)
	}
	var answer struct {
		Tokens  int   `json:"n_restored"`
		Bytes   int64 `json:"n_read"`
		Timings struct {
			Restore float64 `json:"restore_ms"`
		} `json:"timings"`
	}
	if err := p.act(ctx, slot, "restore", name, &answer); err != nil {
		return Restored{}, err
	}
	return Restored{answer.Tokens, answer.Bytes, milliseconds(answer.Timings.Restore)}, nil
}

// Erase has the engine forget what a slot holds, once its present request has ended, and returns
// how many tokens that were.
func (p Process) Erase(ctx context.Context, slot int) (int, error) {
	var answer struct {
		Tokens int `json:"n_erased"`
	}
	err := p.act(ctx, slot, "erase", "", &answer)
	return answer.Tokens, err
}

func milliseconds(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }

// act has a slot saved, restored or erased.
func (p Process) act(ctx context.Context, slot int, action, name string, answer any) error {
	// The engine would take the number modulo the number of its slots.
	if slot < 0 || p.Parallel > 0 && slot >= p.Parallel {
		return fmt.Errorf("having the engine %s slot %d: %w: it has %d slots",
			action, slot, ErrRefused, p.Parallel)
	}
	body, err := json.Marshal(struct {
		Filename string `json:"filename,omitempty"`
	}{name})
	if err != nil {
		return err
	}
	path := "/slots/" + strconv.Itoa(slot) + "?action=" + action
	if err := p.ask(ctx, http.MethodPost, path, body, answer); err != nil {
		return fmt.Errorf("having the engine %s slot %d: %w", action, slot, err)
	}
	return nil
}

// answerLimit bounds an engine's answer, in bytes. A slot takes 4 KB.
const answerLimit = 4 << 20

func (p Process) ask(ctx context.Context, method, path string, body []byte, answer any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+p.addr()+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
		// Repeating an action is harmless, so it may be sent again if the engine has just closed
		// the kept connection. The empty header says so to net/http and is not sent.
		req.Header["X-Idempotency-Key"] = []string{}
	}
	res, err := client.Do(req)
	if err != nil {
		return gone(ctx, err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, answerLimit))
	if err != nil {
		return gone(ctx, err)
	}
	if res.StatusCode != http.StatusOK {
		return refusal(res.StatusCode, text)
	}
	if err := json.Unmarshal(text, answer); err != nil {
		return fmt.Errorf("reading the engine's answer: %w", err)
	}
	return nil
}

// gone is the error of a connection that failed or broke: since the engine is on this machine, it
// has ended, unless the caller gave up.
func gone(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return err
	}
	return fmt.Errorf("%w: %w", ErrGone, err)
}

// refusal is the error of a status other than 200.
func refusal(status int, text []byte) error {
	var said struct {
		Error struct {
			Message string `json:"message"`
		} `json:"error"`
	}
	if json.Unmarshal(text, &said) != nil || said.Error.Message == "" {
		said.Error.Message = http.StatusText(status)
	}
	switch status {
	case http.StatusBadRequest:
		return fmt.Errorf("%w: %s", ErrRefused, said.Error.Message)
	case http.StatusServiceUnavailable:
		return fmt.Errorf("%w: %s", ErrLoading, said.Error.Message)
	case http.StatusNotImplemented:
		return fmt.Errorf("%w: %s", ErrUnsupported, said.Error.Message)
	}
	return fmt.Errorf("the engine answers %d: %s", status, said.Error.Message)
}
