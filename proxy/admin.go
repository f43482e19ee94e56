package proxy

// admin reports whether the request may change models and upstreams: its client shows an API key, or no
// keys are asked for.
func (ex *exchange) admin() bool { return !ex.stranger }
