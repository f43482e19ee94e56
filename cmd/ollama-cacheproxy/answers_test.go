package main

import (
	"context"
	"strconv"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/answers"
	"github.com/ollama-cacheproxy/ollama-cacheproxy/valkeyconn"
)

// keepAnswers keeps some answers in a folder.
func keepAnswers(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	store, err := answers.Open(ts.MkAbs(args[0]), answers.Limits{Bytes: 64 << 20}, nil)
	ts.Check(err)
	var entries []answers.Entry
	for i := range n {
		entries = append(entries, answers.Entry{
			Key:  answers.MakeKey(store.Secret(), answers.Text, strconv.Itoa(i)),
			Kind: answers.Text, Made: time.Now(), Data: make([]byte, 1000),
		})
	}
	ts.Check(store.Put(context.Background(), entries))
	ts.Check(store.Close())
}

// TestRedacted: a store's password is never shown.
func TestRedacted(t *testing.T) {
	for store, want := range map[string]string{
		"memory":                         "memory",
		"/var/lib/a b":                   "/var/lib/a b",
		"valkey://h:6379/1":              "valkey://h:6379/1",
		"redis://u:secret@h:6379":        "redis://u:xxxxx@h:6379",
		"valkey://u:sec ret@h:port/%zz":  "valkey://…",
		"valkey://:secret@h?prefix=mine": "valkey://:xxxxx@h?prefix=mine",
		"valkey:/u:secret@h":             "valkey://…",
		"redis:u:secret@h":               "redis://…",
		`C:\answers`:                     `C:\answers`,
	} {
		if got := valkeyconn.Redacted(store); got != want {
			t.Errorf("%s is shown as %s, want %s", store, got, want)
		}
	}
}
