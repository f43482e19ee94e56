package batch

import (
	"cmp"
	"iter"
	"slices"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/prefix"
)

// window reads a part of the input ahead and hands out its items in the order of the tree of their
// prefixes, so that items that share most follow each other: runner by runner, and within each by
// prefix. That is the order that evaluates least (SGLang, arXiv 2312.07104, Theorem 3.1). Of a
// node's branches the one that is first in the input goes first, so that results need not wait long
// for their turn; but a window begins with the branches on which the last one ended.
type window struct {
	source *Source
	size   int
	reader *prefix.Reader
	skip   func(index int) bool // items that are done

	next   func() (item, error, bool)
	stop   func()
	read   int      // items that were read
	begins [2]int   // the first index of this window and of the one before
	items  []item   // the rest of this window
	last   []uint64 // links of the last item of the window before
}

func newWindow(s *Source, size int, skip func(int) bool) *window {
	w := &window{source: s, size: size, reader: prefix.NewReader(), skip: skip}
	w.next, w.stop = iter.Pull2(s.items())
	return w
}

// behind returns the index before which all items must be done before the next window may be read,
// which bounds what waits to be written. It is 0 if this window is not yet empty.
func (w *window) behind() int {
	if len(w.items) > 0 {
		return 0
	}
	return w.begins[1]
}

// take returns the next item, or false at the end of the input.
func (w *window) take() (item, bool, error) {
	if len(w.items) == 0 {
		if err := w.fill(); err != nil || len(w.items) == 0 {
			return item{}, false, err
		}
	}
	it := w.items[0]
	w.items = w.items[1:]
	return it, true, nil
}

// fill reads the next window.
func (w *window) fill() error {
	type keyed struct {
		item
		path []uint64 // the links' hashes
	}
	w.begins = [2]int{w.read, w.begins[0]}
	ranks := map[uint64]int{} // by a link's hash, which stands for the whole prefix
	for _, h := range w.last {
		ranks[h] = len(ranks)
	}
	var all []keyed
	for len(all) < w.size {
		it, err, ok := w.next()
		if !ok {
			break
		}
		if err != nil {
			return err
		}
		if w.read = it.index + 1; w.skip(it.index) {
			continue
		}
		chain, err := w.chain(it)
		if err != nil {
			if _, fatal := badLine(err); fatal != nil {
				return fatal
			}
		}
		it.text = chain.Bytes()
		k := keyed{it, path(chain.Links)}
		for _, h := range k.path {
			if _, seen := ranks[h]; !seen {
				ranks[h] = len(ranks)
			}
		}
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b keyed) int {
		c := slices.CompareFunc(a.path, b.path, func(x, y uint64) int { return ranks[x] - ranks[y] })
		return cmp.Or(c, a.index-b.index)
	})
	w.items = w.items[:0]
	var before []uint64
	for _, k := range all {
		for k.shared < min(len(before), len(k.path)) && before[k.shared] == k.path[k.shared] {
			k.shared++
		}
		w.items, before = append(w.items, k.item), k.path
	}
	if len(all) > 0 {
		w.last = all[len(all)-1].path
	}
	return nil
}

// path returns the hashes by which an item is ordered: of the first links all, of later ones fewer
// and fewer, so that a long prompt has at most about a hundred.
func path(links []prefix.Link) []uint64 {
	hashes := make([]uint64, 0, min(len(links), 100))
	for i := 0; i < len(links); i += max(1, i/32) {
		hashes = append(hashes, links[i].Hash)
	}
	return hashes
}

// chain reads an item's chain.
func (w *window) chain(it item) (prefix.Chain, error) {
	r, err := w.source.request(it)
	if err != nil {
		return prefix.Chain{}, err
	}
	return w.reader.Read(r.endpoint, r.runner(), r.body), nil
}
