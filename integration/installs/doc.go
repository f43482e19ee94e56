// Package installs tries what a release consists of: the archives, the packages on a Debian with a
// systemd of its own, the shells' completions, the formula and the compose file. It needs Linux.
package installs
