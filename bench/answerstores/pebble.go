//go:build !only || pebble

package main

import (
	"bytes"
	"context"
	"errors"

	"github.com/cockroachdb/pebble/v2"
)

func init() {
	databases["pebble"] = func(dir string) (database, error) {
		db, err := pebble.Open(dir, &pebble.Options{Logger: quiet{pebble.DefaultLogger}})
		return peb{db}, err
	}
}

// quiet logs only what ends the process.
type quiet struct{ pebble.Logger }

func (quiet) Infof(string, ...any)  {}
func (quiet) Errorf(string, ...any) {}

type peb struct{ db *pebble.DB }

func (p peb) put(keys, values [][]byte) error {
	b := p.db.NewBatch()
	for i := range keys {
		if err := b.Set(keys[i], values[i], nil); err != nil {
			return err
		}
	}
	return b.Commit(pebble.NoSync)
}

func (p peb) get(keys [][]byte) (found [][]byte, err error) {
	for _, key := range keys {
		v, closer, err := p.db.Get(key)
		if errors.Is(err, pebble.ErrNotFound) {
			found = append(found, nil)
			continue
		}
		if err != nil {
			return nil, err
		}
		found = append(found, bytes.Clone(v))
		closer.Close()
	}
	return found, nil
}

func (p peb) remove(keys [][]byte) error {
	b := p.db.NewBatch()
	for _, key := range keys {
		if err := b.Delete(key, nil); err != nil {
			return err
		}
	}
	return b.Commit(pebble.NoSync)
}

func (p peb) shrink() error {
	return p.db.Compact(context.Background(), []byte{0}, bytes.Repeat([]byte{255}, 33), false)
}

func (p peb) close() error { return p.db.Close() }
