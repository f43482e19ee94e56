//go:build !only || badger

package main

import (
	"errors"

	"github.com/dgraph-io/badger/v4"
)

func init() {
	databases["badger"] = func(dir string) (database, error) {
		db, err := badger.Open(badger.DefaultOptions(dir).WithLogger(nil))
		return bad{db}, err
	}
}

type bad struct{ db *badger.DB }

func (b bad) put(keys, values [][]byte) error {
	return b.db.Update(func(tx *badger.Txn) error {
		for i := range keys {
			if err := tx.Set(keys[i], values[i]); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b bad) get(keys [][]byte) (found [][]byte, err error) {
	return found, b.db.View(func(tx *badger.Txn) error {
		for _, key := range keys {
			item, err := tx.Get(key)
			if errors.Is(err, badger.ErrKeyNotFound) {
				found = append(found, nil)
				continue
			}
			if err != nil {
				return err
			}
			v, err := item.ValueCopy(nil)
			if err != nil {
				return err
			}
			found = append(found, v)
		}
		return nil
	})
}

func (b bad) remove(keys [][]byte) error {
	return b.db.Update(func(tx *badger.Txn) error {
		for _, key := range keys {
			if err := tx.Delete(key); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b bad) shrink() error {
	if err := b.db.Flatten(2); err != nil {
		return err
	}
	for b.db.RunValueLogGC(0.5) == nil {
	}
	return nil
}

func (b bad) close() error { return b.db.Close() }
