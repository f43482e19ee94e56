package main

import (
	"log/slog"
	"slices"

	"github.com/ollama-cacheproxy/ollama-cacheproxy/proxy"
)

// liveSettings take effect while the proxy runs. A change of any other setting takes effect after a
// restart.
var liveSettings = []string{
	"keep-alive", "keep-alive-policy", "body-timeout", "upstream-silence", "heartbeat", "max-wait",
	"allow-host", "allow-origin", "show-prompts", "log-level",
}

// configReload reads --config again: all settings, as if the proxy were restarted. If any of them
// is wrong, all previous ones stay.
type configReload struct {
	settingsFile
	serve *serveCmd
	now   map[string]string // each setting in force
	keys  string            // the file's keys that are in force; "" if there are none

	set   settings
	h     *proxy.Handler
	level *slog.LevelVar
}

// newConfigReload returns a configReload; nil without a file, or without a way to parse it again.
func newConfigReload(s *serveCmd, set settings, h *proxy.Handler, level *slog.LevelVar) []reloader {
	if s.file == nil || s.again == nil {
		return nil
	}
	c := &configReload{serve: s, now: map[string]string{}, set: set, h: h, level: level}
	c.settingsFile, c.keys = s.file.settingsFile, s.file.keys.text
	for _, x := range s.inForce {
		c.now[x.name] = x.String()
	}
	return []reloader{c}
}

func (c *configReload) reload(logger *slog.Logger) {
	var s *serveCmd
	var set settings
	err := c.settingsFile.again(func(string) (err error) {
		if s, err = c.serve.again(); err != nil {
			return err
		}
		if set, err = s.settings(); err != nil {
			return s.locate(err)
		}
		return nil
	})
	if err != nil {
		logger.Error("the settings could not be read again: those from before stay, all of them",
			"file", c.path, "err", err)
		return
	}
	changed, later := c.compare(s)
	switch text := fileKeys(s); {
	case text == c.keys:
	case text == "" || c.keys == "":
		later = append(later, settingAPIKeys)
	default:
		c.keys, changed = text, append(changed, settingAPIKeys)
		c.set.keys.replace(text)
	}
	c.h.Change(proxy.Live{
		KeepAlive: set.keepAlive, AllowHosts: set.guard.AllowHosts, AllowOrigins: set.guard.AllowOrigins,
		BodyTimeout: s.BodyTimeout, UpstreamSilence: s.UpstreamSilence, Heartbeat: s.Heartbeat,
		ShowPrompts: s.ShowPrompts,
	})
	if c.h.Lanes != nil {
		c.h.Lanes.SetMaxWait(s.MaxWait)
	}
	c.level.Set(s.LogLevel)
	logger.Info("settings read again", "file", c.path, "changed", changed)
	if len(later) > 0 {
		logger.Warn("what has changed of these settings takes effect after a restart", "settings", later)
	}
}

// fileKeys returns the keys in the file of --config.
func fileKeys(s *serveCmd) string {
	if s.file == nil {
		return ""
	}
	return s.file.keys.text
}

// compare returns the settings that differ: those that change now, and those that need a restart.
func (c *configReload) compare(s *serveCmd) (changed, later []string) {
	changed = []string{}
	for _, x := range s.inForce {
		switch value := x.String(); {
		case value == c.now[x.name]:
		case slices.Contains(liveSettings, x.name):
			c.now[x.name] = value
			changed = append(changed, x.name)
		default:
			later = append(later, x.name)
		}
	}
	return changed, later
}
