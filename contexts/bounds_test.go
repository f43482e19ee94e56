package contexts

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/engine"
)

// TestUnsavablePrompt: a prompt that an engine cannot save, such as one with an image, is tried
// once, and is not blamed on the disk.
func TestUnsavablePrompt(t *testing.T) {
	with(t, map[string]modelSpec{"image": {}, "m": {}}, ample, func(p *proxied) {
		p.most = 2
		calls := 0
		p.setFaults(faults{save: func(_ context.Context, e *llama) error {
			if e.model == "image" {
				calls++
				return engine.ErrUnsupported
			}
			return nil
		}})
		p.must(ask{model: "image", prompt: long("a", 1), answer: 2})
		p.rest(time.Minute)
		p.must(ask{model: "m", prompt: long("b", 1), answer: 2})
		p.rest(time.Minute)
		if calls != 1 || p.saved() != 1 {
			t.Errorf("%d tries to save what cannot be, %d of 1 others saved", calls, p.saved())
		}
	})
}

// TestEngineReplaced: if a model is reloaded with other options for a request without a stored
// state, its state belongs to the engine that served it.
func TestEngineReplaced(t *testing.T) {
	with(t, one, ample, func(p *proxied) {
		p.must(ask{model: "m", prompt: long("a", 1), answer: 2})
		p.must(ask{model: "m", context: 8192, prompt: long("b", 1), answer: 2})
		p.rest(time.Minute)
		if got := p.m.Counts(); got.Failed[FailedSave] != 0 || got.Saved != 2 {
			t.Errorf("counted is %+v, want 2 saved", got)
		}
	})
}

// TestWarnsOnce: a repeated failure is logged once.
func TestWarnsOnce(t *testing.T) {
	for name, fault := range map[string]faults{
		"saving": {save: func(_ context.Context, e *llama) error { e.end(); return engine.ErrGone }},
		"attaching": {restore: func(context.Context, *llama) error {
			return errors.New("it does not work")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			with(t, one, ample, func(p *proxied) {
				var lines bytes.Buffer
				p.m.Log = slog.New(slog.NewTextHandler(&lines, &slog.HandlerOptions{Level: slog.LevelWarn}))
				p.must(ask{model: "m", prompt: long("a", 1), answer: 2})
				p.m.Leave(context.Background(), ollamaPort)
				p.setFaults(fault)
				for i := range 10 {
					p.unload()
					p.must(ask{model: "m", prompt: long("a", 2), answer: 2})
					p.must(ask{model: "m", prompt: long(strings.Repeat("b", i+1), 2), answer: 2})
					p.rest(0)
				}
				if n := strings.Count(lines.String(), "\n"); n != 1 {
					t.Errorf("%d lines:\n%s", n, lines.String())
				}
			})
		})
	}
}

// TestHangingEngine: engines that do not answer delay the end of the manager by seconds, however
// many there are.
func TestHangingEngine(t *testing.T) {
	with(t, map[string]modelSpec{"m": {}, "n": {}, "o": {}}, ample, func(p *proxied) {
		p.most = 3
		p.setFaults(faults{save: hang, restore: hang})
		for _, model := range []string{"m", "n", "o"} {
			p.must(ask{model: model, prompt: long("a", 1), answer: 2})
		}
		began := time.Now()
		p.stop()
		<-p.ended
		if took := time.Since(began); took > endTimeout+time.Second {
			t.Errorf("the manager ended after %v", took)
		}
	})
}

// TestHungSaveFreesLane: a lane is not held for longer than longestHold while an engine saves.
func TestHungSaveFreesLane(t *testing.T) {
	with(t, one, ample, func(p *proxied) {
		p.must(ask{model: "m", prompt: long("a", 1), answer: 2}) // shows how fast it is
		p.rest(time.Minute)
		p.setFaults(faults{save: hang})
		p.must(ask{model: "m", prompt: long("b", 1), answer: 2})
		lane, began := p.lane("m"), time.Now()
		lane <- struct{}{} // when the lane is free
		if took := time.Since(began); took < time.Second || took > longestHold {
			t.Errorf("the lane was held for %v", took)
		}
		<-lane
	})
}
