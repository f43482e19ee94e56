package realollama

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Config describes the server to run. Only Version must be set.
type Config struct {
	// Version is one of EraA, EraB and EraC, or the version of Bin.
	Version string
	// Bin is an ollama binary to run, as FindInstalled returns it; "" finds or builds one.
	Bin string
	// Models are names from ModelNames; none if empty.
	Models []string
	// Port is the loopback port to listen on; zero means a free one.
	Port int
	// Parallel is OLLAMA_NUM_PARALLEL, the number of slots of each loaded model; zero means
	// Ollama's default, 1.
	Parallel int
	// MaxLoaded is OLLAMA_MAX_LOADED_MODELS; zero means Ollama's default, 3 on a machine without a
	// GPU.
	MaxLoaded int
	// KeepAlive is OLLAMA_KEEP_ALIVE; "" means Ollama's default, 5m.
	KeepAlive string
	// CacheRAMMiB is LLAMA_ARG_CACHE_RAM, the host memory for evicted prompts in MiB (0 turns it
	// off, -1 means no limit); nil means llama-server's default, 8192. Era A has no such memory.
	CacheRAMMiB *int
	// Env has additional environment variables, NAME=value; they override the fields above.
	Env []string
}

const (
	startTimeout = 60 * time.Second
	stopTimeout  = 10 * time.Second
	pollInterval = 10 * time.Millisecond
)

// Server is a running Ollama server. Its methods may be used concurrently, except for Stop, Kill
// and Restart.
type Server struct {
	config Config
	bin    string
	addr   string
	// dir holds the server's home, models and log.
	dir     string
	out     io.Writer
	stopped bool

	cmd *exec.Cmd
	// exited is closed when cmd has ended; exit has its result from then on.
	exited chan struct{}
	exit   error
}

// Start runs a server for a test. It is stopped when the test ends; if the test failed, the end of
// the server's log is printed. The test fails at once if no such server is available: nothing is
// skipped.
func Start(tb testing.TB, config Config) *Server {
	tb.Helper()
	s, err := Run(tb.Context(), config, nil)
	if err != nil {
		tb.Fatalf("starting a real Ollama: %v", err)
	}
	tb.Cleanup(func() {
		log := s.Log()
		if err := s.Stop(); err != nil {
			tb.Errorf("stopping ollama %s: %v", s.Version(), err)
		}
		if tb.Failed() {
			tb.Logf("end of the log of ollama %s:\n%s", s.Version(), lastLines(log, 80))
		}
	})
	return s
}

// Run ensures that the cache has the server and its models, and runs it until Stop. A copy of its
// log goes to log if that is not nil. The context covers only the start.
func Run(ctx context.Context, config Config, log io.Writer) (*Server, error) {
	c, err := OpenCache(os.Stderr)
	if err != nil {
		return nil, err
	}
	bin := config.Bin
	if bin == "" {
		if bin, err = c.Ollama(ctx, config.Version); err != nil {
			return nil, err
		}
	}
	return c.run(ctx, bin, config, log)
}

func (c *Cache) run(ctx context.Context, bin string, config Config, log io.Writer) (*Server, error) {
	dir, err := c.runFolder()
	if err != nil {
		return nil, err
	}
	s := &Server{config: config, bin: bin, dir: dir, out: log}
	if err := s.prepare(ctx, c); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	// Another process may take a free port before the server binds it.
	for range 5 {
		port := config.Port
		if port == 0 {
			if port, err = freePort(); err != nil {
				break
			}
		}
		s.addr = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		if err = s.launch(ctx); err == nil {
			return s, nil
		}
		if config.Port != 0 || !errors.Is(err, errPortTaken) {
			break
		}
	}
	return nil, errors.Join(err, os.RemoveAll(dir))
}

// runFolder makes a folder for one server in the cache, on whose file system models can be linked,
// and removes the folders of killed processes.
func (c *Cache) runFolder() (string, error) {
	runs := filepath.Join(c.dir, "run")
	if err := os.MkdirAll(runs, 0o755); err != nil {
		return "", fmt.Errorf("making a server's folder: %w", err)
	}
	old, err := os.ReadDir(runs)
	if err != nil {
		return "", fmt.Errorf("reading the servers' folder: %w", err)
	}
	for _, entry := range old {
		owner, _, _ := strings.Cut(entry.Name(), "-")
		if pid, err := strconv.Atoi(owner); err == nil && !alive(pid) {
			left := filepath.Join(runs, entry.Name())
			killHome(filepath.Join(left, "home"))
			// Another process may remove it as well.
			_ = os.RemoveAll(left)
		}
	}
	dir, err := os.MkdirTemp(runs, strconv.Itoa(os.Getpid())+"-")
	if err != nil {
		return "", fmt.Errorf("making a server's folder: %w", err)
	}
	return dir, nil
}

func (s *Server) prepare(ctx context.Context, c *Cache) error {
	for _, d := range []string{s.path("home"), s.path("tmp"), s.path("models")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return fmt.Errorf("making a server's folder: %w", err)
		}
	}
	for _, name := range s.config.Models {
		if err := c.Install(ctx, name, s.path("models")); err != nil {
			return err
		}
	}
	return writeFile(s.path("server.log"), strings.NewReader(""), 0o644)
}

// ModelsDir is the server's folder of models, OLLAMA_MODELS.
func (s *Server) ModelsDir() string { return s.path("models") }

func (s *Server) path(name string) string { return filepath.Join(s.dir, name) }

