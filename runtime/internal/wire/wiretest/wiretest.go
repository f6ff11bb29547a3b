// Package wiretest replays recorded connections to a parser.
//
// A recording is a text file. Its lines are `C "..."` for what a client sent in one piece and `S "..."` for the server, in
// Go's quotes, `TLS` where both went on inside TLS (the server's lines are left out from there on, since no parser sees
// them), and behind each `C` what the parser makes of it: `> unit` for each unit, `! refusal` where the recording ends.
package wiretest

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/wire"
)

// Parser is what is tested: one side of a connection, whose units are rendered as text; "" for one that is not compared,
// since its cut depends on that of the bytes.
type Parser interface {
	Next(b []byte) (n int, unit string, err error)
	Server(b []byte)
	InTLS() bool
}

// Recordings lists the recordings of a package by path.
func Recordings(t testing.TB) []string {
	t.Helper()
	paths, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no recordings: %v", err)
	}
	return paths
}

// Replay gives a recording to p with the client's bytes in pieces of size, and compares.
func Replay(t *testing.T, path string, size int, p Parser) {
	t.Helper()
	for number, line := range lines(t, path) {
		what, said, _ := strings.Cut(line, " ")
		b := []byte(said)
		if what == "C" || what == "S" {
			b = unquote(t, path, number, said)
		}
		switch what {
		case "TLS":
			if !p.InTLS() {
				t.Fatalf("%s:%d: the parser is not inside TLS", path, number+1)
			}
		case "S":
			for piece := range pieces(b, size) {
				p.Server(piece)
			}
		case "C":
			want := expected(lines(t, path)[number+1:])
			if got := units(b, size, p); strings.Join(got, "\n") != strings.Join(want, "\n") {
				t.Fatalf("%s:%d, in pieces of %d:\n%s\nwant\n%s", path, number+1, size, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
	}
}

// Client returns all that the client sent, for a corpus.
func Client(t testing.TB, path string) []byte {
	var all []byte
	for number, line := range lines(t, path) {
		if said, isClient := strings.CutPrefix(line, "C "); isClient {
			all = append(all, unquote(t, path, number, said)...)
		}
	}
	return all
}

func lines(t testing.TB, path string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

func unquote(t testing.TB, path string, number int, said string) []byte {
	t.Helper()
	text, err := strconv.Unquote(said)
	if err != nil {
		t.Fatalf("%s:%d: %v", path, number+1, err)
	}
	return []byte(text)
}

// expected takes the parser's lines off the front.
func expected(lines []string) []string {
	for i, line := range lines {
		if line[0] != '>' && line[0] != '!' {
			return lines[:i]
		}
	}
	return lines
}

func pieces(b []byte, size int) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(b) > 0 {
			n := min(size, len(b))
			if !yield(b[:n]) {
				return
			}
			b = b[n:]
		}
	}
}

func units(b []byte, size int, p Parser) (got []string) {
	var held []byte
	for piece := range pieces(b, size) {
		held = append(held, piece...)
		for len(held) > 0 {
			n, unit, err := p.Next(held)
			if err == wire.ErrShort {
				break
			}
			if err != nil {
				return append(got, "! "+err.Error())
			}
			if unit != "" {
				got = append(got, "> "+unit)
			}
			held = held[n:]
		}
	}
	if len(held) > 0 {
		got = append(got, "! "+strconv.Itoa(len(held))+" bytes are held")
	}
	return got
}
