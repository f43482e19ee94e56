//go:build !only || sqlite

package main

import (
	"database/sql"
	"os"
	"path/filepath"

	_ "modernc.org/sqlite"
)

func init() {
	databases["sqlite"] = func(dir string) (database, error) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "db")+
			"?_pragma=page_size(8192)%3Bpragma%20auto_vacuum(incremental)%3Bpragma%20journal_mode(wal)"+
			"&_pragma=synchronous(normal)&_pragma=busy_timeout(5000)")
		if err != nil {
			return nil, err
		}
		s := &lite{db: db}
		if _, err = db.Exec(`CREATE TABLE IF NOT EXISTS e (key BLOB NOT NULL UNIQUE, data BLOB)`); err != nil {
			return nil, err
		}
		if s.read, err = db.Prepare(`SELECT data FROM e WHERE key = ?`); err != nil {
			return nil, err
		}
		return s, nil
	}
}

type lite struct {
	db   *sql.DB
	read *sql.Stmt
}

func (s *lite) in(query string, keys, values [][]byte) error {
	tx, err := s.db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	stmt, err := tx.Prepare(query)
	if err != nil {
		return err
	}
	defer stmt.Close()
	for i := range keys {
		args := []any{keys[i]}
		if values != nil {
			args = append(args, values[i])
		}
		if _, err := stmt.Exec(args...); err != nil {
			return err
		}
	}
	return tx.Commit()
}

func (s *lite) put(keys, values [][]byte) error {
	return s.in(`INSERT OR REPLACE INTO e VALUES (?, ?)`, keys, values)
}

func (s *lite) get(keys [][]byte) (found [][]byte, err error) {
	tx, err := s.db.Begin()
	if err != nil {
		return nil, err
	}
	defer tx.Rollback()
	read := tx.Stmt(s.read)
	for _, key := range keys {
		var data []byte
		if err := read.QueryRow(key).Scan(&data); err != nil && err != sql.ErrNoRows {
			return nil, err
		}
		found = append(found, data)
	}
	return found, nil
}

func (s *lite) remove(keys [][]byte) error {
	return s.in(`DELETE FROM e WHERE key = ?`, keys, nil)
}

func (s *lite) shrink() error {
	if _, err := s.db.Exec(`PRAGMA incremental_vacuum`); err != nil {
		return err
	}
	_, err := s.db.Exec(`PRAGMA wal_checkpoint(TRUNCATE)`)
	return err
}

func (s *lite) close() error { return s.db.Close() }
