package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image/png"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/integration/realollama"
)

// TestReport: the page that bench writes for a real server is drawn by a real browser, in light and
// dark mode, without errors and without network requests. With REPORT_DIR set, the page and
// screenshots of it are saved in that folder.
func TestReport(t *testing.T) {
	server := realollama.Start(t, realollama.Config{Version: realollama.EraC, Models: []string{tiny}})
	bin, err := proxyBinary()
	if err != nil {
		t.Fatal(err)
	}
	browser, err := findBrowser(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir := os.Getenv("REPORT_DIR")
	if dir == "" {
		dir = t.TempDir()
	}
	page := filepath.Join(dir, "report.html")
	cmd := command(t, bin, "bench", "--upstream", server.URL(), "--workload", "closed-loops",
		"--requests", "40", "--prefix-tokens", "600", "--tail-tokens", "50", "--output-tokens", "8",
		"--html", page)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	ctx, complaints := newTab(t, browser, func(u *url.URL) bool { return u.Scheme == "file" })

	canvases := []string{"tokens", "loads", "whole", "first", "timeline0", "timeline1", "timeline2"}
	for _, scheme := range []string{"light", "dark"} {
		if err := chromedp.Do(ctx, prefers("prefers-color-scheme", scheme), chromedp.Navigate("file://"+page)); err != nil {
			t.Fatalf("%s: %v", scheme, err)
		}
		found, err := chromedp.Run(ctx, chromedp.Evaluate[struct {
			Drawn   string
			Rows    int
			Colours map[string]int // the number of different colours on each canvas
		}](`({
			Drawn: document.body.dataset.drawn,
			Rows: document.querySelectorAll("tbody tr").length,
			Colours: Object.fromEntries([...document.querySelectorAll("canvas")].map(c =>
				[c.id, new Set(new Uint32Array(c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer)).size])),
		})`))
		if err != nil {
			t.Fatalf("%s: %v", scheme, err)
		}
		picture, err := chromedp.Run(ctx, chromedp.FullScreenshot(100))
		if err != nil {
			t.Fatalf("%s: %v", scheme, err)
		}
		if found.Drawn != fmt.Sprint(len(canvases)) || found.Rows < 12 {
			t.Errorf("%s: %q charts are drawn, the table has %d rows", scheme, found.Drawn, found.Rows)
		}
		for _, id := range canvases {
			if found.Colours[id] < 10 { // bars, axes, and letters with antialiased edges
				t.Errorf("%s: the canvas %q has %d colours", scheme, id, found.Colours[id])
			}
		}
		// Axes and letters are drawn without any data, too. Whatever disappears without data was
		// drawn from it.
		gone, err := chromedp.Run(ctx, chromedp.Evaluate[map[string]int](`Object.fromEntries([...document.querySelectorAll("canvas")].map(c => {
			const pixels = () => {
				const copy = Object.assign(document.createElement("canvas"), {width: c.width, height: c.height}).getContext("2d", {willReadFrequently: true});
				copy.drawImage(c, 0, 0);
				return new Uint32Array(copy.getImageData(0, 0, c.width, c.height).data.buffer);
			};
			const before = pixels(), chart = Chart.getChart(c);
			chart.data.datasets.forEach(d => { d.data = []; });
			chart.update("none");
			const after = pixels();
			return [c.id, before.reduce((n, p, i) => n + (p !== after[i] ? 1 : 0), 0)];
		}))`))
		if err != nil {
			t.Fatalf("%s: %v", scheme, err)
		}
		for _, id := range canvases {
			if gone[id] < 500 {
				t.Errorf("%s: the canvas %q has %d pixels that are of its data", scheme, id, gone[id])
			}
		}
		image, err := png.Decode(bytes.NewReader(picture))
		if err != nil {
			t.Fatal(err)
		}
		if r, _, _, _ := image.At(2, 2).RGBA(); (r < 0x8000) != (scheme == "dark") {
			t.Errorf("%s: the paper is %x red", scheme, r)
		}
		if os.Getenv("REPORT_DIR") != "" {
			if err := os.WriteFile(filepath.Join(dir, scheme+".png"), picture, 0o666); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range complaints() {
		t.Error(c)
	}
}

// newTab opens a tab of a browser for the duration of the test, and records problems: the page's
// console output, exceptions, the browser's messages about the page, and requests that it may not
// make.
func newTab(t *testing.T, browser string, may func(*url.URL) bool) (ctx context.Context, complaints func() []string) {
	t.Helper()
	// Tests may run as root, for whom the sandbox does not work.
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(browser), chromedp.NoSandbox)
	ctx, stop := chromedp.NewExecAllocator(t.Context(), options...)
	t.Cleanup(stop)
	ctx, stop = chromedp.NewContext(ctx)
	t.Cleanup(stop)
	ctx, stop = context.WithTimeout(ctx, 3*time.Minute) // a watchdog
	t.Cleanup(stop)
	var mu sync.Mutex
	var list []string
	complain := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		list = append(list, fmt.Sprintf(format, args...))
	}
	enable := chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, network.Enable, network.EnableParams{})
		if err == nil {
			_, err = cdp.Call(ctx, t, log.Enable, cdp.Empty{})
		}
		return err
	})
	if err := chromedp.Do(ctx, enable, chromedp.EmulateViewport(1200, 900)); err != nil {
		t.Fatal(err)
	}
	err := chromedp.Listen(ctx, func(event any) {
		switch e := event.(type) {
		case *runtime.EventConsoleAPICalled:
			complain("the page says in the console: %v", e.Args)
		case *runtime.EventExceptionThrown:
			complain("an exception: %v", e.ExceptionDetails)
		case *log.EventEntryAdded:
			complain("the browser says: %s (%s)", e.Entry.Text, e.Entry.URL)
		case *network.EventRequestWillBeSent:
			if u, err := url.Parse(e.Request.URL); err != nil || u.Scheme != "data" && !may(u) {
				complain("a request for %s", e.Request.URL)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return ctx, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return list
	}
}

// prefers sets a media feature, such as prefers-color-scheme.
func prefers(name, value string) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: name, Value: value}}})
		return err
	})
}

var browsers = []string{"chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"}

// findBrowser returns the path of Chromium: the one that the variable CHROMIUM names, or the first
// in PATH. As root on Debian, a missing one is installed.
func findBrowser(ctx context.Context) (string, error) {
	find := func() string {
		for _, name := range append([]string{os.Getenv("CHROMIUM")}, browsers...) {
			if path, err := exec.LookPath(name); err == nil {
				return path
			}
		}
		return ""
	}
	if path := find(); path != "" {
		return path, nil
	}
	err := errors.New("no root, no apt-get")
	if _, apt := exec.LookPath("apt-get"); apt == nil && os.Geteuid() == 0 {
		fmt.Fprintln(os.Stderr, "installing chromium-headless-shell with apt-get (about 300 MB on disk) …")
		script := exec.CommandContext(ctx, "sh", "-c", "apt-get update && apt-get install -y --no-install-recommends chromium-headless-shell fonts-dejavu-core")
		script.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		out, failed := script.CombinedOutput()
		if path := find(); path != "" {
			return path, nil
		}
		err = fmt.Errorf("apt-get: %w\n%s", failed, realollama.Quote(string(out)))
	}
	return "", fmt.Errorf("Chromium is needed, as one of %s in PATH or as the variable CHROMIUM names it; install it (Debian: apt-get install chromium-headless-shell): %w", strings.Join(browsers, ", "), err)
}
