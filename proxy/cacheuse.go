package proxy

import (
	"fmt"
	"time"
)

// CacheUse tells what of an answer was not computed, and what that saved.
type CacheUse struct {
	// Kind is what was looked for: CacheVectors or CacheText.
	Kind string
	// Result is one of the Cache… results.
	Result string
	Hits   int   // parts that were kept: inputs of an embedding; 1 for an answer
	Misses int   // parts that were computed for this request
	Joined int   // parts that another request was computing
	Bytes  int64 // of the kept parts, as they are stored
	// Prompt and Generated are the tokens of the kept parts, and Saved the time that it took to
	// compute them: measured when they were made.
	Prompt, Generated int
	Saved             time.Duration
}

// What a request looked for among the kept answers.
const (
	CacheVectors = "embedding"
	CacheText    = "answer"
)

// The results of looking for a kept answer.
const (
	CacheHit     = "hit"
	CachePartial = "partial" // some inputs of an embedding were kept
	CacheMiss    = "miss"
	CacheJoined  = "joined" // another request was computing it
	CacheBypass  = "bypass" // the request, or the answer's nature, forbade it
)

// String is for logs: the result, or for an embedding how many of its inputs were kept.
func (c *CacheUse) String() string {
	switch {
	case c == nil:
		return ""
	case c.Kind == CacheVectors && c.Hits+c.Misses+c.Joined > 0:
		return fmt.Sprintf("%d/%d", c.Hits, c.Hits+c.Misses+c.Joined)
	}
	return c.Result
}
