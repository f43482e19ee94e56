package contextstore

// MaxChain is how many links of one chain are kept, for comparison with a model.
const MaxChain = maxChain
