//go:build !only || bbolt

package main

import (
	"bytes"
	"os"
	"path/filepath"

	"go.etcd.io/bbolt"
)

func init() {
	databases["bbolt"] = func(dir string) (database, error) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		b := &bolt{path: filepath.Join(dir, "db")}
		return b, b.open()
	}
}

type bolt struct {
	path string
	db   *bbolt.DB
}

var bucket = []byte("b")

func (b *bolt) open() (err error) {
	if b.db, err = bbolt.Open(b.path, 0o600, &bbolt.Options{FreelistType: bbolt.FreelistMapType}); err != nil {
		return err
	}
	return b.db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bucket)
		return err
	})
}

func (b *bolt) put(keys, values [][]byte) error {
	return b.db.Update(func(tx *bbolt.Tx) error {
		for i := range keys {
			if err := tx.Bucket(bucket).Put(keys[i], values[i]); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *bolt) get(keys [][]byte) (found [][]byte, err error) {
	return found, b.db.View(func(tx *bbolt.Tx) error {
		for _, key := range keys {
			found = append(found, bytes.Clone(tx.Bucket(bucket).Get(key)))
		}
		return nil
	})
}

func (b *bolt) remove(keys [][]byte) error {
	return b.db.Update(func(tx *bbolt.Tx) error {
		for _, key := range keys {
			if err := tx.Bucket(bucket).Delete(key); err != nil {
				return err
			}
		}
		return nil
	})
}

// shrink copies what is left into a new file, as bbolt has no other way.
func (b *bolt) shrink() error {
	to, err := bbolt.Open(b.path+".new", 0o600, &bbolt.Options{NoSync: true})
	if err != nil {
		return err
	}
	if err := bbolt.Compact(to, b.db, 1<<20); err != nil {
		return err
	}
	if err := to.Sync(); err != nil {
		return err
	}
	if err := to.Close(); err != nil {
		return err
	}
	if err := b.db.Close(); err != nil {
		return err
	}
	if err := os.Rename(b.path+".new", b.path); err != nil {
		return err
	}
	return b.open()
}

func (b *bolt) close() error { return b.db.Close() }
