// Package installs tests the parts of a release: the archives, the packages on a Debian that runs
// its own systemd, the completions for shells, the formula and the compose file. It needs Linux.
package installs
