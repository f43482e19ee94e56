package batches

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// The folder has files/ID.json and files/ID.data for each file, batches/ID.json for each batch, and
// batches/ID/ with the results and the journal of one that is not at its end. A description (.json)
// is written last and removed first, so that what has none is left over from a crash.
const (
	filesFolder   = "files"
	batchesFolder = "batches"
	metaSuffix    = ".json"
	dataSuffix    = ".data"
	newSuffix     = ".new"
)

// newID returns an id that nobody can guess.
func newID(prefix string) string { return prefix + strings.ToLower(rand.Text()) }

// writeMeta writes a description, so that after a crash there is the old one or the new one.
func (s *Service) writeMeta(folder, id string, content any) error {
	text, err := json.Marshal(content)
	if err != nil {
		return err
	}
	path := s.path(folder, id+metaSuffix)
	f, err := os.OpenFile(path+newSuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(path+newSuffix, path)
	}
	if err != nil {
		os.Remove(path + newSuffix) // otherwise the next start does
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return syncFolder(filepath.Dir(path))
}

// load reads all descriptions, and removes what is left over from a crash.
func (s *Service) load() error {
	err := loadMeta(s, filesFolder, func(id string, f *file) {
		info, err := os.Stat(s.path(filesFolder, id+dataSuffix))
		if err != nil || info.Size() != f.Bytes {
			s.Log.Warn("a file's data is missing or is not what was written", "file", id, "err", err)
			return
		}
		s.files[id], s.seq = f, max(s.seq, f.Seq)
		s.stored += f.Bytes
	})
	if err != nil {
		return err
	}
	err = loadMeta(s, batchesFolder, func(id string, j *job) {
		s.batches[id], s.seq = j, max(s.seq, j.Seq)
	})
	if err != nil {
		return err
	}
	described := func(folder, id string) bool {
		_, err := os.Stat(s.path(folder, id+metaSuffix))
		return err == nil // of one that cannot be read, everything stays
	}
	err = s.tidy(filesFolder, func(name string) bool {
		id, isData := strings.CutSuffix(name, dataSuffix)
		return isData && described(filesFolder, id)
	})
	if err != nil {
		return err
	}
	return s.tidy(batchesFolder, func(name string) bool {
		if j := s.batches[name]; j != nil {
			return !j.finished()
		}
		return described(batchesFolder, name)
	})
}

// loadMeta reads the descriptions in a folder. One that cannot be read is named and left alone.
func loadMeta[T any](s *Service, folder string, found func(id string, content *T)) error {
	entries, err := os.ReadDir(s.path(folder))
	if err != nil {
		return fmt.Errorf("reading the folder of files and batches: %w", err)
	}
	for _, e := range entries {
		id, isMeta := strings.CutSuffix(e.Name(), metaSuffix)
		if !isMeta {
			continue
		}
		text, err := os.ReadFile(s.path(folder, e.Name()))
		content := new(T)
		if err == nil {
			err = json.Unmarshal(text, content)
		}
		if err != nil {
			s.Log.Warn("a description cannot be read, and is left alone",
				"path", s.path(folder, e.Name()), "err", err)
			continue
		}
		found(id, content)
	}
	return nil
}

// tidy removes from a folder everything but descriptions and what is to be kept.
func (s *Service) tidy(folder string, keep func(name string) bool) error {
	entries, err := os.ReadDir(s.path(folder))
	if err != nil {
		return fmt.Errorf("reading the folder of files and batches: %w", err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), metaSuffix) || keep(e.Name()) {
			continue
		}
		if err := os.RemoveAll(s.path(folder, e.Name())); err != nil {
			return fmt.Errorf("removing what a crash left: %w", err)
		}
	}
	return nil
}

// folderSize returns how many bytes the files of a folder have; 0 if it does not exist.
func folderSize(path string) (sum int64) {
	entries, _ := os.ReadDir(path)
	for _, e := range entries {
		var info fs.FileInfo
		info, err := e.Info()
		if err == nil {
			sum += info.Size()
		}
	}
	return sum
}
