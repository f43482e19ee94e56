package contextstore

// What the account is made of, for comparison with a model and with the heap.
const (
	ContextBytes = contextBytes
	TokenBytes   = tokenBytes
	MaxChain     = maxChain
)
