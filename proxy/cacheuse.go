package proxy

import "time"

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
