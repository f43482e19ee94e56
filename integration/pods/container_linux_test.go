package pods

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// image is what an image of containers is to this test.
type image struct {
	// files are copied into the root, from paths of this machine.
	files map[string]string
	// usr, if not empty, is a folder that lies over this machine's /usr, whose libraries and
	// programs are then those of the image.
	usr        string
	entrypoint []string
	env        []string
}

// root makes the root of a container in a folder, on the thread of the pod's host: mounts are
// visible there only, and end with it.
func (p *pod) root(c container, im image, volumes map[string]string) (string, error) {
	dir := filepath.Join(p.dir, "root-"+c.Name)
	for _, sub := range []string{"etc", "proc", "dev", "usr"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return "", err
		}
	}
	resolver := fmt.Sprintf("nameserver %v\nsearch %s svc.cluster.local cluster.local\noptions ndots:5 timeout:1 attempts:2\n",
		p.cluster.dns, domain)
	err := errors.Join(
		os.WriteFile(filepath.Join(dir, "etc/resolv.conf"), []byte(resolver), 0o644),
		os.WriteFile(filepath.Join(dir, "etc/hosts"), []byte("127.0.0.1 localhost\n"+p.host.Addr.String()+" "+p.name+"\n"), 0o644),
	)
	for to, from := range im.files {
		// A program that is written here could not be started while a process is started for another
		// pod, which has the file open for a moment.
		if os.Link(from, filepath.Join(dir, to)) != nil {
			err = errors.Join(err, copyFile(from, filepath.Join(dir, to)))
		}
	}
	for _, m := range c.VolumeMounts {
		err = errors.Join(err, os.MkdirAll(filepath.Join(dir, m.MountPath), 0o755))
	}
	if im.usr != "" {
		for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
			if to, linked := os.Readlink("/" + name); linked == nil {
				err = errors.Join(err, os.Symlink(to, filepath.Join(dir, name)))
			}
		}
	}
	if err != nil {
		return "", err
	}
	p.host.Do(func() { err = p.mount(dir, c, im, volumes) })
	return dir, err
}

func (p *pod) mount(dir string, c container, im image, volumes map[string]string) error {
	if err := bind(dir, dir, false); err != nil {
		return err
	}
	if im.usr != "" {
		if err := unix.Mount("overlay", filepath.Join(dir, "usr"), "overlay", unix.MS_RDONLY, "lowerdir="+im.usr+":/usr"); err != nil {
			return fmt.Errorf("laying the image over /usr: %w", err)
		}
	}
	for _, sub := range []string{"/proc", "/dev"} {
		if err := bind(sub, filepath.Join(dir, sub), false); err != nil {
			return err
		}
	}
	for _, m := range c.VolumeMounts {
		from := volumes[m.Name]
		if from == "" {
			return fmt.Errorf("container %s mounts the volume %s, which does not exist", c.Name, m.Name)
		}
		if err := bind(from, filepath.Join(dir, m.MountPath), m.ReadOnly); err != nil {
			return err
		}
	}
	if !c.SecurityContext.ReadOnlyRootFilesystem {
		return nil
	}
	return readOnly(dir)
}

func bind(from, to string, only bool) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mounting %s: %w", to, err)
	}
	if only {
		return readOnly(to)
	}
	return nil
}

func readOnly(dir string) error {
	if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("making %s read-only: %w", dir, err)
	}
	return nil
}

func copyFile(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, text, info.Mode().Perm()))
}

// running is a container that was started.
type running struct {
	name string
	cmd  *exec.Cmd
	log  *logBuffer
	done chan struct{} // closed when the process has ended and err is set
	err  error
}

// begin starts a container's command, or another one in its place, as process 1 of a namespace of
// processes: when it ends, what it has started ends, too.
func (p *pod) begin(c container, root string, im image, instead ...string) (*running, error) {
	env, err := c.environment(append([]string{"HOSTNAME=" + p.name}, im.env...), p.name)
	if err != nil {
		return nil, err
	}
	line := append(append([]string{}, c.Command...), c.Args...)
	if len(c.Command) == 0 {
		line = append(append([]string{}, im.entrypoint...), c.Args...)
	}
	if len(instead) > 0 {
		line = instead
	}
	line = expand(line, env)
	r := &running{name: c.Name, log: new(logBuffer), done: make(chan struct{})}
	r.cmd = p.host.Command(p.cluster.ctx, line[0], line[1:]...)
	r.cmd.Env, r.cmd.Dir = env, "/"
	r.cmd.Stdout, r.cmd.Stderr = r.log, r.log
	r.cmd.SysProcAttr.Chroot = root
	r.cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
	if p.cluster.users {
		s := p.cluster.set.Spec.Template.Spec.SecurityContext
		r.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: s.RunAsUser, Gid: s.RunAsGroup, Groups: []uint32{s.FSGroup}}
	}
	if err := p.host.Start(r.cmd); err != nil {
		return nil, fmt.Errorf("pod %s: starting %s (%s): %w", p.name, c.Name, strings.Join(line, " "), err)
	}
	go func() { // ends with the process
		r.err = r.cmd.Wait()
		close(r.done)
	}()
	return r, nil
}

// ended reports whether the process has ended.
func (r *running) ended() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// logBuffer collects what a process writes.
type logBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

// String returns everything.
func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// end returns the last lines.
func (b *logBuffer) end() string {
	lines := strings.Split(b.String(), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}

// volume makes a volume that a group of users may write.
func volume(path string, group int) (string, error) {
	err := os.MkdirAll(path, 0o755)
	if err == nil {
		err = os.Chown(path, -1, group)
	}
	if err == nil {
		err = os.Chmod(path, 0o775|fs.ModeSetgid)
	}
	return path, err
}
