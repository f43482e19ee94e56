//go:build linux

package netns

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Required is the environment variable that makes Test fail rather than do without namespaces.
const Required = "OLLAMA_CACHEPROXY_NETNS_REQUIRED"

// inside tells a test that it runs in a user namespace that was made for it.
const inside = "OLLAMA_CACHEPROXY_NETNS_INSIDE"

// Test runs a test in a lab. A process that may make no network namespaces runs it once more in
// a user namespace of its own, where it may; there only this test runs, and nothing beyond the lab
// and loopback can be reached, so what is downloaded must be there before. Where user namespaces
// are not allowed either, a skipped subtest says what is missing, and without runs; if Required is
// set, the test fails. It must be called by a top-level test.
func Test(t *testing.T, within func(t *testing.T, lab *Lab), without func(t *testing.T)) {
	t.Helper()
	lab, err := New()
	if err == nil {
		t.Cleanup(func() {
			if err := lab.Close(); err != nil {
				t.Error(err)
			}
		})
		within(t, lab)
		return
	}
	if os.Getenv(inside) == "" {
		if denied := again(t); denied == nil {
			return
		} else {
			err = errors.Join(err, denied)
		}
	}
	const advice = "run it as root, or allow user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0" +
		" on Ubuntu, --cap-add NET_ADMIN --cap-add SYS_ADMIN for a container)"
	if os.Getenv(Required) != "" || os.Getenv(inside) != "" {
		t.Fatalf("this test needs network namespaces, which this process may not make: %s: %v", advice, err)
	}
	// Unlike the log of a test that passes, this is shown without -v.
	t.Run("namespaces", func(t *testing.T) {
		t.Skipf("nothing is cut off from anything here, since this process may not make network namespaces: %s: %v", advice, err)
	})
	without(t)
}

// again runs the test in a user namespace, and reports to t how it ended. It returns an error if
// there can be none.
func again(t *testing.T) error {
	t.Helper()
	if err := probe(); err != nil {
		return err
	}
	args := []string{"-test.run=^" + t.Name() + "$", "-test.v", "-test.count=1"}
	if deadline, ok := t.Deadline(); ok {
		args = append(args, "-test.timeout="+time.Until(deadline).String())
	}
	cmd := inUserNamespace(args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	t.Logf("in a user namespace:\n%s", out.String())
	if err != nil || !strings.Contains(out.String(), "--- PASS: "+t.Name()) {
		t.Errorf("in a user namespace the test did not pass (%v); its output is above", err)
	}
	return nil
}

// probe returns an error if a program in a user namespace may not make namespaces: some systems
// let anyone make one, and then allow nothing in it.
func probe() error {
	cmd := inUserNamespace("-test.run=^$")
	cmd.Env = append(cmd.Env, probing+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("in a user namespace: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

const probing = "OLLAMA_CACHEPROXY_NETNS_PROBE"

func init() {
	if os.Getenv(probing) == "" {
		return
	}
	lab, err := New()
	if err == nil {
		err = lab.Close()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// inUserNamespace returns a command that runs this program as root of a new user namespace.
func inUserNamespace(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	return cmd
}