// environment is everything that the server sees: nothing of this process's Ollama settings, and no
// way to the internet.
func (s *Server) environment() []string {
	env := []string{
		"PATH=" + os.Getenv("PATH"),
		"HOME=" + s.path("home"),
		"TMPDIR=" + s.path("tmp"),
		"LC_ALL=C.UTF-8",
		"OLLAMA_HOST=" + s.addr,
		"OLLAMA_MODELS=" + s.path("models"),
		"OLLAMA_DEBUG=1",
		"OLLAMA_NO_CLOUD=1",
		// Threads that wait for each other then sleep. Otherwise they spin, which beside a busy
		// test makes the engine up to twenty times slower.
		"OMP_WAIT_POLICY=passive",
		// Requests to other machines end at a port where nothing listens; Go's clients use no proxy
		// for loopback.
		"HTTP_PROXY=http://127.0.0.1:1",
		"HTTPS_PROXY=http://127.0.0.1:1",
	}
	if path := os.Getenv("LD_LIBRARY_PATH"); path != "" {
		env = append(env, "LD_LIBRARY_PATH="+path)
	}
	number := func(name string, n int) {
		if n != 0 {
			env = append(env, name+"="+strconv.Itoa(n))
		}
	}
	number("OLLAMA_NUM_PARALLEL", s.config.Parallel)
	number("OLLAMA_MAX_LOADED_MODELS", s.config.MaxLoaded)
	if s.config.KeepAlive != "" {
		env = append(env, "OLLAMA_KEEP_ALIVE="+s.config.KeepAlive)
	}
	if s.config.CacheRAMMiB != nil {
		env = append(env, "LLAMA_ARG_CACHE_RAM="+strconv.Itoa(*s.config.CacheRAMMiB))
	}
	return append(env, s.config.Env...)
}

var errPortTaken = errors.New("the port is taken")

// launch starts the process and waits until it answers.
func (s *Server) launch(ctx context.Context) error {
	from := s.Mark()
	if err := s.startProcess(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for !s.answers(ctx) {
		select {
		case <-s.exited:
			log := s.logSince(from)
			if strings.Contains(log, "address already in use") {
				return fmt.Errorf("starting ollama %s on %s: %w", s.config.Version, s.addr, errPortTaken)
			}
			return fmt.Errorf("starting ollama %s: it ended: %w\n%s", s.config.Version, s.exit, Quote(log))
		case <-ctx.Done():
			log := s.logSince(from)
			s.Kill()
			return fmt.Errorf("starting ollama %s: %w\n%s", s.config.Version, ctx.Err(), Quote(log))
		case <-time.After(pollInterval):
		}
	}
	return nil
}

func (s *Server) startProcess() error {
	log, err := os.OpenFile(s.path("server.log"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("opening the server's log: %w", err)
	}
	cmd := exec.Command(s.bin, "serve")
	cmd.Dir = s.dir
	cmd.Env = s.environment()
	cmd.Stdout = log
	if s.out != nil {
		cmd.Stdout = io.MultiWriter(log, s.out)
		// A runner may outlive the server and hold its output open.
		cmd.WaitDelay = time.Second
	}
	cmd.Stderr = cmd.Stdout
	ownGroup(cmd)

	started := make(chan error)
	exited := make(chan struct{})
	// It ends with the process. The thread must live as long, since the process is terminated when
	// the thread that started it ends.
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer log.Close()
		err := cmd.Start()
		started <- err
		if err == nil {
			if s.exit = cmd.Wait(); s.exit == nil {
				s.exit = errors.New("exit status 0")
			}
			close(exited)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("starting ollama %s: %w", s.config.Version, err)
	}
	s.cmd, s.exited = cmd, exited
	return nil
}

func (s *Server) answers(ctx context.Context) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL()+"/api/version", nil)
	if err != nil {
		return false
	}
	// A connection that stays open would make a restarted server look alive.
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// Stop ends the server and its runners, waits until they have ended, and removes the server's
// folder. A second call does nothing.
func (s *Server) Stop() error {
	if s.stopped {
		return nil
	}
	s.stopped = true
	s.end()
	if err := os.RemoveAll(s.dir); err != nil {
		return fmt.Errorf("removing a server's folder: %w", err)
	}
	return nil
}

// end lets the server end its runners, and kills the remaining ones after a while.
func (s *Server) end() {
	terminate(s.cmd.Process.Pid)
	select {
	case <-s.exited:
	case <-time.After(stopTimeout):
	}
	s.Kill()
}

// Kill ends the server and its runners as a crash does, and waits until they have ended.
func (s *Server) Kill() {
	pid := s.cmd.Process.Pid
	killGroup(pid)
	<-s.exited
	// Runners are reaped by init, which may take its time.
	for deadline := time.Now().Add(2 * time.Second); !groupGone(pid) && time.Now().Before(deadline); {
		time.Sleep(pollInterval)
	}
}

// Restart ends the server as Stop does, if it still runs, and starts it again with the same port,
// models and log.
func (s *Server) Restart(ctx context.Context) error {
	s.end()
	var err error
	for range 5 {
		if err = s.launch(ctx); !errors.Is(err, errPortTaken) {
			return err
		}
	}
	return err
}

// URL is the server's base URL, without a slash at the end.
func (s *Server) URL() string { return "http://" + s.addr }

// Addr is the server's host and port.
func (s *Server) Addr() string { return s.addr }

// Version is the server's version of Ollama.
func (s *Server) Version() string { return s.config.Version }

// Bin is the path of the server's ollama binary, which is also its command line client.
func (s *Server) Bin() string { return s.bin }

// Models are the names of the server's models.
func (s *Server) Models() []string { return slices.Clone(s.config.Models) }

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("finding a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// Exited is closed when the server's process has ended.
func (s *Server) Exited() <-chan struct{} { return s.exited }
