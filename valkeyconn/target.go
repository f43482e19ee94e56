package valkeyconn

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/valkey-io/valkey-go"
)

// schemes are those of the URLs that Parse takes.
var schemes = []string{"valkey", "valkeys", "redis", "rediss"}

// The parameters of URLs that are ours, and those that valkey-go reads.
var (
	ours   = []string{"ca-file", "prefix", "secret-file"}
	theirs = []string{
		"addr", "client_cache", "client_name", "db", "dial_timeout", "master_set", "max_retries", "protocol",
		"skip_verify", "write_timeout",
	}
)

// ErrScheme is Parse's error for something that is not meant to be the URL of a Valkey or Redis server.
var ErrScheme = errors.New("want valkey://, valkeys://, redis:// or rediss://, such as valkey://host:6379")

// Scheme returns the scheme of what is meant to be a URL, also where its slashes are missing, or ""
// for anything else, such as a folder.
func Scheme(target string) string {
	scheme, rest, found := strings.Cut(target, ":")
	scheme = strings.ToLower(scheme)
	if found && (strings.HasPrefix(rest, "//") || slices.Contains(schemes, scheme)) {
		return scheme
	}
	return "" // C:\answers, too
}

// Redacted returns a target as it may be shown: without a password.
func Redacted(target string) string {
	scheme := Scheme(target)
	if scheme == "" {
		return target
	}
	u, err := url.Parse(target)
	if err != nil || u.Host == "" {
		return scheme + "://…"
	}
	return u.Redacted()
}

// Wrong is the error of a setting, such as --shared, whose target Parse or Open refuses. It quotes no
// password.
func Wrong(setting, target string, err error) error {
	return fmt.Errorf("%s %s: %w", setting, Redacted(target), err)
}

// Target is what a URL names. Make it with Parse.
type Target struct {
	Address string // host:port
	Prefix  string // begins all keys
	Secret  []byte // the content of the secret file; nil if the URL names none

	option valkey.ClientOption
}

// Parse parses a URL: valkey://[user:password@]host[:port][/database], valkeys:// with TLS, redis://
// and rediss:// for the same. Three parameters are ours (and valkey-go's are taken, too):
// secret-file=PATH, a file that all proxies have and the server has not; ca-file=PATH, certificate
// authorities to believe instead of the system's; and prefix=TEXT, which begins all keys. Without it,
// they begin with the argument. No error quotes a password.
func Parse(target, prefix string) (Target, error) {
	switch scheme := Scheme(target); {
	case !slices.Contains(schemes, scheme):
		return Target{}, ErrScheme
	case !strings.HasPrefix(target[len(scheme):], "://"):
		return Target{}, fmt.Errorf("the address of the %s server is not a URL like %[1]s://host:6379", scheme)
	}
	u, err := url.Parse(target)
	if err != nil {
		// The error would quote the password.
		return Target{}, errors.New("the address of the Valkey server is not a URL like valkey://host:6379")
	}
	q := u.Query()
	for name := range q {
		// A misspelled ca-file would otherwise be found out only by a certificate that is not believed.
		if !slices.Contains(ours, name) && !slices.Contains(theirs, name) {
			return Target{}, fmt.Errorf("the address of the Valkey server has a parameter %q; there are %s",
				name, strings.Join(ours, ", "))
		}
	}
	t := Target{Prefix: prefix}
	if q.Has("prefix") {
		t.Prefix = q.Get("prefix")
	}
	if file := q.Get("secret-file"); file != "" {
		if t.Secret, err = readSecret(file); err != nil {
			return Target{}, err
		}
	}
	authorities := q.Get("ca-file")
	for _, name := range ours {
		q.Del(name)
	}
	u.RawQuery = q.Encode()
	if t.option, err = valkey.ParseURL(u.String()); err != nil {
		return Target{}, fmt.Errorf("the address of the Valkey server: %w", err)
	}
	t.Address = t.option.InitAddress[0]
	if authorities != "" {
		err = t.believe(authorities)
	}
	return t, err
}

// Option returns what every connection to the target has in common. The caller may change the copy.
func (t Target) Option() valkey.ClientOption {
	o := t.option
	o.ClientName = "ollama-cacheproxy"
	o.ForceSingleClient = true
	o.DisableCache = true // what is kept in this process is kept elsewhere
	o.DisableRetry = true // a call fails instead
	return o
}

// Connect connects with an Option.
func Connect(o valkey.ClientOption) (valkey.Client, error) {
	c, err := valkey.NewClient(o)
	_, plain := errors.AsType[tls.RecordHeaderError](err)
	switch {
	case o.TLSConfig == nil && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)):
		err = fmt.Errorf("%w (if the server wants TLS, begin its URL with valkeys:// or rediss://)", err)
	case o.TLSConfig != nil && (errors.Is(err, context.DeadlineExceeded) || plain): // it waits, or answers
		err = fmt.Errorf("%w (if the server has no TLS, begin its URL with valkey:// or redis://)", err)
	}
	return c, err
}

// Refused is the error of a server that refuses what a setting, such as --shared, has it asked for,
// where IsWrong says that time does not mend it.
func (t Target) Refused(setting string, err error) error {
	return fmt.Errorf("the Valkey server at %s refuses (check the user, the password and the database in"+
		" %s): %w", t.Address, setting, err)
}

// believe has the server's certificate checked against the authorities in a file.
func (t *Target) believe(file string) error {
	if t.option.TLSConfig == nil {
		return errors.New("ca-file is for a server with TLS: begin the URL with valkeys:// or rediss://")
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("reading the certificate authorities of the Valkey server: %w", err)
	}
	t.option.TLSConfig.RootCAs = x509.NewCertPool()
	if !t.option.TLSConfig.RootCAs.AppendCertsFromPEM(text) {
		return fmt.Errorf("there is no certificate in PEM in %s", file)
	}
	return nil
}

func readSecret(file string) ([]byte, error) {
	secret, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading the secret that proxies share: %w", err)
	}
	if len(strings.TrimSpace(string(secret))) < 16 {
		return nil, fmt.Errorf("the secret in %s is shorter than 16 characters; make one with"+
			" openssl rand -hex 32", file)
	}
	return secret, nil
}
