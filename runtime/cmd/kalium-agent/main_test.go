package main

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestExitCodesSayWhatHappened(t *testing.T) {
	absent := filepath.Join(t.TempDir(), "agent.json")
	for _, c := range []struct {
		arguments      string
		code           int
		stdout, stderr string // part of what is written; "" for nothing at all
	}{
		{"--help", 0, "usage: kalium-agent", ""},
		{"status --help", 0, "usage: kalium-agent", ""},
		{"--version", 0, "kalium-agent ", ""},
		{"--verbose", 2, "", "flag provided but not defined"},
		{"serve", 2, "", "error[agent.usage]"},
		{"--config", 2, "", "flag needs an argument"},
		{"status --output xml", 2, "", "error[agent.usage]"},
		{"status --version", 2, "", "flag provided but not defined"},
		{"--config " + absent, 3, "", "error[agent.config]"},
		{"status --config " + absent, 3, "", "error[agent.config]"},
	} {
		var stdout, stderr strings.Builder

		code := run(strings.Fields(c.arguments), &stdout, &stderr)

		if code != c.code || !holds(stdout.String(), c.stdout) || !holds(stderr.String(), c.stderr) {
			t.Errorf("%q: exit %d, %q, %q", c.arguments, code, stdout.String(), stderr.String())
		}
	}
}

func holds(text, part string) bool {
	return (part == "") == (text == "") && strings.Contains(text, part)
}
