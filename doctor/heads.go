package doctor

import (
	"cmp"
	"slices"
	"time"
)

// Entry has the members of an entry of the requests page that matter here.
type Entry struct {
	At      time.Time   `json:"at"`
	Model   string      `json:"model"`
	Changed *EntryPlace `json:"changed"`
}

// EntryPlace is where a prompt differs from the one that it should have continued.
type EntryPlace struct {
	Place  string `json:"place"`
	Byte   int    `json:"byte"`
	Kind   string `json:"kind"`
	Tokens int    `json:"tokens"` // that were evaluated because of that
}

// ChangedOf sums up the entries since a time by place.
func ChangedOf(entries []Entry, since time.Time) []Changed {
	var list []Changed
	if len(entries) == 0 {
		return nil
	}
	oldest := slices.MinFunc(entries, func(a, b Entry) int { return a.At.Compare(b.At) }).At
	if oldest.Before(since) {
		oldest = since
	}
	for _, e := range entries {
		if e.Changed == nil || e.At.Before(since) {
			continue
		}
		i := slices.IndexFunc(list, func(c Changed) bool {
			return c.Model == e.Model && c.Place == e.Changed.Place && c.Kind == e.Changed.Kind
		})
		if i < 0 {
			i = len(list)
			list = append(list, Changed{Model: e.Model, Place: e.Changed.Place, Kind: e.Changed.Kind, Byte: e.Changed.Byte, Since: oldest})
		}
		c := &list[i]
		c.Count++
		c.Tokens += e.Changed.Tokens
		c.Byte = min(c.Byte, e.Changed.Byte)
	}
	slices.SortFunc(list, func(a, b Changed) int { return cmp.Compare(b.Tokens, a.Tokens) })
	return list
}
